"""Detects small objects in large images: runs the detector on the whole image and on tiles (SAHI, arXiv 2202.06934)."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torchvision.ops import batched_nms

from detection.core.errors import UserError
from detection.inference.predictor import Detections, Predictor, PreparedImage, as_rgb

Tile = tuple[int, int, int, int]
"""x1, y1, x2, y2 in pixels of the image."""


def tile_boxes(height: int, width: int, size: int, overlap: float) -> list[Tile]:
    """Squares of `size` pixels that cover an image; neighbors overlap by at least the fraction `overlap` of their side.

    The last tile of a row or column ends at the border of the image. A side shorter than `size` has one tile.
    """
    step = max(1, int(size * (1 - overlap)))

    def starts(length: int) -> list[int]:
        return [*range(0, length - size, step), max(0, length - size)]

    return [
        (x, y, min(x + size, width), min(y + size, height)) for y, x in itertools.product(starts(height), starts(width))
    ]


@dataclass(frozen=True)
class TiledImage:
    """The tiles of an image, and the prepared inputs: the whole image first, then the tiles."""

    size: tuple[int, int]
    tiles: list[Tile]
    prepared: list[PreparedImage]


class TiledPredictor:
    """Runs a `Predictor` on the whole image and on tiles, which are resized to the network's input size.

    Images that fit into one tile are processed once. Tiles of several images are batched together.

    Args:
        predictor: runs on the whole image and on each tile.
        size: of a tile, in pixels of the image. Objects are enlarged by the image's short side / size.
        overlap: fraction of a tile's side that neighboring tiles share. Objects up to that size are whole in one tile.
        batch_size: tiles in a forward pass.

    Raises:
        UserError: a size below 32, or an overlap outside [0, 0.9].
    """

    def __init__(self, predictor: Predictor, size: int, overlap: float = 0.2, batch_size: int = 4) -> None:
        if size < 32:
            raise UserError(f"the tile size must be at least 32 pixels, not {size}")
        if not 0 <= overlap <= 0.9:
            raise UserError(f"the overlap must be between 0 and 0.9, not {overlap}")
        self.predictor, self.size, self.overlap, self.batch_size = predictor, size, overlap, batch_size
        self.num_streams = predictor.num_streams

    def predict(self, image: Any) -> Detections:
        """As `Predictor.predict`."""
        return self.detect([self.prepare(as_rgb(image))])[0]

    def prepare(self, image: np.ndarray, *, bgr: bool = False) -> TiledImage:
        """As `Predictor.prepare`."""
        height, width = image.shape[:2]
        tiles = tile_boxes(height, width, self.size, self.overlap)
        tiles = tiles if len(tiles) > 1 else []
        parts = [image, *(image[y1:y2, x1:x2] for x1, y1, x2, y2 in tiles)]
        return TiledImage((height, width), tiles, [self.predictor.prepare(part, bgr=bgr) for part in parts])

    def detect(self, images: Sequence[TiledImage]) -> list[Detections]:
        """As `Predictor.detect`."""
        # Separate batches, because whole images and tiles have different shapes and a batch is padded to the largest.
        wholes = self._passes([image.prepared[0] for image in images])
        parts = iter(self._passes([part for image in images for part in image.prepared[1:]]))
        threshold = self.predictor.config.eval.nms_threshold
        return [
            merge(whole, [next(parts) for _ in image.tiles], image.tiles, image.size, threshold)
            for image, whole in zip(images, wholes, strict=True)
        ]

    def _passes(self, images: Sequence[PreparedImage]) -> list[Detections]:
        chunks = (images[i : i + self.batch_size] for i in range(0, len(images), self.batch_size))
        return [found for chunk in chunks for found in self.predictor.detect(chunk)]


def merge(
    whole: Detections,
    parts: Sequence[Detections],
    tiles: Sequence[Tile],
    size: tuple[int, int],
    nms_threshold: float,
) -> Detections:
    """Merge the detections of the whole image with those of its tiles (boxes in pixels of the tile).

    A box that ends at the inner edge of its tile is probably only a part of an object. Its score does not say which box
    is better, so plain NMS would often keep the part. Therefore class-wise NMS selects the boxes that are not cut
    first. Then a cut box is dropped if a selected box of its class covers at least half of it. NMS selects from the
    other cut boxes: objects that are larger than the overlap and were missed in the whole image.

    Args:
        size: (height, width) of the image.
        nms_threshold: IoU threshold, as in the detector.
    """
    if not parts:
        return whole
    height, width = size
    boxes, cut = [np.asarray(whole["boxes"], np.float32)], [np.zeros(len(whole["boxes"]), bool)]
    for found, (x1, y1, x2, y2) in zip(parts, tiles, strict=True):
        moved = np.asarray(found["boxes"], np.float32) + np.array([x1, y1, x1, y1], np.float32)
        # Boxes are not accurate to the pixel.
        margin = max(2.0, 0.01 * max(x2 - x1, y2 - y1))
        boxes.append(moved)
        cut.append(
            ((moved[:, 0] < x1 + margin) & (x1 > 0))
            | ((moved[:, 1] < y1 + margin) & (y1 > 0))
            | ((moved[:, 2] > x2 - margin) & (x2 < width))
            | ((moved[:, 3] > y2 - margin) & (y2 < height))
        )
    all_boxes = torch.from_numpy(np.concatenate(boxes))
    is_cut = torch.from_numpy(np.concatenate(cut))
    scores = torch.from_numpy(np.concatenate([found["scores"] for found in (whole, *parts)]))
    labels = torch.from_numpy(np.concatenate([found["labels"] for found in (whole, *parts)]))
    names = [name for found in (whole, *parts) for name in found["names"]]

    def nms(rows: torch.Tensor) -> torch.Tensor:
        return rows[batched_nms(all_boxes[rows], scores[rows], labels[rows], nms_threshold)]

    kept = nms(torch.nonzero(~is_cut).flatten())
    rest = torch.nonzero(is_cut).flatten()
    covered = (_fraction_inside(all_boxes[rest], all_boxes[kept]) >= 0.5) & (labels[rest, None] == labels[None, kept])
    kept = torch.cat([kept, nms(rest[~covered.any(1)])])
    kept = kept[torch.argsort(scores[kept], descending=True, stable=True)]
    return {
        "boxes": all_boxes[kept].numpy(),
        "labels": labels[kept].numpy(),
        "names": [names[i] for i in kept.tolist()],
        "scores": scores[kept].numpy(),
    }


def _fraction_inside(boxes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """[n, m]: fraction of the area of each of n boxes that is inside each of m others."""
    corner1 = torch.maximum(boxes[:, None, :2], others[None, :, :2])
    corner2 = torch.minimum(boxes[:, None, 2:], others[None, :, 2:])
    common = (corner2 - corner1).clamp(min=0).prod(2)
    return common / (boxes[:, 2:] - boxes[:, :2]).prod(1).clamp(min=1e-6)[:, None]
