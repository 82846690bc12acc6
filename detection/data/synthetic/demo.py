"""Draws a small Halloween dataset in COCO format, so that nothing needs to be downloaded.

Every image has its own random generator, seeded by (seed, split, index). The files are therefore the same on every
call, and an image does not depend on the number of images.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from detection.core.errors import UserError
from detection.core.files import read_file, write_atomically
from detection.core.outputs import begin_output, check_outputs
from detection.data.synthetic.drawings import PAINTERS, background, fill, mask_on, paste, random_transform, render

CLASSES: tuple[str, ...] = ("ghost", "pumpkin", "bat", "moon", "candle", "star")
#: Category ids of CLASSES in the JSON. They have gaps, as in COCO, so that an id is not mistaken for an index.
CATEGORY_IDS: tuple[int, ...] = (1, 2, 4, 7, 8, 11)
SPLITS = ("train", "val")
GENERATOR = "ghostnet-demo"
LARGEST = 1 << 28  # bytes of a train.json or val.json
VERSION = 1  # increase this when the drawings change, so that older datasets are drawn again


_MIN_VISIBLE = 0.4  # share of an object's mask that must stay visible
_MIN_SIDE = 14  # pixels, larger side of an object
_COUNTS = (2, 9)  # number of objects to place in an image; those without a free place are left out
# Square roots of the mask areas, in pixels; the limits of COCO between the ranges are 32 and 96.
_RANGES = {"small": (15.0, 30.0), "medium": (34.0, 90.0), "large": (100.0, 135.0)}
_RANGE_SHARES = (0.15, 0.6, 0.25)


# ---------------------------------------------------------------- scenes


def _draw_object(rng: np.random.Generator, label: int, area: float, limit: tuple[float, float]) -> np.ndarray:
    """A tile of class `label` with a mask of about `area` pixels and (width, height) within `limit`."""
    parts, matrix = PAINTERS[label](rng), random_transform(rng, CLASSES[label] == "star")
    probe = fill(parts, matrix * 48, 1)
    scale = 48 * np.sqrt(area / np.count_nonzero(probe[..., 3]))
    h, w = (side - 2 for side in probe.shape[:2])
    scale = max(min(scale, 48 * limit[0] / w, 48 * limit[1] / h), 48 * (_MIN_SIDE + 1) / max(h, w))
    return render(parts, matrix * scale, 0.25 if CLASSES[label] in ("moon", "star", "candle") else 0.4)


def _extent(mask: np.ndarray) -> list[float]:
    """The tight box [x, y, width, height] in pixels of a bool mask [H, W] that is not empty."""
    xs, ys = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return [float(xs[0]), float(ys[0]), float(xs[-1] - xs[0] + 1), float(ys[-1] - ys[0] + 1)]


def _annotation(label: int, own: np.ndarray, seen: np.ndarray, crowd: bool = False) -> dict[str, Any]:
    area = float(np.count_nonzero(seen))
    return {"category_id": CATEGORY_IDS[label], "bbox": _extent(own), "area": area, "iscrowd": int(crowd)}


def _swarm(rng: np.random.Generator, image: np.ndarray) -> tuple[int, np.ndarray]:
    """Draw 6 to 12 small bats or stars close together; returns their class and the union of their masks."""
    label, count = CLASSES.index(str(rng.choice(["bat", "star"]))), int(rng.integers(6, 13))
    columns, pitch = int(rng.integers(3, 5)), rng.uniform(17, 24)
    left = rng.uniform(4, image.shape[1] - columns * pitch - 12)
    top = rng.uniform(4, image.shape[0] - -(-count // columns) * pitch - 12)
    union = np.zeros(image.shape[:2], bool)
    for i in range(count):
        tile = _draw_object(rng, label, (0.62 * pitch) ** 2, (1.6 * pitch, 1.6 * pitch))
        x = int(left + i % columns * pitch + rng.uniform(-6, 6))
        y = int(top + i // columns * pitch + rng.uniform(-6, 6))
        paste(image, tile, x, y)
        union |= mask_on(tile, x, y, image.shape)
    return label, union


def draw_scene(
    rng: np.random.Generator, size: tuple[int, int] | None = None
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Draw one random image.

    Args:
        rng: source of all random numbers.
        size: (width, height) in pixels, at least 160 each; by default one of three shapes at random.

    Returns:
        The image, uint8 [height, width, 3] RGB, and its annotations (some images have none) with `category_id`, `bbox`
        ([x, y, width, height] in pixels of the object's mask within the image, including hidden parts), `area` (its
        visible pixels) and `iscrowd`.
    """
    shapes = ((320, 240), (240, 320), (288, 288))
    width, height = size or shapes[int(rng.choice(3, p=(0.75, 0.15, 0.10)))]
    image, kind = background(rng, width, height), rng.random()
    count = 0 if kind < 0.06 else int(rng.integers(_COUNTS[0], _COUNTS[1] + 1))
    keep_out = np.zeros((height, width), bool)
    annotations: list[dict[str, Any]] = []
    if 0.06 <= kind < 0.12:
        label, mask = _swarm(rng, image)
        x, y, w, h = (int(v) for v in _extent(mask))
        keep_out[y : y + h, x : x + w] = True
        annotations.append(_annotation(label, mask, mask, crowd=True))
        count = min(count, 5)

    ranges = rng.choice(list(_RANGES), size=count, p=_RANGE_SHARES)
    sides = np.array([np.exp(rng.uniform(*np.log(_RANGES[r]))) for r in ranges])
    placed: list[tuple[int, np.ndarray, np.ndarray, float]] = []  # class, own mask, visible part, full area
    for side in sides[np.argsort(-sides * rng.uniform(0.7, 1.4, count))]:  # large objects mostly at the back
        label = int(rng.integers(len(CLASSES)))
        tile = _draw_object(rng, label, side**2, (0.92 * width, 0.92 * height))
        (h, w), full = tile.shape[:2], float((tile[..., 3] > 0.5).sum())
        beyond = 0.35 if rng.random() < 0.2 else 0.0  # share of the object that may lie outside the image
        overlap = 0.04 if rng.random() < 0.75 else 0.3  # share of the object that may cover other objects
        for _ in range(24):  # attempts to find a place where it does not hide too much of another object
            x = int(rng.uniform(-beyond * w, max(1.0, width - (1 - beyond) * w)))
            y = int(rng.uniform(-beyond * h, max(1.0, height - (1 - beyond) * h)))
            mask = mask_on(tile, x, y, image.shape)
            hidden = sum(np.count_nonzero(seen & mask) for _, _, seen, _ in placed)
            if mask.sum() < 0.6 * full or hidden > overlap * mask.sum() or (mask & keep_out).any():
                continue
            left = [(cls, own, seen & ~mask, area) for cls, own, seen, area in placed]
            if all(seen.sum() >= _MIN_VISIBLE * area for _, _, seen, area in left):
                paste(image, tile, x, y)
                placed = [*left, (label, mask, mask, full)]
                break
    annotations += [_annotation(cls, own, seen) for cls, own, seen, _ in placed]
    image += rng.normal(0, rng.uniform(1, 4), image.shape)  # grain
    return np.clip(image * rng.uniform(0.92, 1.08), 0, 255).astype(np.uint8), annotations


