"""Graphs in 8 bits, by what costs the least accuracy.

On an efficientnet_lite0 and an all-MiniLM-L6-v2 that were trained for 160 steps on emoji, mean cosine of the embeddings
in 8 bits to those in 32 (1,558 images, 400 texts):

text: weights by channel, activations at run time                                0.991
    weights signed and by tensor                                                 0.961
image: weights alone                                                             0.997
    calibrated; the first convolution and depthwise ones left in 32 bits         0.990
    calibrated; only the first one left                                          0.943
    calibrated with the clipping after convolutions, only the first one left     0.975
    activations at run time                                                      0.828 (and 3 to 6 times as slow)
"""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mm.models.onnx import WEIGHTS_ONLY

LEAST = 512  # numbers; smaller tensors stay as they are
CALIBRATION_BATCH = 16
KINDS = {
    "dynamic": "weights of linear layers and embeddings in 8 bits, activations too, in ranges found at run time",
    "static": "weights and activations of convolutions in 8 bits, in ranges found on images; the first convolution and "
    "depthwise ones in 32",
    WEIGHTS_ONLY: "weights in 8 bits, unpacked to compute in 32: smaller, not faster",
}


def quantize(source: Path, target: Path, pixels: Tensor | None = None) -> str:
    """Write a graph in 8 bits, and return its kind, a key of `KINDS`.

    pixels: uint8 (N, 3, S, S) to calibrate a convolutional tower on; None: only its weights get 8 bits.
    """
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with TemporaryDirectory() as temporary:
        prepared = Path(temporary) / "prepared.onnx"
        big = source.with_name(f"{source.name}.data").exists()
        quant_pre_process(source, prepared, skip_symbolic_shape=True, save_as_external_data=big)
        graph = onnx.load(prepared)
        if not _is_convolutional(graph):
            _dynamic(prepared, target, big)
            return "dynamic"
        if pixels is None:
            _weights_only(graph)
            onnx.save(graph, target, save_as_external_data=big, location=f"{target.name}.data")
            return WEIGHTS_ONLY
        _static(prepared, target, graph, pixels, big)
        return "static"


class _Weights(NamedTuple):
    """A layer whose weights are constants."""

    node: Any
    tensor: Any
    channels: int
    """The axis of the output channels."""


def _layers(graph: Any) -> Iterator[_Weights]:
    constants = {one.name: one for one in graph.graph.initializer}
    for node in graph.graph.node:
        if node.op_type in ("Conv", "MatMul", "Gemm") and node.input[1] in constants:
            tensor = constants[node.input[1]]
            first = node.op_type == "Conv" or _attribute(node, "transB")
            yield _Weights(node, tensor, 0 if first else len(tensor.dims) - 1)


def _attribute(node: Any, name: str, default: int = 0) -> int:
    return next((one.i for one in node.attribute if one.name == name), default)


def _is_convolutional(graph: Any) -> bool:
    """Whether convolutions have more weights than linear layers."""
    size = {True: 0, False: 0}
    for layer in _layers(graph):
        size[layer.node.op_type == "Conv"] += int(np.prod(layer.tensor.dims))
    return size[True] > size[False]


def _dynamic(prepared: Path, target: Path, big: bool) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        prepared,
        target,
        op_types_to_quantize=["MatMul", "Gather"],
        per_channel=True,
        # processors without instructions for it overflow on signed weights
        weight_type=QuantType.QUInt8,
        use_external_data_format=big,
    )


def _static(prepared: Path, target: Path, graph: Any, pixels: Tensor, big: bool) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    convolutions = [node for node in graph.graph.node if node.op_type == "Conv"]
    kept = convolutions[:1] + [node for node in convolutions if _attribute(node, "group", 1) > 1]
    quantize_static(
        prepared,
        target,
        _images(pixels),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Conv"],
        nodes_to_exclude=[node.name for node in kept],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        reduce_range=True,  # 7 bits: without it processors that lack instructions for it overflow
        use_external_data_format=big,
    )


def _images(pixels: Tensor) -> Any:
    """What onnxruntime calibrates on: a batch at a time, then None."""
    from onnxruntime.quantization import CalibrationDataReader

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(pixels.split(CALIBRATION_BATCH))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"pixels": batch.numpy()}

    return Images()


def _weights_only(graph: Any) -> None:
    """Put weights of 8 bits, with a factor for each output channel, in place of those of layers."""
    from onnx import helper, numpy_helper

    done: set[str] = set()
    for layer in list(_layers(graph)):
        name = layer.tensor.name
        if name in done or np.prod(layer.tensor.dims) < LEAST:
            continue
        done.add(name)
        weights = torch.from_numpy(np.array(numpy_helper.to_array(layer.tensor)))
        others = [axis for axis in range(weights.ndim) if axis != layer.channels]
        factors = weights.abs().amax(others, keepdim=True).clamp(min=1e-12) / 127
        small = (weights / factors).round().to(torch.int8)
        parts = {f"{name}.int8": small, f"{name}.factors": factors.flatten()}
        graph.graph.initializer.remove(layer.tensor)
        graph.graph.initializer.extend(
            numpy_helper.from_array(one.numpy(), key) for key, one in parts.items()
        )
        graph.graph.node.insert(
            0, helper.make_node("DequantizeLinear", list(parts), [name], axis=layer.channels)
        )
