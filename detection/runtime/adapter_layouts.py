"""Inputs and outputs of ONNX files of other projects: whether they fit an adapter, and what the outputs mean."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from detection.core.errors import UserError
from detection.runtime.adapter import Adapter, InputConfig

INPUT_TYPES: dict[str, Any] = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8,
}  # fmt: skip
COLUMNS_BEFORE_CLASSES = {"yolox": 5, "yolov5": 5, "yolov8": 4, "fastestdet": 5}


class NetworkInput(NamedTuple):
    """The input of an ONNX file; `size` is (height, width), `batch` None means any number of images."""

    name: str
    dtype: Any
    batch: int | None
    size: tuple[int, int]


class Candidates(NamedTuple):
    """Boxes float32 [n, 4] xyxy in pixels of the input, labels int64 [n] from 1, scores float32 [n]."""

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray


def check_input(inputs: Sequence[tuple[str, str, Sequence[Any]]], config: InputConfig, path: Path) -> NetworkInput:
    """Args: inputs: (name, type, shape) of each input of the file.

    Raises:
        UserError: they are not one image batch of the layout and size that the adapter says.
    """
    found = "; ".join(f"{name} {kind} {_shown(shape)}" for name, kind, shape in inputs)
    size = tuple(config.size or ("height", "width"))
    shape = ("N", 3, *size) if config.layout == "nchw" else ("N", *size, 3)
    wrong = UserError(
        f"{path} does not fit its adapter: expected: one input {_shown(shape)} (input.layout {config.layout}, "
        f"input.size {_shown(config.size) if config.size else 'of the file'}) of float, float16 or uint8, got: {found}"
    )
    if len(inputs) != 1 or inputs[0][1] not in INPUT_TYPES or len(inputs[0][2]) != 4:
        raise wrong
    name, kind, given = inputs[0]
    sides = [side if type(side) is int and side > 0 else None for side in given]
    batch, channels, height, width = sides if config.layout == "nchw" else (sides[0], sides[3], sides[1], sides[2])
    for side, expected in ((channels, 3), *(zip((height, width), config.size, strict=True) if config.size else ())):
        if side not in (None, expected):
            raise wrong
    if config.size:
        height, width = config.size
    if height is None or width is None:
        raise UserError(f"{path} takes images of any size ({found}); set input.size: [height, width] in its adapter")
    return NetworkInput(name, INPUT_TYPES[kind], batch, (height, width))


def check_outputs(
    outputs: Mapping[str, Sequence[Any] | None], adapter: Adapter, size: tuple[int, int], path: Path
) -> list[str]:
    """The names of the outputs to read.

    Args:
        outputs: name -> shape.

    Raises:
        UserError: an output is absent, or its shape is not that of the layout with the classes of the adapter.
    """
    config = adapter.output
    found = "; ".join(f"{name} {_shown(shape)}" for name, shape in outputs.items())
    if config.layout == "boxes":
        names = [config.boxes, config.labels, config.scores]
        if absent := [name for name in names if name not in outputs]:
            raise UserError(
                f"{path} does not fit its adapter: expected: outputs {', '.join(names)} (output.boxes, output.labels, "
                f"output.scores), got: {found}; it has no {', '.join(absent)}"
            )
        for name, columns in zip(names, (4, None, None), strict=True):
            shape = list(outputs[name] or [])
            ranks = (2, 3) if columns else (1, 2)
            if outputs[name] is not None and (len(shape) not in ranks or _differs(shape[-1], columns)):
                expected = "[N, n, 4] or [n, 4]" if columns else "[N, n] or [n]"
                raise UserError(
                    f"{path} does not fit its adapter: expected: output {name} {expected}, got: {_shown(shape)}"
                )
        return names
    if (config.name or next(iter(outputs))) not in outputs or (config.name is None and len(outputs) != 1):
        expected = f"an output {config.name}" if config.name else "one output, or output.name: NAME in the adapter"
        raise UserError(f"{path} does not fit its adapter: expected: {expected}, got: {found}")
    name = config.name or next(iter(outputs))
    if outputs[name] is not None:
        check_predictions(outputs[name] or [], adapter, size, path)
    return [name]


def check_predictions(shape: Sequence[Any], adapter: Adapter, size: tuple[int, int], path: Path) -> None:
    """Check the shape of the output of a layout with candidates. Raises UserError."""
    config, num_classes = adapter.output, len(adapter.class_list.names)
    channels = COLUMNS_BEFORE_CLASSES[config.layout] + num_classes
    candidates = len(make_cells(config.strides, size)) if config.layout == "yolox" else None
    expected: tuple[Any, ...] = ("N", candidates or "candidates", channels)
    if config.layout == "yolov8":
        expected = ("N", channels, "candidates")
    if config.layout == "fastestdet":
        expected = ("N", channels, "rows", "columns")
    if len(shape) == len(expected) and not any(
        type(e) is int and _differs(s, e) for s, e in zip(shape, expected, strict=True)
    ):
        return
    strides = f" and strides {_shown(config.strides)}" if config.layout == "yolox" else ""
    raise UserError(
        f"{path} does not fit its adapter: expected: an output {_shown(expected)} (layout {config.layout}, "
        f"{num_classes} classes{strides}), got: {_shown(shape)}"
    )


def make_cells(strides: Sequence[int], size: tuple[int, int]) -> np.ndarray:
    """float32 [A, 3]: column, row and stride of each cell of the grids on an input of (height, width)."""
    levels = []
    for stride in strides:
        row, column = np.mgrid[: size[0] // stride, : size[1] // stride]
        levels.append(np.stack([column, row, np.full_like(row, stride)], axis=-1).reshape(-1, 3))
    return np.concatenate(levels).astype(np.float32)


def decode_predictions(
    output: np.ndarray, adapter: Adapter, size: tuple[int, int], score_threshold: float, top_k: int
) -> Candidates:
    """The candidates of one image with a score above the threshold, at most the `top_k` best, in any order.

    Args:
        output: [A, 5 + C]; [4 + C, A] of layout yolov8; [5 + C, rows, columns] of layout fastestdet.
    """
    layout = adapter.output.layout
    output = output.astype(np.float32, copy=False)
    if layout == "yolov8":
        output = output.T
    elif layout == "fastestdet":
        output = _decode_fastestdet(output, size)
    scores = output[:, COLUMNS_BEFORE_CLASSES[layout] :]
    if layout != "yolov8":
        scores = scores * output[:, 4:5]
    rows, columns = np.nonzero(scores > score_threshold)
    scores = scores[rows, columns]
    if len(rows) > top_k:
        best = np.argpartition(-scores, top_k)[:top_k]
        rows, columns, scores = rows[best], columns[best], scores[best]
    center, sides = output[rows, :2], output[rows, 2:4]
    if layout == "yolox":
        cells = make_cells(adapter.output.strides, size)[rows]
        with np.errstate(over="ignore"):  # infinite sides are clipped to the image
            center, sides = (center + cells[:, :2]) * cells[:, 2:], np.exp(sides) * cells[:, 2:]
    return Candidates(np.concatenate([center - sides / 2, center + sides / 2], axis=1), columns + 1, scores)


def _decode_fastestdet(output: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[5 + C, rows, columns] of FastestDet -> [A, 5 + C] as of YOLOv5, whose product of objectness and class score is
    the score."""
    rows, columns = output.shape[1:]
    output = output.reshape(len(output), -1).T
    row, column = np.mgrid[:rows, :columns].reshape(2, -1)
    input_size = np.array([size[1], size[0]], np.float32)
    cell = input_size / np.array([columns, rows], np.float32)
    center = (np.tanh(output[:, 1:3]) + np.stack([column, row], axis=1)) * cell
    sides = input_size / (1 + np.exp(-output[:, 3:5]))
    parts = [center, sides, output[:, :1] ** 0.6, output[:, 5:] ** 0.4]
    return np.concatenate(parts, axis=1).astype(np.float32)


