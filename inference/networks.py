"""The network architectures a bundle may name, in plain torch.

Batch normalisation is folded: every convolution carries a bias and nothing else, so that weights converted from a
folded, quantised model load exactly. Padding is TensorFlow's "SAME" (asymmetric at stride 2), activation is ReLU6.

References
----------
Howard et al., "MobileNets", arXiv:1704.04861; Sandler et al., "MobileNetV2", arXiv:1801.04381;
Lin et al., "Feature Pyramid Networks", arXiv:1612.03144.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

Features = dict[int, Tensor]
"""Feature maps by stride (4, 8, 16, 32)."""

_V1_LAYERS: Final = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    (512, 1),
    (512, 1),
    (512, 1),
    (512, 1),
    (512, 1),
    (1024, 2),
    (1024, 1),
)
"""MobileNetV1: (channels at width 1, stride) of each depthwise-separable layer, arXiv:1704.04861 Table 1."""

_V2_STAGES: Final = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""MobileNetV2: (expansion, channels, blocks, stride of the first block) of each stage, arXiv:1801.04381 Table 2."""


class Convolution(nn.Conv2d):
    """Convolution with bias, TensorFlow "SAME" padding and, unless `linear`, ReLU6."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, *, groups: int = 1, linear: bool = False) -> None:
        super().__init__(inputs, outputs, kernel, stride, padding=(kernel - 1) // 2 if stride == 1 else 0, groups=groups)
        self._linear = linear

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        """Convolve; at stride 2 the odd row and column of padding go to the bottom and the right."""
        if self.stride[0] > 1:
            top, bottom = _same_padding(input.shape[2], self.kernel_size[0], self.stride[0])
            left, right = _same_padding(input.shape[3], self.kernel_size[1], self.stride[1])
            input = functional.pad(input, (left, right, top, bottom))  # noqa: A001
        output = super().forward(input)
        return output if self._linear else functional.relu6(output)


def _same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class _Separable(nn.Module):
    """Depthwise 3x3, then pointwise."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.depthwise = Convolution(inputs, inputs, 3, stride, groups=inputs)
        self.pointwise = Convolution(inputs, outputs)

    def forward(self, features: Tensor) -> Tensor:
        pointwise: Tensor = self.pointwise(self.depthwise(features))
        return pointwise


