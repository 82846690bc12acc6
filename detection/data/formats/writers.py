"""Writes annotations in each of the formats, and reports what a format cannot represent."""

import os
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import numpy as np
import yaml

from detection.core.errors import UserError
from detection.core.files import make_folder, open_regular_file, write_atomically
from detection.data.annotations import Annotations
from detection.data.formats.coco_copy import copy_entries

Parts = Mapping[str, Annotations]
"""Split ("train", "val", …) -> its annotations."""


def write_coco(parts: Parts, out: Path, images: str) -> list[str]:
    """Write OUT/train.json, … and OUT/images/. Returns notes about losses."""
    taken = _Names()
    notes = []
    for split, annotations in parts.items():
        new = {}
        if images != "none":  # images that stay in place keep their names
            free = [taken.free(_short(name, split), source) for name, source in _files(annotations)]
            new = dict(zip(annotations.image_ids.tolist(), free, strict=True))
        path = out / f"{split}.json"
        if annotations.format == "coco" and copy_entries(annotations, path, new):
            continue
        if annotations.format == "coco":
            notes.append(f"{annotations.source} holds more than JSON has (NaN?): polygons and the like are lost")
        content = annotations.to_coco()
        for entry in content["images"]:
            entry["file_name"] = new.get(entry["id"], entry["file_name"])
        data = msgspec.json.encode(content)
        write_atomically(path, lambda file, data=data: file.write(data))
    _place(taken.files, out / "images", images)
    return notes


def write_voc(parts: Parts, out: Path, images: str) -> list[str]:
    """Write OUT/Annotations, OUT/ImageSets/Main/train.txt, … and OUT/JPEGImages. Returns notes about losses."""
    for folder in ("Annotations", "ImageSets/Main"):
        make_folder(out / folder, "output folder")
    taken = _Names(by_stem=True)
    sets: dict[str, list[str]] = {}
    for split, annotations in parts.items():
        sets[split] = []
        for i, (name, source) in enumerate(_files(annotations)):
            own = taken.free(_short(name, split).replace("/", "_"), source)
            stem = os.path.splitext(own)[0]
            if stem in sets[split]:
                raise UserError(f"{annotations.source} has the image {name} twice, which VOC cannot tell apart")
            if images == "none" and own != name:
                raise UserError(f"VOC needs another name for {name} ({own}): --transfer must be copy or link")
            sets[split].append(stem)
            _write(out / "Annotations" / f"{stem}.xml", ET.tostring(_voc_tree(annotations, i, own), encoding="utf-8"))
        _write(out / "ImageSets" / "Main" / f"{split}.txt", "".join(f"{stem}\n" for stem in sets[split]).encode())
    _place(taken.files, out / "JPEGImages", images)
    notes = []
    both = sum(map(len, sets.values())) - len(taken.files)
    if both:
        notes.append(f"{both} images are in more than one part; VOC has one annotation of each, the last one counts")
    crowd = sum(int(annotations.crowd.sum()) for annotations in parts.values())
    if crowd:
        notes.append(f"{crowd} crowd regions are written as difficult objects")
    used = {label for annotations in parts.values() for label in np.unique(annotations.labels).tolist()}
    names = next(iter(parts.values())).class_names
    unused = [name for label, name in enumerate(names, 1) if label not in used]
    if unused:
        notes.append(f"{len(unused)} classes without a box are lost, since VOC has no list of classes: {_some(unused)}")
    return [*notes, *_areas_lost(parts)]


