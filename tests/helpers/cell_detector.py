"""A detector of another project: an ONNX file that finds squares of a pure color, in each layout of outputs."""

import functools
import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn

CELL = 32
"""Side of an object in pixels of the network's input; objects lie on a grid of this step."""
NAMES = ("red square", "green square", "blue square")
COLORS = {name: tuple(255 * (i == k) for k in range(3)) for i, name in enumerate(NAMES)}
"""RGB of each class; a darker color has a lower score."""


class CellDetector(nn.Module):
    """Each cell of the grid is a candidate; the score of a class is the mean of its color channel.

    Args:
        layout: "yolox", "yolov5", "yolov8", "fastestdet", or "boxes" (which returns one box of each cell).
        scale: the value of a bright pixel in the input.
    """

    def __init__(self, layout: str, scale: float, size: tuple[int, int]) -> None:
        super().__init__()
        self.layout, self.scale, self.size = layout, scale, size
        row, column = torch.meshgrid(torch.arange(size[0] // CELL), torch.arange(size[1] // CELL), indexing="ij")
        corner = torch.stack([column, row], dim=-1).reshape(-1, 2).float() * CELL
        side = torch.full_like(corner, CELL)
        self.register_buffer("center_side", torch.cat([corner + CELL / 2, side], dim=1)[None])
        self.register_buffer("corners", torch.cat([corner, corner + CELL], dim=1)[None])

    def forward(self, images: Tensor):
        scores = nn.functional.avg_pool2d(images, CELL).flatten(2).transpose(1, 2) / self.scale
        # Made of the input, so that no output becomes a constant of the file.
        zero = 0 * scores[..., :1]
        one = zero + 1
        if self.layout == "yolox":
            offsets = torch.cat([zero + 0.5, zero + 0.5, zero, zero], dim=2)
            return torch.cat([offsets, one, scores], dim=2)
        if self.layout == "fastestdet":
            # atanh of the offset of the center, logit of the side as a share of the image; the score is a power.
            offset, height, width = zero + math.atanh(0.5), CELL / self.size[0], CELL / self.size[1]
            sides = [zero + math.log(share / (1 - share)) for share in (width, height)]
            cells = torch.cat([one, offset, offset, *sides, scores**2.5], dim=2)
            return cells.transpose(1, 2).unflatten(2, (self.size[0] // CELL, self.size[1] // CELL))
        if self.layout == "boxes":
            best, labels = scores.max(dim=2)
            return self.corners + zero, labels, best
        if self.layout == "yolov5":
            return torch.cat([self.center_side + zero, one, scores], dim=2)
        return torch.cat([self.center_side + zero, scores], dim=2).transpose(1, 2)


def write_detector(
    path: Path, layout: str = "yolov8", *, scale: float = 1, size: tuple[int, int] = (128, 128), any_batch: bool = False
) -> Path:
    """Write the ONNX file, with input "images" and outputs "output", or "boxes", "labels" and "scores"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_exported(layout, scale, size, any_batch))
    return path


@functools.cache
def _exported(layout: str, scale: float, size: tuple[int, int], any_batch: bool) -> bytes:
    outputs = ["boxes", "labels", "scores"] if layout == "boxes" else ["output"]
    axes = {name: {0: "N"} for name in ("images", *outputs)} if any_batch else None
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            CellDetector(layout, scale, size).eval(),
            (torch.zeros(1, 3, *size),),
            file,
            input_names=["images"],
            output_names=outputs,
            dynamic_axes=axes,
            dynamo=False,
        )
    return file.getvalue()


def adapter_text(layout: str, names: Sequence[str] = NAMES, **keys: str) -> str:
    """The YAML of an adapter for the file; `keys` are further keys of the section `input`."""
    inputs = {"range": "1", "fit": "pad_right_bottom", "pad_value": "0", **keys}
    output = f"{{layout: {layout}{', strides: [32]' if layout == 'yolox' else ''}}}"
    listed = ", ".join(f"{name}: {value}" for name, value in inputs.items())
    return f"classes: [{', '.join(names)}]\ninput: {{{listed}}}\noutput: {output}\nscore_threshold: 0.05\n"


def draw_cells(
    path: Path, cells: dict[tuple[int, int], tuple[str, float]], size=(256, 192), step: tuple[int, int] = (64, 64)
) -> Path:
    """Write a black PNG of `size` with filled cells of `step` (both width, height): (column, row) -> (class, score)."""
    image = np.zeros((size[1], size[0], 3), np.uint8)
    for (column, row), (name, score) in cells.items():
        part = image[row * step[1] : (row + 1) * step[1], column * step[0] : (column + 1) * step[0]]
        part[:] = np.round(np.array(COLORS[name]) * score)
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image[..., ::-1])
    return path


def found_cells(found, step: tuple[int, int] = (64, 64)) -> dict[tuple[int, int], tuple[str, float]]:
    """The detections of `Predictor.predict` as `draw_cells` takes them; boxes must be cells to a pixel's thousandth."""
    cells = {}
    for box, name, score in zip(found["boxes"], found["names"], found["scores"], strict=True):
        corner = np.round(box[:2] / step)
        assert np.allclose(box, [*corner * step, *(corner + 1) * step], atol=1e-3), box
        cells[tuple(corner.astype(int).tolist())] = (name, round(float(score), 2))
    return cells
