"""From images with boxes to images with one label each: objects cut out into class folders, for pre-training."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from detection.core.errors import UserError
from detection.core.files import file_digest
from detection.core.progress import progress_bar
from detection.core.text import text_table
from detection.data.annotations import Annotations
from detection.data.formats.detect_format import read_annotations
from detection.data.image_io import read_image, write_jpeg
from detection.data.load_split import check_images

QUALITY = 92
"""Of the JPEG files."""


@dataclass(frozen=True)
class Crop:
    """One object to be cut out."""

    image: Path
    size: tuple[int, int]
    """Width and height of the image."""
    box: tuple[int, int, int, int]
    """xyxy in pixels of the image."""
    name: str
    split: str
    """ "train" or "val"."""
    file: str
    """Name of the file to be written."""


@dataclass(frozen=True)
class CropReport:
    """What was written, by class: (train, val), and what was not."""

    kept: dict[str, tuple[int, int]]
    dropped: dict[str, int]
    repeated_images: int

    def __str__(self) -> str:
        train, val = (sum(counts[i] for counts in self.kept.values()) for i in (0, 1))
        rows = [*sorted(self.kept.items()), ("all", (train, val))]
        cells = [(name, *map(str, counts)) for name, counts in rows]
        text = [text_table(("class", "train", "val"), cells, left=1)]
        if self.dropped:
            text.append(
                f"{len(self.dropped)} classes with too few objects left out ({sum(self.dropped.values())} objects)"
            )
        if self.repeated_images:
            text.append(f"{self.repeated_images} images that an earlier file has, too, left out")
        return "\n".join(text)


def make_crops(
    annotations: Sequence[str | Path],
    out: str | Path,
    *,
    images: Sequence[str | Path] = (),
    size: int = 128,
    margin: float = 0.1,
    min_side: int = 24,
    min_examples: int = 12,
    max_examples: int = 400,
    val_share: float = 0.2,
    seed: int = 0,
) -> CropReport:
    """Cut out the objects of COCO files and write them to OUT/{train,val}/CLASS/*.jpg.

    Each crop is a square around its box with some surroundings, shifted into the image. Train and val never share a
    image: the split is a function of an image's bytes, so that it holds across files, too.

    Args:
        images: the folder of each file's images; images/ beside it where none are given.
        size: crops with longer sides are scaled down to this many pixels.
        margin: of the box's longer side, added on each side.
        min_side: boxes whose longer side is below this many pixels are left out; crowd regions always are.
        min_examples: classes with fewer objects, or with fewer than two in val, are left out.
        max_examples: of a class with more objects this many are taken, by chance.
        val_share: of the images.

    Raises:
        UserError: annotations or images that cannot be read, `out` not empty, fewer than two classes left.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already and not empty; give another --out, or remove it")
    if images and len(images) != len(annotations):
        raise UserError(f"{len(annotations)} annotation files need as many --images folders, not {len(images)}")
    crops: list[Crop] = []
    seen: set[bytes] = set()
    repeated = 0
    for number, path in enumerate(annotations):
        dataset = read_annotations(path, images=images[number] if images else None)
        folder = Path(dataset.images)
        check_images(dataset, folder)
        for i in range(len(dataset)):
            digest = file_digest(folder / str(dataset.file_names[i]), "image")
            if digest in seen:
                repeated += 1
                continue
            seen.add(digest)
            split = "val" if _chance(seed, digest) < val_share else "train"
            crops += _crops_of(dataset, i, folder, split, f"{number}", margin, min_side)
    kept, dropped = _choose(crops, min_examples, max_examples, seed)
    counts = Counter((crop.name, crop.split) for crop in kept)
    names = sorted({crop.name for crop in kept})
    if len(names) < 2:
        raise UserError(f"{len(names)} classes are left with {min_examples} objects or more: lower --min-examples")
    _write(kept, out, size)
    table = {name: (counts[name, "train"], counts[name, "val"]) for name in names}
    return CropReport(table, dropped, repeated)


def _crops_of(
    annotations: Annotations, i: int, folder: Path, split: str, prefix: str, margin: float, min_side: int
) -> list[Crop]:
    image = folder / str(annotations.file_names[i])
    width, height = annotations.sizes[i].tolist()
    crops = []
    boxes, labels = annotations.training_boxes(i)
    for number, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        if max(box[2:] - box[:2]) >= min_side:
            name = annotations.class_names[label - 1]
            square = square_around(box, margin, width, height)
            crops.append(Crop(image, (width, height), square, name, split, f"{prefix}_{image.stem}_{number}.jpg"))
    return crops


def square_around(box: np.ndarray, margin: float, width: int, height: int) -> tuple[int, int, int, int]:
    """The square with `box` (xyxy, float32 [4]) in its middle, moved into the image and, where it must be, cut."""
    side = float(max(box[2:] - box[:2])) * (1 + 2 * margin)
    corners = []
    for low, high, limit in ((box[0], box[2], width), (box[1], box[3], height)):
        start = min(max(0.0, float(low + high - side) / 2), max(0.0, limit - side))
        corners.append((int(start), min(limit, int(np.ceil(start + side)))))
    (x1, x2), (y1, y2) = corners
    return x1, y1, x2, y2


def _choose(crops: list[Crop], min_examples: int, max_examples: int, seed: int) -> tuple[list[Crop], dict[str, int]]:
    """The crops of classes with enough of them, and how many each other class has."""
    kept: list[Crop] = []
    dropped: dict[str, int] = {}
    for name in sorted({crop.name for crop in crops}):
        own = [crop for crop in crops if crop.name == name]
        own = sorted(own, key=lambda crop: _chance(seed, crop.file.encode()))[:max_examples]
        if len(own) < min_examples or sum(crop.split == "val" for crop in own) < 2:
            dropped[name] = len(own)
        else:
            kept += own
    return kept, dropped


def _chance(seed: int, key: bytes) -> float:
    """In [0, 1), a function of its arguments alone."""
    return int.from_bytes(hashlib.sha1(str(seed).encode() + key).digest()[:6], "big") / 2**48


def _write(crops: list[Crop], out: Path, size: int) -> None:
    for crop in progress_bar(crops, "crops"):
        image = read_image(crop.image, crop.size)
        x1, y1, x2, y2 = crop.box
        part = image[y1:y2, x1:x2]
        scale = size / max(part.shape[:2])
        if scale < 1:
            sides = (max(1, round(part.shape[1] * scale)), max(1, round(part.shape[0] * scale)))
            part = cv2.resize(part, sides, interpolation=cv2.INTER_AREA)
        # A class may be called "n/a" or "..", but a folder may not.
        path = out / crop.split / crop.name.replace("/", "-").replace(".", "-") / crop.file
        write_jpeg(path, part[:, :, ::-1], QUALITY)
