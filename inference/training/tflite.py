"""Read the weights of a quantised MobileNet (tflite flatbuffer) as exact floating point tensors.

Needs the development packages ``flatbuffers`` and ``tflite``. ``(q - zero_point) * scale`` per tensor or per channel.

Run ``python -m inference.training.tflite`` to see the converted networks name a few ordinary pictures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tflite
import torch
from numpy.typing import NDArray
from torch import nn

from inference.networks import Convolution, MobileNetV1, MobileNetV2

_TYPES = {tflite.TensorType.UINT8: np.uint8, tflite.TensorType.INT8: np.int8, tflite.TensorType.INT32: np.int32}


def _dequantised(model: Any, graph: Any, index: int) -> NDArray[np.float64]:
    """Give the constant tensor `index` as float64, in the layout of the file."""
    tensor = graph.Tensors(index)
    raw = model.Buffers(tensor.Buffer()).DataAsNumpy()
    values = np.frombuffer(raw.tobytes(), _TYPES[tensor.Type()]).reshape(tensor.ShapeAsNumpy()).astype(np.float64)
    quantisation = tensor.Quantization()
    scale = np.asarray(quantisation.ScaleAsNumpy(), np.float64)
    zero = np.asarray(quantisation.ZeroPointAsNumpy(), np.float64)
    if scale.size > 1:
        shape = [1] * values.ndim
        shape[quantisation.QuantizedDimension()] = scale.size
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    return (values - zero) * scale


def convolutions(path: Path) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Give (weight, bias) of every convolution in the order of execution, in torch's layout (out, in / groups, rows, columns)."""
    model = tflite.Model.GetRootAs(path.read_bytes(), 0)
    graph = model.Subgraphs(0)
    found = []
    for number in range(graph.OperatorsLength()):
        operator = graph.Operators(number)
        code = model.OperatorCodes(operator.OpcodeIndex())
        kind = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
        if kind not in (tflite.BuiltinOperator.CONV_2D, tflite.BuiltinOperator.DEPTHWISE_CONV_2D):
            continue
        weight = _dequantised(model, graph, operator.Inputs(1))
        # tflite: convolution (out, rows, columns, in); depthwise (1, rows, columns, out)
        weight = weight.transpose(3, 0, 1, 2) if kind == tflite.BuiltinOperator.DEPTHWISE_CONV_2D else weight.transpose(0, 3, 1, 2)
        found.append((np.ascontiguousarray(weight), _dequantised(model, graph, operator.Inputs(2))))
    return found


def load_body(body: MobileNetV1 | MobileNetV2, path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill `body` from the file, layer by layer; give (weight, bias) of the ImageNet classifier that follows it.

    Raises
    ------
    ValueError
        The file is of another architecture.
    """
    source = convolutions(path)
    targets = [module for module in body.modules() if isinstance(module, Convolution)]
    if isinstance(body, MobileNetV2) and body.last is None:
        source = [*source[:-2], source[-1]]
    if len(source) != len(targets) + 1:
        raise ValueError(
            f"{path.name} has {len(source)} convolutions, the network needs {len(targets) + 1}; take the file of the same architecture"
        )
    with torch.no_grad():
        for (weight, bias), target in zip(source, targets, strict=False):
            if weight.shape != tuple(target.weight.shape) or target.bias is None:
                raise ValueError(f"{path.name}: a layer is {weight.shape}, the network has {tuple(target.weight.shape)}")
            target.weight.copy_(torch.from_numpy(weight))
            target.bias.copy_(torch.from_numpy(bias))
    weight, bias = source[-1]
    return torch.from_numpy(weight[:, :, 0, 0]).float(), torch.from_numpy(bias).float()


def _show(data: Path) -> None:
    import cv2  # noqa: PLC0415 - only this demonstration reads picture files

    names = (data / "backbones" / "imagenet_labels.txt").read_text().splitlines()
    for body, size, file in (
        (MobileNetV1(width=0.5), 160, "mobilenet_v1_0.5_160_quant.tflite"),
        (MobileNetV2(), 224, "tf2_mobilenet_v2_1.0_224_ptq.tflite"),
    ):
        weight, bias = load_body(body, data / "backbones" / file)
        for path in sorted((data / "non_skin").glob("coral_*.jpg")):
            picture = cv2.resize(np.asarray(cv2.imread(str(path)))[:, :, ::-1], (size, size), interpolation=cv2.INTER_AREA)
            batch = torch.from_numpy(picture.transpose(2, 0, 1).copy()).float()[None] / 127.5 - 1
            with torch.inference_mode():
                scores = nn.functional.linear(body(batch)[32].mean(dim=(2, 3)), weight, bias).softmax(1)[0]
            best = scores.argsort(descending=True)[:3]
            print(file, path.name, [f"{names[i]} {scores[i]:.2f}" for i in best])  # noqa: T201


if __name__ == "__main__":
    torch.set_num_threads(2)
    _show(Path("../shared/data/derm"))