def write_yolo(parts: Parts, out: Path, images: str) -> list[str]:
    """Write OUT/data.yaml, OUT/images/train, OUT/labels/train, … Returns notes about losses."""
    notes = []
    clipped = dropped = 0
    for split, annotations in parts.items():
        taken = _Names(by_stem=True)
        for i, (name, source) in enumerate(_files(annotations)):
            own = taken.free(_short(name, split), source)
            lines, changed, lost = _yolo_lines(annotations, i)
            clipped, dropped = clipped + changed, dropped + lost
            path = out / "labels" / split / f"{os.path.splitext(own)[0]}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, "".join(lines).encode())
        _place(taken.files, out / "images" / split, images)
    names = dict(enumerate(next(iter(parts.values())).class_names))
    content = {**{split: f"images/{split}" for split in parts}, "names": names}
    _write(out / "data.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode())
    crowd = sum(int(annotations.crowd.sum()) for annotations in parts.values())
    if crowd:
        notes.append(f"{crowd} crowd regions are lost: YOLO has no place for them, and they are no single objects")
    if clipped:
        notes.append(f"{clipped} boxes are clipped to their images, since YOLO's readers refuse what reaches out")
    if dropped:
        notes.append(f"{dropped} boxes without any area in their images are left out")
    return [*notes, *_areas_lost(parts)]


WRITERS: dict[str, Callable[[Parts, Path, str], list[str]]] = {"coco": write_coco, "voc": write_voc, "yolo": write_yolo}


class _Names:
    """Unique new names of images, also for file systems that ignore case.

    Args:
        by_stem: whether a.jpg and a.png are the same name, since they would share a label file.
    """

    def __init__(self, *, by_stem: bool = False) -> None:
        self.by_stem = by_stem
        self.files: dict[str, Path] = {}
        """New name -> the image."""
        self._have: dict[str, str] = {}

    def free(self, name: str, source: Path) -> str:
        """`name`, or name_2, name_3, … if another image already has it."""
        stem, suffix = os.path.splitext(name)
        number = 1
        while True:
            own = f"{stem}_{number}{suffix}" if number > 1 else name
            other = self._have.setdefault(os.path.splitext(own)[0].lower() if self.by_stem else own.lower(), own)
            if self.files.setdefault(other, source) == source:
                return other
            number += 1


def _yolo_lines(annotations: Annotations, i: int) -> tuple[list[str], int, int]:
    """Lines of a label file, number of clipped boxes, and number of boxes that are left out."""
    rows = np.arange(annotations.offsets[i], annotations.offsets[i + 1])
    rows = rows[~annotations.crowd[rows]]
    width, height = annotations.sizes[i].tolist()
    lines, clipped, dropped = [], 0, 0
    for row in rows.tolist():
        x, y, w, h = annotations.boxes[row].tolist()
        x1, y1, x2, y2 = max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)
        if x2 <= x1 or y2 <= y1:
            dropped += 1
            continue
        # Ignore rounding errors.
        clipped += max(x1 - x, y1 - y, x + w - x2, y + h - y2) > 1e-3
        shares = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
        lines.append(f"{annotations.labels[row] - 1} {' '.join(f'{share:.10g}' for share in shares)}\n")
    return lines, clipped, dropped


def _voc_tree(annotations: Annotations, i: int, file_name: str) -> ET.Element:
    root = ET.Element("annotation")
    _add(root, "folder", "JPEGImages")
    _add(root, "filename", file_name)
    size = ET.SubElement(root, "size")
    for key, value in zip(("width", "height", "depth"), (*annotations.sizes[i].tolist(), 3), strict=True):
        _add(size, key, str(value))
    for row in range(annotations.offsets[i], annotations.offsets[i + 1]):
        item = ET.SubElement(root, "object")
        _add(item, "name", annotations.class_names[annotations.labels[row] - 1])
        _add(item, "difficult", str(int(annotations.crowd[row])))
        box = ET.SubElement(item, "bndbox")
        x, y, w, h = annotations.boxes[row].tolist()
        for key, value in zip(("xmin", "ymin", "xmax", "ymax"), (x + 1, y + 1, x + w, y + h), strict=True):
            # Without decimals if possible: many readers of VOC accept only whole numbers.
            _add(box, key, f"{value:.4f}".rstrip("0").rstrip("."))
    ET.indent(root)
    return root


def _add(parent: ET.Element, key: str, text: str) -> None:
    ET.SubElement(parent, key).text = text


def _files(annotations: Annotations) -> list[tuple[str, Path]]:
    return [(str(name), Path(annotations.images) / str(name)) for name in annotations.file_names]


def _short(name: str, split: str) -> str:
    """A name without redundant folders: images/train/a/b.jpg of split train -> a/b.jpg. It never leads out of OUT."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    if name.startswith("/"):
        parts = parts[-1:]
    if "images" in parts[:-1]:
        parts = parts[len(parts) - parts[::-1].index("images") :]
    return "/".join(parts[1:] if len(parts) > 1 and parts[0] == split else parts)


def _place(taken: Mapping[str, Path], folder: Path, how: str) -> None:
    """Copy images to their new names, or link them symbolically; `how`: "copy", "link" or "none"."""
    if how == "none":
        return
    try:
        for name, source in taken.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if how == "link":
                path.symlink_to(os.path.abspath(source))
                continue
            with open_regular_file(source, "image") as old, path.open("xb") as new:
                shutil.copyfileobj(old, new, 1 << 20)
    except OSError as error:
        raise UserError(f"image {error.filename} -> {folder}: {error.strerror}") from None


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror}") from None


def _areas_lost(parts: Parts) -> list[str]:
    different = sum(int((np.abs(i.areas - i.boxes[:, 2] * i.boxes[:, 3]) > 1).sum()) for i in parts.values())
    if not different:
        return []
    return [f"the areas of {different} boxes (of their polygons, say) are lost: they will be width x height"]


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
