"""int8 for ONNX Runtime: what of a detector's graph is quantised, with what ranges, and how much each layer costs.

What is written is "QDQ": pairs of QuantizeLinear and DequantizeLinear around the operators, which runtimes fuse with
them. Activations have 8 bits without a sign, for each tensor; weights 7 bits with a sign, for each output channel. The
eighth bit is given up for processors without VNNI (AVX2): there sums of two products of 8 by 8 bits overflow, on bccd
0.012 AP with the very same file that loses 0.0003 with 7 (see docs/export.md).
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

Frames = tuple[np.ndarray, np.ndarray]
"""images uint8 [N, H, W, 3], sizes int64 [N, 2]"""

LAYERS = frozenset({"Conv", "Gemm", "MatMul"})
BETWEEN = frozenset({"Concat", "Slice", "Add", "Mul", "Relu", "Clip", "Resize", "MaxPool", "GlobalAveragePool"})
"""What ONNX Runtime computes in int8 between layers; other operators get and give float32."""
NOT_FOLLOWED = frozenset({"Shape", "Size", "RoiAlign"})
"""What follows depends on sizes, not on values; or, behind RoiAlign, may be empty for a level, and has no range."""
ANSWERS = frozenset({"TopK", "NonMaxSuppression", "Softmax", "Exp"})
"""A layer whose output gets here before any other layer gives answers, not features."""


class OnnxQuantizer:
    """A float32 ONNX detector and the ranges of what flows in it.

    Quantised are the layers and what lies between them. Left in float32 are the normalisation and the first layer
    (behind a quantised one ONNX Runtime normalises in a layout that takes it several times as long), the layers that
    give the answers (their outputs need more than 256 steps: equal scores have no order), anchors, decoding and NMS.

    Args:
        model: an `onnx.ModelProto` of tools/export.py, either form.
        frames: calibration images in their frames.
        threads: of ONNX Runtime.

    Attributes:
        layers: names of the layers that can be quantised, in the order of the graph.
    """

    def __init__(self, model: Any, frames: Sequence[Frames], threads: int) -> None:
        import onnx

        self.model = onnx.shape_inference.infer_shapes(model, data_prop=True)
        self.frames, self.threads = frames, threads
        self.units, self.answers = find_units(self.model.graph)
        self.layers = list(self.units)

    def quantized(self, kept: Collection[str] = ()) -> Any:
        """The model with all its layers in int8 but those `kept` in float32."""
        return self._quantize([layer for layer in self.layers if layer not in set(kept)])

    def errors(self, images: int = 8) -> dict[str, float]:
        """Of each layer, how much the answers change when it alone is quantised: the root of the mean squared
        difference by that of the answers' own spread, the mean over the layers that answer."""
        frames = self.frames[:: max(1, len(self.frames) // images)]
        expected = [self._answers(self.model, frame) for frame in frames]
        spread = [np.concatenate([answers[i].ravel() for answers in expected]).std() for i in range(len(expected[0]))]
        found = {}
        bar = progress_bar(self.layers, "layers' errors")
        for layer in bar:
            session = self._session(self._with_outputs(self._quantize([layer]), self.answers))
            squares = [
                [np.square(a - b).mean() for a, b in zip(session.run(self.answers, _feed(frame)), known, strict=True)]
                for frame, known in zip(frames, expected, strict=True)
            ]
            found[layer] = float(np.mean(np.sqrt(np.mean(squares, axis=0)) / spread))
        return found

    def _quantize(self, layers: Iterable[str]) -> Any:
        from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType
        from onnxruntime.quantization.calibrate import TensorsData

        nodes = [name for layer in layers for name in self.units[layer]]
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
            op_types_to_quantize=[*LAYERS, *BETWEEN],
            extra_options={},
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
        return quantizer.model.model

    @cached_property
    def ranges(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Of each tensor that may be quantised the smallest and the largest value in all calibration images."""
        import onnx

        inner = {name for unit in self.units.values() for name in unit}
        nodes = [n for n in self.model.graph.node if n.name in inner and n.op_type in LAYERS | BETWEEN]
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
        bar = progress_bar(self.frames, "calibration")
        values = np.array([session.run(outputs, _feed(frame)) for frame in bar], np.float32)
        lows, highs = values[:, ::2].min(axis=0), values[:, 1::2].max(axis=0)
        return {name: (low, high) for name, low, high in zip(tensors, lows, highs, strict=True)}

    def _answers(self, model: Any, frame: Frames) -> list[np.ndarray]:
        return self._session(self._with_outputs(model, self.answers)).run(self.answers, _feed(frame))

    def _session(self, model: Any) -> Any:
        return open_session(model.SerializeToString(), torch.device("cpu"), self.threads)

    @staticmethod
    def _with_outputs(model: Any, names: Sequence[str]) -> Any:
        """A copy that gives these tensors alone."""
        import onnx

        model = copy.deepcopy(model)
        del model.graph.output[:]
        model.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in names)
        return model


def find_units(graph: Any) -> tuple[dict[str, list[str]], list[str]]:
    """What of an ONNX graph is quantised together, and which tensors are its answers.

    Returns:
        Of each layer between the first one and the answers, in the graph's order, the names of its node and of those
        that follow before the next layer; and the outputs of the layers that answer.
    """
    weights = {weight.name for weight in graph.initializer}
    consumers = defaultdict(list)
    for number, node in enumerate(graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
        for tensor in node.input:
            consumers[tensor].append(node)
    outputs = {output.name for output in graph.output}
    units: dict[str, list[str]] = {}
    answers: list[str] = []
    # Of each tensor that is made of features: the last layer before it.
    owner: dict[str, str] = {}
    for node in graph.node:
        before = [owner[tensor] for tensor in node.input if tensor in owner]
        if _is_layer(node, weights):
            if _gives_answers(node, consumers, outputs, weights):
                answers += node.output[:1]
                continue
            units[node.name] = [node.name]
            last = node.name
        elif not before or node.op_type in NOT_FOLLOWED:
            continue
        else:
            last = max(before, key=list(units).index)
            units[last].append(node.name)
        owner.update((tensor, last) for tensor in node.output)
    units.pop(next(iter(units)), None)
    return units, answers


def _is_layer(node: Any, weights: Collection[str]) -> bool:
    return node.op_type in LAYERS and node.input[1] in weights


def _gives_answers(node: Any, consumers: Any, outputs: Collection[str], weights: Collection[str]) -> bool:
    waiting, seen = list(node.output), set(node.output)
    while waiting:
        tensor = waiting.pop()
        if tensor in outputs:
            return True
        for consumer in consumers[tensor]:
            if consumer.op_type in ANSWERS:
                return True
            if consumer.op_type not in NOT_FOLLOWED and not _is_layer(consumer, weights):
                waiting += [name for name in consumer.output if name not in seen]
                seen.update(consumer.output)
    return False


def _floats(model: Any) -> set[str]:
    """Tensors known to be float32."""
    import onnx

    known = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    return {value.name for value in known if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}


def _feed(frame: Frames) -> dict[str, np.ndarray]:
    return {"images": frame[0], "sizes": frame[1]}


def store_fp16(model: Any) -> Any:
    """A copy whose weights are kept as float16, each with a Cast to float32 behind it.

    Runtimes compute the Casts once, when they load the file, and everything else as before: ONNX Runtime has hardly a
    float16 operator for CPUs, and would turn numbers back and forth at every one of them.
    """
    import onnx

    model = copy.deepcopy(model)
    casts = []
    for weight in model.graph.initializer:
        values = onnx.numpy_helper.to_array(weight)
        # Small ones, anchors among them, weigh nothing and may need their digits.
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
