"""Small objects in large images: the image is looked at whole and in tiles (SAHI, arXiv 2202.06934)."""

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
    """Squares of `size` pixels that cover an image; neighbours share at least `overlap` (a share) of their side.

    The last of a row or column ends where the image ends. A side shorter than `size` has one tile, as long as itself.
    """
    step = max(1, int(size * (1 - overlap)))

    def starts(length: int) -> list[int]:
        return [*range(0, length - size, step), max(0, length - size)]

    return [
        (x, y, min(x + size, width), min(y + size, height)) for y, x in itertools.product(starts(height), starts(width))
    ]


@dataclass(frozen=True)
class TiledImage:
    """An image's tiles and all that is looked at: the whole first, then the tiles."""

    size: tuple[int, int]
    tiles: list[Tile]
    prepared: list[PreparedImage]


class TiledPredictor:
    """A `Predictor` that looks at each image whole and in tiles, which the network sees as large as whole images.

    Images no larger than a tile are looked at once. Tiles of several images go through the network together.

    Args:
        predictor: what looks.
        size: of a tile in pixels of the image. Objects appear enlarged by the image's short side / size.
        overlap: share of a tile's side that the next one sees again. Objects no larger than that lie whole in a tile.
        batch_size: tiles in a pass of the network.

    Raises:
        UserError: a size below 32, or an overlap outside of [0, 0.9].
    """

    def __init__(self, predictor: Predictor, size: int, overlap: float = 0.2, batch_size: int = 4) -> None:
        if size < 32:
            raise UserError(f"tiles of {size} pixels are too small; they need 32 at least")
        if not 0 <= overlap <= 0.9:
            raise UserError(f"an overlap of {overlap} is not possible; give a share between 0 and 0.9")
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
        # A batch is padded to its largest side: whole images and tiles, of other shapes, go separately.
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
    """What was found in an image and in its tiles (boxes in the tile's pixels) as the detections of the image.

    A box that ends at an edge of its tile, where the image goes on, is probably the part of an object that the tile
    saw of it. Its score says nothing about which box is better, so that plain NMS would often keep the part. Here the
    boxes of whole objects come first, by class-wise NMS; then a cut one is dropped where whole ones of its class
    cover half of it or more. What is left – an object too large for the overlap that the look at the whole image
    missed – is kept, again by NMS: better in part than not at all.

    Args:
        size: (height, width) of the image.
        nms_threshold: of IoU, as the detector's own.
    """
    if not parts:
        return whole
    height, width = size
    boxes, cut = [np.asarray(whole["boxes"], np.float32)], [np.zeros(len(whole["boxes"]), bool)]
    for found, (x1, y1, x2, y2) in zip(parts, tiles, strict=True):
        moved = np.asarray(found["boxes"], np.float32) + np.array([x1, y1, x1, y1], np.float32)
        # Boxes are not exact to the pixel.
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

    def best(rows: torch.Tensor) -> torch.Tensor:
        return rows[batched_nms(all_boxes[rows], scores[rows], labels[rows], nms_threshold)]

    kept = best(torch.nonzero(~is_cut).flatten())
    rest = torch.nonzero(is_cut).flatten()
    covered = (_share_inside(all_boxes[rest], all_boxes[kept]) >= 0.5) & (labels[rest, None] == labels[None, kept])
    kept = torch.cat([kept, best(rest[~covered.any(1)])])
    kept = kept[torch.argsort(scores[kept], descending=True, stable=True)]
    return {
        "boxes": all_boxes[kept].numpy(),
        "labels": labels[kept].numpy(),
        "names": [names[i] for i in kept.tolist()],
        "scores": scores[kept].numpy(),
    }


def _share_inside(boxes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """[n, m]: which share of each of n boxes lies in each of m others."""
    corner1 = torch.maximum(boxes[:, None, :2], others[None, :, :2])
    corner2 = torch.minimum(boxes[:, None, 2:], others[None, :, 2:])
    common = (corner2 - corner1).clamp(min=0).prod(2)
    return common / (boxes[:, 2:] - boxes[:, :2]).prod(1).clamp(min=1e-6)[:, None]
