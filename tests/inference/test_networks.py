"""The architectures: padding as TensorFlow does it, shapes, and the registry that manifests name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from inference.networks import ARCHITECTURES, Convolution, MobileNetV1, MobileNetV2, build


def _same_convolution(picture: NDArray[np.float32], kernel: NDArray[np.float32], stride: int) -> NDArray[np.float32]:
    """TensorFlow's definition of SAME, written out: output i covers input from i * stride - pad_before."""
    size = kernel.shape[0]
    outputs = [-(-side // stride) for side in picture.shape]
    before = [max((output - 1) * stride + size - side, 0) // 2 for output, side in zip(outputs, picture.shape, strict=True)]
    found = np.zeros(outputs, np.float32)
    for row in range(outputs[0]):
        for column in range(outputs[1]):
            for down in range(size):
                for right in range(size):
                    r, c = row * stride - before[0] + down, column * stride - before[1] + right
                    if 0 <= r < picture.shape[0] and 0 <= c < picture.shape[1]:
                        found[row, column] += picture[r, c] * kernel[down, right]
    return found


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(3, 12), columns=st.integers(3, 12), stride=st.integers(1, 2), kernel=st.sampled_from([1, 3]))
def test_padding_is_tensorflows(rows: int, columns: int, stride: int, kernel: int) -> None:
    """A convolution equals the definition of SAME for odd and even sizes at both strides."""
    torch.manual_seed(rows * 100 + columns)
    layer = Convolution(1, 1, kernel, stride, linear=True)
    torch.nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    picture = np.random.default_rng(rows).standard_normal((rows, columns)).astype(np.float32)
    with torch.inference_mode():
        found = layer(torch.from_numpy(picture)[None, None])[0, 0].numpy()
    assert np.allclose(found, _same_convolution(picture, layer.weight[0, 0].detach().numpy(), stride), atol=1e-5)


def test_activation_is_bounded_unless_linear() -> None:
    """ReLU6 keeps outputs in 0 to 6; a linear layer passes them."""
    layer, linear = Convolution(1, 1), Convolution(1, 1, linear=True)
    linear.load_state_dict(layer.state_dict())
    with torch.inference_mode():
        layer.weight.fill_(1)
        linear.weight.fill_(1)
        picture = torch.tensor([[[[-50.0, 50.0]]]])
        assert layer(picture).flatten().tolist() == [0.0, 6.0]
        assert linear(picture).abs().min() > 40


@pytest.mark.parametrize(("body", "last"), [(MobileNetV1(width=0.5), 512), (MobileNetV2(), 1280), (MobileNetV2(last=False), 320)])
def test_feature_maps_have_their_stride(body: MobileNetV1 | MobileNetV2, last: int) -> None:
    """Each map has the input's size divided by its stride, rounded up, also for odd inputs."""
    with torch.inference_mode():
        found = body(torch.zeros(1, 3, 97, 64))
    for stride in (4, 8, 16, 32):
        assert found[stride].shape == (1, body.channels[stride], -(-97 // stride), 64 // stride)
    assert found[32].shape[1] == last


def test_number_of_weights_is_the_published_one() -> None:
    """MobileNetV2 has 2.2 million, MobileNetV1 at half width 0.8 million weights without their classifiers."""
    counts = [sum(tensor.numel() for tensor in body.parameters()) for body in (MobileNetV2(), MobileNetV1(width=0.5))]
    assert counts == [pytest.approx(2.2e6, rel=0.03), pytest.approx(0.82e6, rel=0.03)]


@pytest.mark.parametrize(
    ("name", "arguments", "shape"),
    [
        ("mobilenet_v1_classifier", {"outputs": 3, "width": 0.25, "taps": [4, 32]}, (2, 3)),
        ("mobilenet_v2_classifier", {"outputs": 2}, (2, 2)),
        ("mobilenet_v2_segmenter", {"outputs": 1, "channels": 8}, (2, 1, 64, 96)),
    ],
)
def test_every_registered_architecture_runs(name: str, arguments: dict[str, object], shape: tuple[int, ...]) -> None:
    """The registry holds what the manifests may name, and each entry gives outputs of its documented shape."""
    assert name in ARCHITECTURES
    assert len(ARCHITECTURES) == 3
    with torch.inference_mode():
        assert tuple(build(name, arguments).eval()(torch.zeros(2, 3, 64, 96)).shape) == shape


def test_unknown_architecture_and_argument_are_refused() -> None:
    """A name or argument that does not exist raises instead of being ignored."""
    with pytest.raises(KeyError):
        build("resnet", {})
    with pytest.raises(TypeError):
        build("mobilenet_v2_classifier", {"outputs": 2, "depth": 5})