class _InvertedResidual(nn.Module):
    """Expand, depthwise 3x3, project linearly; the input is added when the shape allows it."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = Convolution(inputs, hidden) if expansion > 1 else None
        self.depthwise = Convolution(hidden, hidden, 3, stride, groups=hidden)
        self.project = Convolution(hidden, outputs, linear=True)
        self._residual = stride == 1 and inputs == outputs

    def forward(self, features: Tensor) -> Tensor:
        hidden = features if self.expand is None else self.expand(features)
        projected: Tensor = self.project(self.depthwise(hidden))
        return features + projected if self._residual else projected


class MobileNetV1(nn.Module):
    """The body of MobileNetV1: ``forward`` gives the feature maps at strides 4, 8, 16 and 32."""

    def __init__(self, *, width: float = 1.0) -> None:
        super().__init__()
        channels = int(32 * width)
        self.stem = Convolution(3, channels, 3, 2)
        layers: list[nn.Module] = []
        self._strides: list[int] = []
        self.channels: dict[int, int] = {}
        stride = 2
        for outputs, step in _V1_LAYERS:
            layers.append(_Separable(channels, int(outputs * width), step))
            channels, stride = int(outputs * width), stride * step
            self._strides.append(stride)
            self.channels[stride] = channels
        self.layers = nn.ModuleList(layers)

    def forward(self, pictures: Tensor) -> Features:
        """Run over `pictures`: float, (n, 3, rows, columns), in [-1, 1]."""
        features, found = self.stem(pictures), {}
        for stride, layer in zip(self._strides, self.layers, strict=True):
            features = layer(features)
            found[stride] = features
        return found


class MobileNetV2(nn.Module):
    """The body of MobileNetV2; stride 32 is the last (1280 channel) layer when `last`, else the one before (320)."""

    def __init__(self, *, last: bool = True) -> None:
        super().__init__()
        self.stem = Convolution(3, 32, 3, 2)
        blocks: list[nn.Module] = []
        self._strides: list[int] = []
        self.channels: dict[int, int] = {}
        channels, stride = 32, 2
        for expansion, outputs, count, first in _V2_STAGES:
            for index in range(count):
                step = first if index == 0 else 1
                blocks.append(_InvertedResidual(channels, outputs, step, expansion))
                channels, stride = outputs, stride * step
                self._strides.append(stride)
                self.channels[stride] = channels
        self.blocks = nn.ModuleList(blocks)
        self.last = Convolution(channels, 1280) if last else None
        if last:
            self.channels[32] = 1280

    def forward(self, pictures: Tensor) -> Features:
        """Run over `pictures`: float, (n, 3, rows, columns), in [-1, 1]."""
        features, found = self.stem(pictures), {}
        for stride, block in zip(self._strides, self.blocks, strict=True):
            features = block(features)
            found[stride] = features
        if self.last is not None:
            found[32] = self.last(found[32])
        return found


class Classifier(nn.Module):
    """A body, its feature maps at the strides `taps` averaged and joined, one linear layer.

    ``forward`` gives raw outputs, float, (n, outputs): logits for a classification, the value for a regression.
    """

    def __init__(self, body: MobileNetV1 | MobileNetV2, *, outputs: int, taps: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__()
        self.body = body
        self._taps = tuple(taps)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(sum(body.channels[tap] for tap in self._taps), outputs)

    def forward(self, pictures: Tensor) -> Tensor:
        """Run over `pictures`: float, (n, 3, rows, columns), in [-1, 1]."""
        found = self.body(pictures)
        joined = torch.cat([found[tap].mean(dim=(2, 3)) for tap in self._taps], dim=1)
        outputs: Tensor = self.head(self.dropout(joined))
        return outputs


class Segmenter(nn.Module):
    """A body with a light feature pyramid: one logit a class and pixel, (n, outputs, rows, columns) of the input."""

    def __init__(self, body: MobileNetV2, *, outputs: int = 1, channels: int = 48) -> None:
        super().__init__()
        self.body: MobileNetV2 = body
        self.lateral = nn.ModuleDict(
            {str(stride): Convolution(count, channels, linear=True) for stride, count in body.channels.items() if stride > 2}
        )
        self.smooth = nn.ModuleDict({str(stride): _Separable(channels, channels) for stride in body.channels if 2 < stride < 32})
        self.context = Convolution(body.channels[32], channels, linear=True)
        self.output = Convolution(channels, outputs, linear=True)

    def forward(self, pictures: Tensor) -> Tensor:
        """Run over `pictures`: float, (n, 3, rows, columns), in [-1, 1]."""
        found = self.body(pictures)
        merged = self.lateral["32"](found[32]) + self.context(found[32].mean(dim=(2, 3), keepdim=True))
        for stride in (16, 8, 4):
            lateral = self.lateral[str(stride)](found[stride])
            merged = functional.interpolate(merged, size=lateral.shape[2:], mode="bilinear", align_corners=False)
            merged = self.smooth[str(stride)](functional.relu6(merged + lateral))
        return functional.interpolate(self.output(merged), size=pictures.shape[2:], mode="bilinear", align_corners=False)


def _mobilenet_v1_classifier(*, outputs: int, width: float = 0.5, taps: Sequence[int] = (32,), dropout: float = 0.0) -> nn.Module:
    return Classifier(MobileNetV1(width=width), outputs=outputs, taps=taps, dropout=dropout)


def _mobilenet_v2_classifier(*, outputs: int, taps: Sequence[int] = (32,), dropout: float = 0.0) -> nn.Module:
    return Classifier(MobileNetV2(), outputs=outputs, taps=taps, dropout=dropout)


def _mobilenet_v2_segmenter(*, outputs: int = 1, channels: int = 48) -> nn.Module:
    return Segmenter(MobileNetV2(last=False), outputs=outputs, channels=channels)


ARCHITECTURES: Final[Mapping[str, Callable[..., nn.Module]]] = MappingProxyType(
    {
        "mobilenet_v1_classifier": _mobilenet_v1_classifier,
        "mobilenet_v2_classifier": _mobilenet_v2_classifier,
        "mobilenet_v2_segmenter": _mobilenet_v2_segmenter,
    }
)
"""What a manifest's ``architecture.name`` may be; ``architecture.arguments`` are the keyword arguments."""


def build(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Make the network `name` with untrained weights.

    Raises
    ------
    KeyError
        No such architecture.
    TypeError
        An argument the architecture does not take, or one it needs is missing.
    """
    return ARCHITECTURES[name](**arguments)
