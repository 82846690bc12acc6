"""Pads the channels of feature maps to whole blocks, so that ONNX Runtime can keep its blocked memory layout.

CPUs convolve fastest with maps in blocks of 8 channels. ONNX Runtime leaves that layout for a concatenation whose parts
end within a block (12, 20 or 36 channels, common in GhostNet) and returns to it afterwards; depthwise convolutions of
such widths run channel by channel. Here such maps get channels of zeros up to the next block, and the weights are
padded to match, so the outputs do not change. The padding costs nothing, because whole blocks are computed anyway.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

BLOCK = 8
"""Block size of ONNX Runtime with AVX2. With AVX-512 it is 16, which fits fewer widths, but padding to 16 would double
the work for GhostNet's finest maps on other processors."""
POINTWISE_OPS = {"Relu", "LeakyRelu", "Clip", "HardSigmoid", "HardSwish", "Sigmoid", "Tanh", "Identity"}
POOLING_OPS = {"GlobalAveragePool", "MaxPool", "AveragePool"}

Layout = tuple[int, ...]
"""For each channel of the padded map: its index in the original map, or -1 for zeros."""


class LayoutGroups:
    """Union-find of maps that need the same layout, because a node processes them channel by channel."""

    def __init__(self, channels: dict[str, int]) -> None:
        self.channels = channels
        self.parent = {name: name for name in channels}
        self.fixed: set[str] = set()

    def root(self, name: str) -> str:
        while self.parent[name] != name:
            self.parent[name] = self.parent[self.parent[name]]
            name = self.parent[name]
        return name

    def tie(self, names: Iterable[str]) -> None:
        """Use one layout for all of them; leave them unchanged if one is not a map or has another width."""
        names = list(names)
        maps = [name for name in names if name in self.parent]
        if len(maps) < len(names) or len({self.channels[name] for name in maps}) > 1:
            self.fix(maps)
            return
        roots = [self.root(name) for name in maps]
        for root in roots[1:]:
            self.parent[root] = roots[0]
        if any(root in self.fixed for root in roots):
            self.fixed.add(roots[0])

    def fix(self, names: Iterable[str]) -> bool:
        """Leave their layouts unchanged. Returns whether this changes any group."""
        roots = {self.root(name) for name in names if name in self.parent}
        changed = roots - self.fixed
        self.fixed |= roots
        return bool(changed)


def map_channels(graph: Any) -> dict[str, int]:
    """Name -> number of channels of each four-dimensional tensor in an `onnx.GraphProto`; 0 if unknown."""
    shapes = {value.name: value.type.tensor_type.shape.dim for value in graph.value_info}
    return {name: shape[1].dim_value for name, shape in shapes.items() if len(shape) == 4}


def pad_channels_to_blocks(model: Any, block: int = BLOCK) -> Any:
    """Add channels of zeros to maps that are concatenated or convolved in partial blocks; changes the model in place.

    Args:
        model: an `onnx.ModelProto` whose shapes are inferred.
    """
    import onnx

    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    ends = {value.name for value in (*graph.input, *graph.output)}
    channels = {name: count for name, count in map_channels(graph).items() if count and name not in ends}
    layouts = _layouts(graph, weights, channels, block)

    def scattered(name: str, axis: int, layout: Layout | None) -> str:
        """Pad weights with zeros according to the layout, under a new name because other nodes may use the original."""
        if layout is None:
            return name
        values = onnx.numpy_helper.to_array(weights[name])
        index = np.array(layout)
        shape = [1] * values.ndim
        shape[axis] = -1
        padded = np.where(index.reshape(shape) >= 0, values.take(index.clip(0), axis), 0).astype(values.dtype)
        new = f"{name}/{node.name}"
        weights[new] = onnx.numpy_helper.from_array(np.ascontiguousarray(padded), new)
        return new

    for number, node in enumerate(graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
        before, after = layouts.get(node.input[0] if node.input else ""), layouts.get(node.output[0])
        if node.op_type == "Conv":
            group = next((a for a in node.attribute if a.name == "group"), None)
            if group is not None and group.i > 1:
                group.i = len(after) if after else group.i
            else:
                node.input[1] = scattered(node.input[1], 1, before)
            node.input[1] = scattered(node.input[1], 0, after)
            if len(node.input) > 2:
                node.input[2] = scattered(node.input[2], 0, after)
        elif node.op_type in ("Add", "Mul"):
            for i, name in enumerate(node.input):
                if name in weights and len(weights[name].dims) > 2 and weights[name].dims[-3] > 1:
                    node.input[i] = scattered(name, len(weights[name].dims) - 3, after)
    used = {name for node in graph.node for name in node.input}
    del graph.initializer[:], graph.value_info[:]
    graph.initializer.extend(tensor for name, tensor in weights.items() if name in used)
    return onnx.shape_inference.infer_shapes(model)


def _layouts(graph: Any, weights: dict[str, Any], channels: dict[str, int], block: int) -> dict[str, Layout]:
    """Name -> layout of the maps that get channels of zeros."""
    import onnx

    groups = LayoutGroups(channels)
    concats = []
    for node in graph.node:
        attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        data = [name for name in node.input if name and name not in weights]
        if node.op_type == "Conv" and len(data) == 1:
            group = attributes.get("group", 1)
            if group > 1 and list(weights[node.input[1]].dims[:2]) == [group, 1]:
                groups.tie([*data, *node.output])
            elif group > 1:
                groups.fix([*data, *node.output])
        elif node.op_type in POINTWISE_OPS | POOLING_OPS and len(data) == len(node.output) == 1:
            groups.tie([*data, *node.output])
        elif node.op_type in ("Add", "Mul") and all(_by_channel(weights[n].dims) for n in node.input if n in weights):
            groups.tie([*data, *node.output])
        elif node.op_type == "Resize" and len(node.input) == 3 and node.input[2] in weights:
            groups.tie([*data, *node.output])
        elif node.op_type == "Concat" and attributes["axis"] == 1 and all(name in channels for name in node.input):
            concats.append((node.output[0], list(node.input)))
        else:
            groups.fix([*data, *node.output])

    while True:  # until no more layouts have to stay unchanged
        composed: dict[str, Layout] = {}
        changed = False

        def layout(name: str, composed: dict[str, Layout] = composed) -> Layout:
            root, count = groups.root(name), channels[name]
            padding = 0 if root in groups.fixed else -count % block
            return composed.get(root, (*range(count), *[-1] * padding))

        for output, inputs in 2 * concats:  # the second pass checks that all layouts are consistent
            if output not in channels or groups.root(output) in groups.fixed:
                changed |= groups.fix(inputs)
                continue
            whole: list[int] = []
            start = 0
            for name in inputs:
                whole += [start + i if i >= 0 else -1 for i in layout(name)]
                start += channels[name]
            if composed.setdefault(groups.root(output), tuple(whole)) != tuple(whole):
                changed |= groups.fix([output, *inputs])
        if not changed:
            break
    layouts = {name: layout(name) for name in channels}
    return {name: padded for name, padded in layouts.items() if len(padded) > channels[name]}


def _by_channel(dims: Iterable[int]) -> bool:
    """Whether a constant of this shape is a scalar or has one value for each channel."""
    first, (_, height, width) = list(dims)[:-3], [1, 1, 1, *dims][-3:]
    return height == width == 1 and all(dim == 1 for dim in first)