# ---------------------------------------------------------------- the data set


def _split_info(split: str, count: int, seed: int) -> dict[str, Any]:
    return {
        "description": "Halloween scenes drawn by detection/data/synthetic/demo.py",
        "generator": GENERATOR,
        "version": VERSION,
        "parameters": {"split": split, "images": count, "seed": seed},
    }


def _name(split: str, index: int) -> str:
    return f"{split}_{index:06d}.jpg"


def _read_split(root: Path, split: str) -> tuple[dict[str, Any] | None, list[Path]]:
    """Info and images of a split that this module wrote; (None, []) if there is none."""
    target = root / f"{split}.json"
    if not target.exists():
        return None, []
    try:
        old = json.loads(read_file(target, "annotation file", largest=LARGEST))
        if old["info"]["generator"] != GENERATOR:
            return None, []
        names = [image["file_name"] for image in old["images"]]
        return old["info"], [root / "images" / name for i, name in enumerate(names) if name == _name(split, i)]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None, []


def _make_split(root: Path, split: str, count: int, seed: int, replaced: list[Path]) -> None:
    target, images, info = root / f"{split}.json", root / "images", _split_info(split, count, seed)
    target.unlink(missing_ok=True)  # first, so that the file never describes images of another dataset
    for old in replaced:
        old.unlink(missing_ok=True)
    images.mkdir(parents=True, exist_ok=True)
    data: dict[str, Any] = {
        "info": info,
        "licenses": [{"id": 1, "name": "Apache-2.0; generated by this project", "url": ""}],
        "categories": [{"id": i, "name": name} for i, name in zip(CATEGORY_IDS, CLASSES, strict=True)],
        "images": [],
        "annotations": [],
    }
    for index in range(count):
        image, annotations = draw_scene(np.random.default_rng([seed, SPLITS.index(split), index]))
        name, image_id = _name(split, index), 1 + 3 * index + index % 2  # ids with gaps, as in COCO
        encoded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
        begin_output(images / name)
        (images / name).write_bytes(encoded.tobytes())
        height, width = image.shape[:2]
        entry = {"id": image_id, "file_name": name, "width": width, "height": height, "license": 1}
        data["images"].append(entry)
        for number, annotation in enumerate(annotations, len(data["annotations"]) + 1):
            data["annotations"].append({"id": number, "image_id": image_id, **annotation})
    write_atomically(target, lambda file: file.write(json.dumps(data).encode()))


