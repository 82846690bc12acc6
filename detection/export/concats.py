"""Removes concatenations of feature maps from an ONNX graph.

A ghost module concatenates two halves, and usually a convolution follows. Two convolutions, one for each half, and the
sum of their outputs are equivalent. This avoids copying the wider map, and the sum costs nothing, because runtimes fuse
it into the second convolution.
"""

from typing import Any

import numpy as np

from detection.export.channel_blocks import map_channels

ALIGNED = 4
"""ONNX Runtime uses its own layout for multiples of this number of channels: for a map of 36 channels, but not for its
halves of 18. (Measured: with such halves GhostNet 0.5 was as slow as 1.0.)"""


def remove_concats(model: Any) -> Any:
    """Remove concatenations of channels whose output only convolutions read; changes the model in place.

    A convolution becomes one convolution for each part, and their sum. A depthwise convolution becomes one for each
    part, followed by the concatenation, which may be removed at the next convolution. Parts must have multiples of
    `ALIGNED` channels.

    Args:
        model: an `onnx.ModelProto` whose shapes are inferred.
    """
    import onnx

    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    channels = map_channels(graph)
    consumers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    outputs = {output.name for output in graph.output}

    def array(name: str) -> np.ndarray:
        return onnx.numpy_helper.to_array(weights[name])

    def constant(name: str, values: np.ndarray) -> str:
        weights[name] = onnx.numpy_helper.from_array(np.ascontiguousarray(values), name)
        return name

    def group_of(conv: Any) -> int:
        return next((a.i for a in conv.attribute if a.name == "group"), 1)

    def splits(conv: Any, whole: int) -> bool:
        """Whether a node is a convolution that can process parts of `whole` channels separately."""
        if conv.op_type != "Conv" or not all(name in weights for name in conv.input[1:]):
            return False
        return group_of(conv) in (1, whole) and (group_of(conv) == 1 or len(array(conv.input[1])) == whole)

    def part_of(conv: Any, number: int, source: str, rows: slice, bias: bool) -> Any:
        """The convolution of one part; a depthwise one computes only the outputs of the part."""
        weight, name = array(conv.input[1]), f"{conv.name}/part{number}"
        inputs = [source, constant(f"{name}.weight", weight[:, rows] if group_of(conv) == 1 else weight[rows])]
        if bias:
            values = array(conv.input[2])
            inputs.append(constant(f"{name}.bias", values if group_of(conv) == 1 else values[rows]))
        part = onnx.helper.make_node("Conv", inputs, [f"{conv.output[0]}/part{number}"], name)
        part.attribute.extend(conv.attribute)
        if group_of(conv) != 1:
            next(a for a in part.attribute if a.name == "group").i = rows.stop - rows.start
        return part

    nodes: list[Any] = []
    # Output of a removed concatenation -> its inputs and their channels.
    parts: dict[str, list[tuple[str, slice]]] = {}
    for number, node in enumerate(graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
        source = node.input[0] if node.input else ""
        if node.op_type == "Conv" and source in parts:
            depthwise = group_of(node) != 1
            new = [
                part_of(node, i, name, rows, bias=len(node.input) > 2 and (depthwise or i == 0))
                for i, (name, rows) in enumerate(parts[source])
            ]
            nodes += new
            if depthwise:
                channels |= {n.output[0]: len(array(n.input[1])) for n in new}
                node = onnx.helper.make_node("Concat", [n.output[0] for n in new], node.output, node.name, axis=1)
            else:
                total = new[0].output[0]
                for i, other in enumerate(new[1:], 1):
                    name = node.output[0] if i == len(new) - 1 else f"{total}+{i}"
                    nodes.append(onnx.helper.make_node("Add", [total, other.output[0]], [name], f"{node.name}/sum{i}"))
                    total = name
                continue
        if node.op_type == "Concat" and node.attribute[0].i == 1 and node.output[0] not in outputs:
            counts = [channels.get(name, 0) for name in node.input]
            readers = consumers.get(node.output[0], [])
            aligned = all(counts) and not any(count % ALIGNED for count in counts)
            if aligned and readers and all(splits(reader, sum(counts)) for reader in readers):
                ends = np.cumsum(counts).tolist()
                rows = [slice(end - count, end) for count, end in zip(counts, ends, strict=True)]
                parts[node.output[0]] = list(zip(node.input, rows, strict=True))
                continue
        nodes.append(node)
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    graph.initializer.extend(tensor for name, tensor in weights.items() if name in used)
    return model