def read_boxes(outputs: Sequence[np.ndarray], adapter: Adapter, size: tuple[int, int], path: Path) -> Candidates:
    """Detections of one image from a file with NMS: boxes [n, 4], labels [n], scores [n].

    Raises:
        UserError: a label is not that of a class of the adapter.
    """
    boxes, labels, scores = outputs
    config, num_classes = adapter.output, len(adapter.class_list.names)
    first, last = config.first_label, config.first_label + num_classes - 1
    # Files with a fixed number of rows fill those that are not used with a score of zero.
    used = scores > 0
    boxes, labels, scores = boxes[used].astype(np.float32), labels[used].astype(np.int64), scores[used]
    if len(labels) and not first <= labels.min() <= labels.max() <= last:
        raise UserError(
            f"{path} returns labels {labels.min()} to {labels.max()}; expected by its adapter ({num_classes} classes, "
            f"output.first_label {first}): {first} to {last}"
        )
    if config.units == "fractions":
        boxes = boxes * np.array([size[1], size[0], size[1], size[0]], np.float32)
    return Candidates(boxes, labels - first + 1, scores.astype(np.float32))


def _differs(side: Any, expected: int | None) -> bool:
    return type(side) is int and expected is not None and side != expected


def _shown(shape: Sequence[Any] | None) -> str:
    return "of any shape" if shape is None else f"[{', '.join('any' if s is None else str(s) for s in shape)}]"
