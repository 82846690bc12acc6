"""ONNX: exports, simplifies, checks and writes a detector with its metadata."""

import contextlib
import dataclasses
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detection.core.errors import UserError
from detection.core.extras import require
from detection.core.outputs import write_output
from detection.export.channel_blocks import map_channels, pad_channels_to_blocks
from detection.export.concats import remove_concats
from detection.export.detector_ops import nms_mask
from detection.export.spec import ExportSpec
from detection.runtime.metadata import METADATA_KEY, Metadata

OPSET = 17
"""Supported by ONNX Runtime 1.12 (2022), its web build, OpenVINO 2022.3 and TensorRT 8.6."""


class OnnxNmsMask(torch.autograd.Function):
    """`detection.export.detector_ops.nms_mask` as an ONNX NonMaxSuppression whose result is scattered into a mask."""

    @staticmethod
    def forward(
        ctx: Any, boxes: Tensor, scores: Tensor, nms_threshold: float, score_threshold: float, max_output: int
    ) -> Tensor:
        return nms_mask(boxes, scores, nms_threshold, score_threshold, max_output)

    @staticmethod
    def symbolic(g: Any, boxes: Any, scores: Any, nms_threshold: float, score_threshold: float, max_output: int) -> Any:
        def constant(value: Any, dtype: torch.dtype) -> Any:
            return g.op("Constant", value_t=torch.tensor(value, dtype=dtype))

        # Rows of (image, group, index).
        selected = g.op(
            "NonMaxSuppression",
            boxes,
            scores,
            constant([max_output], torch.int64),
            constant([nms_threshold], torch.float32),
            constant([score_threshold], torch.float32),
        )
        count = g.op("Shape", selected, start_i=0, end_i=1)
        ones = g.op("ConstantOfShape", count, value_t=torch.ones(1))
        nothing = g.op("ConstantOfShape", g.op("Shape", scores), value_t=torch.zeros(1))
        return g.op("ScatterND", nothing, selected, ones).setType(scores.type())


def export_onnx(spec: ExportSpec, path: Path) -> list[str]:
    """Write a detector as ONNX.

    Returns:
        One line that describes the file.

    Raises:
        UserError: the libraries are not installed, ONNX does not support the network, or the path cannot be written to.
    """
    require("ONNX export", "onnx", "onnxslim")
    import onnx
    import onnxslim

    model = onnxslim.slim(canonicalize(onnx.load_from_string(translate(spec))))
    model = pad_channels_to_blocks(onnx.shape_inference.infer_shapes(model))
    model = remove_concats(model)
    del model.graph.value_info[:]
    _set_output_shapes(model, spec.metadata)
    versions = {**spec.metadata.versions, "onnx": onnx.__version__, "opset": str(OPSET)}
    metadata = dataclasses.replace(spec.metadata, versions=versions)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {METADATA_KEY: metadata.to_json()})
    model.producer_name = "ghostnet-detection"
    try:
        onnx.checker.check_model(model, full_check=True)
    except onnx.checker.ValidationError as error:
        raise UserError(f"the ONNX file would be invalid: {str(error).splitlines()[0]}") from error
    data = model.SerializeToString()
    write_output(path, lambda file: file.write(data))
    return [f"{path}  {len(data) / 1e6:.1f} MB, {metadata.form}, ONNX opset {OPSET}, {len(model.graph.node)} operators"]


def translate(spec: ExportSpec) -> bytes:
    """Export the network with PyTorch's exporter -> a serialized ONNX model.

    Raises:
        UserError: ONNX does not support an operation of the network.
    """
    metadata = spec.metadata
    if hasattr(spec.network, "nms"):
        spec.network.nms = OnnxNmsMask.apply
    sides = {} if metadata.size else {1: "height", 2: "width"}
    batch = {} if metadata.batch else {0: "batch"}
    axes = {"images": {**batch, **sides}, "sizes": batch, **{name: dict(batch) for name in spec.outputs}}
    if metadata.form == "raw" and not metadata.size:
        for name in spec.outputs:
            axes[name][1] = "anchors"
    buffer: Any = io.BytesIO()
    try:
        with torch.no_grad(), _quiet_exporter():
            torch.onnx.export(
                spec.network,
                spec.example,
                buffer,
                input_names=["images", "sizes"],
                output_names=list(spec.outputs),
                dynamic_axes={name: named for name, named in axes.items() if named},
                opset_version=OPSET,
                dynamo=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise UserError(f"the network cannot be exported to ONNX: {str(error).splitlines()[0]}") from error
    return buffer.getvalue()


def canonicalize(model: Any) -> Any:
    """Remove slices that take all channels (from ghost modules), and turn means over a map into global pooling.

    Simplifiers do not do this, and these operators keep runtimes from using their own memory layout.
    """
    import onnx

    model = onnx.shape_inference.infer_shapes(model)
    graph = model.graph
    channels = map_channels(graph)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    constants |= {n.output[0]: n.attribute[0].t for n in graph.node if n.op_type == "Constant"}

    def constant(name: str) -> list[int] | None:
        return onnx.numpy_helper.to_array(constants[name]).tolist() if name in constants else None

    aliases: dict[str, str] = {}
    nodes = []
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = aliases.get(name, name)
        attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type == "Slice":
            starts, ends, axes, *steps = (constant(name) for name in node.input[1:])
            whole = channels.get(node.input[0], 0)
            if (starts, axes, steps or [[1]]) == ([0], [1], [[1]]) and ends and 0 < whole <= ends[0]:
                aliases[node.output[0]] = node.input[0]
                continue
        if node.op_type == "ReduceMean" and attributes.get("keepdims", 1) and node.input[0] in channels:
            if sorted(axis % 4 for axis in attributes.get("axes", ())) == [2, 3]:
                node = onnx.helper.make_node("GlobalAveragePool", node.input, node.output, name=node.name)
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def _set_output_shapes(model: Any, metadata: Metadata) -> None:
    """Set the output dimensions that the exporter cannot infer."""
    most, classes = metadata.max_detections, len(metadata.names)
    known = {"boxes": (None, most, 4), "labels": (None, most), "scores": (None, most)}
    known |= {"cls_logits": (None, None, classes), "bbox_regression": (None, None, 4)}
    for value in model.graph.output:
        for dim, size in zip(value.type.tensor_type.shape.dim, known[value.name], strict=True):
            if size is not None:
                dim.dim_value = size


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence the exporter's warnings. Problems raise errors or show in the comparison with PyTorch."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