def make_demo_dataset(
    root: str | Path, *, train_images: int = 300, val_images: int = 60, seed: int = 0, force: bool = False
) -> dict[str, Path]:
    """Write the demo dataset in COCO format: `root/images/*.jpg`, `root/train.json`, `root/val.json`.

    An existing demo dataset with the same parameters stays as it is; one with other parameters is replaced. The JSON
    files are written last and atomically: after a kill, nothing looks complete that is not.

    Args:
        root: folder, which is created if it is absent.
        train_images: images in the training split, at least 1.
        val_images: images in the validation split, at least 1.
        seed: 0 or more; another seed gives other images.
        force: overwrite files that this toolkit did not write.

    Returns:
        The paths under the keys "images", "train" and "val".

    Raises:
        UserError: a number is out of range, the folder is not writable, or a file of the user would be overwritten.
    """
    if min(train_images, val_images) < 1 or seed < 0:
        raise UserError("a split needs at least 1 image, and the seed can't be negative")
    root = Path(root)
    counts = {"train": train_images, "val": val_images}
    outputs: list[Path] = []
    replaced: dict[str, list[Path]] = {}
    for split in SPLITS:
        info, images = _read_split(root, split)
        whole = len(images) == counts[split] and all(image.is_file() for image in images)
        if info != _split_info(split, counts[split], seed) or not whole:
            new = [root / "images" / _name(split, i) for i in range(counts[split])]
            # Images that an earlier demo dataset lists are ours, even without a note.
            outputs += sorted({*new} - {*images}) + ([root / f"{split}.json"] if info is None else [])
            replaced[split] = images
    check_outputs(outputs, force=force)
    for split, images in replaced.items():
        _make_split(root, split, counts[split], seed, images)
    return {"images": root / "images", **{split: root / f"{split}.json" for split in SPLITS}}


def summarize(json_path: str | Path) -> str:
    """A few lines about a COCO file: images, boxes per class and per size, and crowd regions."""
    data = json.loads(Path(json_path).read_text(encoding="utf-8"))
    names = {c["id"]: c["name"] for c in data["categories"]}
    single = [a for a in data["annotations"] if not a["iscrowd"]]
    classes = Counter(names[a["category_id"]] for a in single)
    sizes = Counter(("small", "medium", "large")[(a["area"] >= 32**2) + (a["area"] > 96**2)] for a in single)
    empty = len(data["images"]) - len({a["image_id"] for a in data["annotations"]})
    lines = (
        f"{Path(json_path).name}: {len(data['images'])} images ({empty} of them empty), "
        f"{len(single)} boxes, {len(data['annotations']) - len(single)} crowd regions",
        "  classes: " + ", ".join(f"{name} {classes[name]}" for name in names.values()),
        "  sizes: " + ", ".join(f"{name} {sizes[name]}" for name in _RANGES),
    )
    return "\n".join(lines)
