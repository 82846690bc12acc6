"""int8 for ONNX Runtime: selects and quantizes the layers of a detector, and measures the error of each layer.

The files have QDQ format: pairs of QuantizeLinear and DequantizeLinear around the operators, which runtimes fuse.
Activations are uint8, per tensor; weights are int8 with 7 bits, per output channel. The eighth bit is not used because
on processors without VNNI (AVX2) sums of two products of 8 by 8 bits overflow: on bccd that costs 0.012 AP, and with 7
bits 0.0003 (see docs/export.md).
"""

import copy
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from detection.core.progress import progress_bar
from detection.runtime.onnx import open_session

CanvasBatch = tuple[np.ndarray, np.ndarray]
"""Inputs of an exported detector: images uint8 [N, H, W, 3] on a canvas, and their sizes int64 [N, 2]."""

LAYER_OPS = frozenset({"Conv", "Gemm", "MatMul"})
QUANTIZABLE_OPS = frozenset({"Concat", "Slice", "Add", "Mul", "Relu", "Clip", "Resize", "MaxPool", "GlobalAveragePool"})
"""Operators between layers that ONNX Runtime computes in int8; the others have float32 inputs and outputs."""
IGNORED_OPS = frozenset({"Shape", "Size", "RoiAlign"})
"""Operators at which the search for layers stops: the rest depends on sizes, not on values; after RoiAlign a level may
be empty and has no range."""
PREDICTION_OPS = frozenset({"TopK", "NonMaxSuppression", "Softmax", "Exp"})
"""A layer whose output reaches one of these before any other layer is a prediction layer."""


class OnnxQuantizer:
    """Quantizes a float32 ONNX detector.

    The layers and the operators between them are quantized. These stay in float32: the normalization and the first
    layer (otherwise ONNX Runtime normalizes in a memory layout that is several times as slow), the prediction layers
    (their outputs need more than 256 steps, because equal scores have no order), anchors, decoding and NMS.

    Args:
        model: an `onnx.ModelProto` of an exported detector, of either form.
        batches: calibration images.
        threads: of ONNX Runtime.

    Attributes:
        layers: names of the layers that can be quantized, in the order of the graph.
    """

    def __init__(self, model: Any, batches: Sequence[CanvasBatch], threads: int) -> None:
        import onnx

        self.model = onnx.shape_inference.infer_shapes(model, data_prop=True)
        self.batches, self.threads = batches, threads
        self.layer_groups, self.predictions = find_layer_groups(self.model.graph)
        self.layers = list(self.layer_groups)

    def quantized(self, float32_layers: Collection[str] = ()) -> Any:
        """The model with all layers in int8 except `float32_layers`."""
        return self._quantize([layer for layer in self.layers if layer not in set(float32_layers)])

    def errors(self, images: int = 8) -> dict[str, float]:
        """The error of each layer: the RMS difference of the predictions if only that layer is quantized, divided by
        their standard deviation, averaged over the prediction layers."""
        batches = self.batches[:: max(1, len(self.batches) // images)]
        expected = [self._predictions(self.model, batch) for batch in batches]
        deviations = [np.concatenate([x.ravel() for x in outputs]).std() for outputs in zip(*expected, strict=True)]
        errors = {}
        bar = progress_bar(self.layers, "layers' errors")
        for layer in bar:
            session = self._session(self._with_outputs(self._quantize([layer]), self.predictions))
            found = [session.run(self.predictions, _feed(batch)) for batch in batches]
            squares = [
                [np.square(a - b).mean() for a, b in zip(*outputs, strict=True)]
                for outputs in zip(found, expected, strict=True)
            ]
            errors[layer] = float(np.mean(np.sqrt(np.mean(squares, axis=0)) / deviations))
        return errors

    def _quantize(self, layers: Iterable[str]) -> Any:
        from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType
        from onnxruntime.quantization.calibrate import TensorsData

        nodes = [name for layer in layers for name in self.layer_groups[layer]]
        model = copy.deepcopy(self.model)
        quantizer = QDQQuantizer(
            model,
            per_channel=True,
            reduce_range=True,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=TensorsData(CalibrationMethod.MinMax, self.ranges),
            nodes_to_quantize=nodes,
            nodes_to_exclude=[],
            op_types_to_quantize=[*LAYER_OPS, *QUANTIZABLE_OPS],
            extra_options={},
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
        return quantizer.model.model

    @cached_property
    def ranges(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The smallest and the largest value of each tensor that may be quantized, over all calibration images."""
        import onnx

        inner = {name for group in self.layer_groups.values() for name in group}
        nodes = [n for n in self.model.graph.node if n.name in inner and n.op_type in LAYER_OPS | QUANTIZABLE_OPS]
        weights = {weight.name for weight in self.model.graph.initializer}
        tensors = sorted(
            {name for node in nodes for name in (*node.input, *node.output)} & _floats(self.model) - weights
        )
        model = copy.deepcopy(self.model)
        outputs = []
        for tensor in tensors:
            for operator in ("ReduceMin", "ReduceMax"):
                outputs.append(f"{tensor}/{operator}")
                model.graph.node.append(onnx.helper.make_node(operator, [tensor], [outputs[-1]], keepdims=0))
        session = self._session(self._with_outputs(model, outputs))
        bar = progress_bar(self.batches, "calibration")
        values = np.array([session.run(outputs, _feed(batch)) for batch in bar], np.float32)
        lows, highs = values[:, ::2].min(axis=0), values[:, 1::2].max(axis=0)
        return {name: (low, high) for name, low, high in zip(tensors, lows, highs, strict=True)}

    def _predictions(self, model: Any, batch: CanvasBatch) -> list[np.ndarray]:
        return self._session(self._with_outputs(model, self.predictions)).run(self.predictions, _feed(batch))

    def _session(self, model: Any) -> Any:
        return open_session(model.SerializeToString(), torch.device("cpu"), self.threads)

    @staticmethod
    def _with_outputs(model: Any, names: Sequence[str]) -> Any:
        """A copy whose outputs are these tensors."""
        import onnx

        model = copy.deepcopy(model)
        del model.graph.output[:]
        model.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in names)
        return model


def find_layer_groups(graph: Any) -> tuple[dict[str, list[str]], list[str]]:
    """Find the layers of an ONNX graph, the operators that are quantized with each of them, and the predictions.

    Returns:
        Layer -> names of its node and of the operators before the next layer, in the order of the graph, without the
        first layer and the prediction layers; and the outputs of the prediction layers.
    """
    weights = {weight.name for weight in graph.initializer}
    consumers = defaultdict(list)
    for number, node in enumerate(graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
        for tensor in node.input:
            consumers[tensor].append(node)
    outputs = {output.name for output in graph.output}
    layer_groups: dict[str, list[str]] = {}
    predictions: list[str] = []
    # Tensor -> the last layer before it.
    owner: dict[str, str] = {}
    for node in graph.node:
        before = [owner[tensor] for tensor in node.input if tensor in owner]
        if _is_layer(node, weights):
            if _is_prediction_layer(node, consumers, outputs, weights):
                predictions += node.output[:1]
                continue
            layer_groups[node.name] = [node.name]
            last = node.name
        elif not before or node.op_type in IGNORED_OPS:
            continue
        else:
            last = max(before, key=list(layer_groups).index)
            layer_groups[last].append(node.name)
        owner.update((tensor, last) for tensor in node.output)
    layer_groups.pop(next(iter(layer_groups)), None)
    return layer_groups, predictions


def _is_layer(node: Any, weights: Collection[str]) -> bool:
    return node.op_type in LAYER_OPS and node.input[1] in weights


def _is_prediction_layer(node: Any, consumers: Any, outputs: Collection[str], weights: Collection[str]) -> bool:
    pending, seen = list(node.output), set(node.output)
    while pending:
        tensor = pending.pop()
        if tensor in outputs:
            return True
        for consumer in consumers[tensor]:
            if consumer.op_type in PREDICTION_OPS:
                return True
            if consumer.op_type not in IGNORED_OPS and not _is_layer(consumer, weights):
                pending += [name for name in consumer.output if name not in seen]
                seen.update(consumer.output)
    return False


def _floats(model: Any) -> set[str]:
    """Names of the float32 tensors."""
    import onnx

    known = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    return {value.name for value in known if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}


def _feed(batch: CanvasBatch) -> dict[str, np.ndarray]:
    return {"images": batch[0], "sizes": batch[1]}


def store_weights_fp16(model: Any) -> Any:
    """A copy whose weights are stored as float16, each followed by a Cast to float32.

    Runtimes compute the Casts once when they load the file; the computation stays in float32. ONNX Runtime has hardly
    any float16 operators for CPUs and would otherwise convert values around each of them.
    """
    import onnx

    model = copy.deepcopy(model)
    casts = []
    for weight in model.graph.initializer:
        values = onnx.numpy_helper.to_array(weight)
        # Small tensors, like anchors, save nothing and may need their precision.
        if values.dtype != np.float32 or values.size < 256:
            continue
        half = f"{weight.name}/float16"
        casts.append(onnx.helper.make_node("Cast", [half], [weight.name], f"{half}/Cast", to=onnx.TensorProto.FLOAT))
        limit = np.finfo(np.float16).max
        weight.CopyFrom(onnx.numpy_helper.from_array(np.clip(values, -limit, limit).astype(np.float16), half))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model
