"""Reads YOLO folders: data.yaml, images/…/a.jpg, and labels/…/a.txt with lines `class cx cy w h` (shares of the sides).

Boxes become pixels of the upright image, whose size is read from the header of the file. A line of more numbers is a
polygon (`class x1 y1 x2 y2 …`) and becomes its bounding box. Class 0 has the category id 1, as in the COCO results of
Ultralytics. An image without a label file, or with an empty one, has no boxes.
"""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from detection.core import yaml_reader
from detection.core.errors import UserError
from detection.core.files import read_file
from detection.data.formats.raw import Issues, RawAnnotations
from detection.data.image_io import SUFFIXES, image_sizes, images_below, listed, names_outside, outside_message

LARGEST_FILE = 1 << 26
"""The most bytes of a label file."""
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


def parse_yolo(path: str | Path, images: str | Path | None = None, split: str | None = "train") -> RawAnnotations:
    """Read the label files into `RawAnnotations`.

    Args:
        path: data.yaml, or its folder.
        images: a folder of images, or a .txt file that lists them, instead of the entry in data.yaml.
        split: entry of data.yaml: "train", "val" or "test".

    Raises:
        UserError: data.yaml is absent or not YAML, or there are no class names, no such split, or no images.
    """
    path = find_yaml(Path(path))
    content = read_yaml(path)
    names = _names(content, path)
    root = _root(content, path)
    sources = [Path(images)] if images is not None else _sources(content, path, root, split)
    image_paths = list(dict.fromkeys(image for source in sources for image in _images(source, root)))
    if not image_paths:
        raise UserError(f"{path}: there are no images in {', '.join(map(str, sources))}")
    image_paths.sort()
    problems = Issues()
    sizes = image_sizes(image_paths)
    file_names = [_relative(image, root) for image in image_paths]
    label_files = [label_file_of(image) for image in image_paths]
    rows: list[tuple[int, int, int, float, float, float, float]] = []
    without = 0
    for image_id, (image, size, label_file) in enumerate(zip(file_names, sizes, label_files, strict=True), 1):
        if isinstance(size, UserError):
            problems.add("no_size", f"{size}; the size of each image is needed for its boxes", image=image)
            sizes[image_id - 1] = size = (0, 0)
        lines = _lines(label_file, problems, image)
        without += lines is None
        for number, line in enumerate(lines or [], 1):
            row = _line(line, len(names), f"{label_file}, line {number}", problems, image) if line.strip() else None
            if row is not None:
                label, cx, cy, w, h = row
                box = ((cx - w / 2) * size[0], (cy - h / 2) * size[1], w * size[0], h * size[1])
                rows.append((image_id, number, label + 1, *box))
    notes = []
    if without == len(image_paths):
        problems.add(
            "no_labels",
            f"not one of {len(image_paths)} images has a label file; for {image_paths[0]} it would be {label_files[0]}",
        )
    elif without:
        notes.append(f"{without} images without a label file: taken as without boxes")
    return RawAnnotations(
        source=f"{path} ({split})" if images is None and split else str(path),
        format="yolo",
        images=root,
        categories=list(enumerate(names, 1)),
        image_ids=np.arange(1, len(image_paths) + 1),
        file_names=np.array(file_names, np.str_),
        sizes=np.array(sizes, np.int64).reshape(-1, 2),
        box_images=np.array([row[0] for row in rows], np.int64),
        box_categories=np.array([row[2] for row in rows], np.int64),
        boxes=np.array([row[3:] for row in rows], np.float64).reshape(-1, 4),
        areas=np.full(len(rows), np.nan),
        crowd=np.zeros(len(rows), np.int8),
        box_numbers=np.array([row[1] for row in rows], np.int64),
        label_files=np.array(label_files, np.str_),
        problems=problems,
        notes=notes,
    )


def images_folder(path: Path, images: str | Path | None, split: str | None) -> Path:
    """The folder that file names are relative to; images and labels are not read.

    Raises:
        UserError: there is no data.yaml, there are no class names, no such split, or its images do not exist.
    """
    path = find_yaml(path)
    content = read_yaml(path)
    _names(content, path)
    root = _root(content, path)
    if images is not None:
        return Path(images).parent if Path(images).suffix.lower() == ".txt" else Path(images)
    _sources(content, path, root, split)
    return root


def find_yaml(path: Path) -> Path:
    """The only YAML file with class names in a folder; `path` itself if it is a file."""
    if not path.is_dir():
        return path
    found = yamls_of(path)
    if len(found) != 1:
        shown = f"has several: {', '.join(file.name for file in found)}; name one" if found else "has none"
        raise UserError(f"a YOLO set needs a data.yaml (path, train, val, names), and folder {path} {shown}")
    return found[0]


def yamls_of(folder: Path) -> list[Path]:
    """The YAML files of a folder that name classes."""
    files = [file for file in folder.iterdir() if file.suffix.lower() in (".yaml", ".yml")]
    found = []
    for file in sorted(files):
        try:
            if "names" in read_yaml(file):
                found.append(file)
        except UserError:
            continue  # a YAML file of something else
    return found


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a data.yaml. Raises UserError if it is absent, not YAML, or not a mapping."""
    content, _ = yaml_reader.read_yaml(path, "YAML file")
    if not isinstance(content, dict):
        raise UserError(f"{path} is no data.yaml: expected are the keys path, train, val and names")
    return content


def splits_of(path: Path) -> list[str]:
    """Those of train, val and test that a data.yaml has."""
    content = read_yaml(find_yaml(path))
    return [split for split, keys in SPLITS.items() if any(content.get(key) for key in keys)]


def label_file_of(image: str) -> str:
    """…/images/x/a.jpg -> …/labels/x/a.txt (for the last folder "images"), or beside the image."""
    before, found, behind = image.rpartition(f"{os.sep}images{os.sep}")
    moved = f"{before}{os.sep}labels{os.sep}{behind}" if found else image
    return os.path.splitext(moved)[0] + ".txt"


def _names(content: dict[str, Any], path: Path) -> list[str]:
    names = content.get("names")
    if isinstance(names, dict):
        numbers = list(range(len(names)))
        if sorted(names, key=str) != sorted(numbers, key=str):
            raise UserError(f"{path}: names must have the numbers 0…{len(names) - 1}, not {', '.join(map(str, names))}")
        names = [names[number] for number in numbers]
    if not isinstance(names, list) or not names:
        raise UserError(f"{path} has no names; expected is a list of classes, or numbers with their classes")
    count = content.get("nc")
    if count is not None and count != len(names):
        raise UserError(f"{path}: nc is {count!r}, and there are {len(names)} names")
    return [str(name) for name in names]


def _root(content: dict[str, Any], path: Path) -> Path:
    """`path` of data.yaml, relative to its folder or to the working directory; its folder if there is no `path`."""
    said = content.get("path")
    if not said:
        return path.absolute().parent
    for folder in (path.absolute().parent / str(said), Path(str(said)).absolute()):
        if folder.is_dir():
            return Path(os.path.normpath(folder))
    # The path is from another machine; try the same folder beside the file.
    return path.absolute().parent


def _sources(content: dict[str, Any], path: Path, root: Path, split: str | None) -> list[Path]:
    keys = SPLITS.get(split or "train", (split or "train",))
    said = next((content[key] for key in keys if content.get(key)), None)
    if said is None:
        known = [key for key in (*SPLITS["train"], *SPLITS["val"], *SPLITS["test"]) if content.get(key)]
        raise UserError(f"{path} has no {split!r}; it has {', '.join(known) or 'neither train nor val nor test'}")
    sources = []
    for entry in map(str, said if isinstance(said, list) else [said]):
        # Roboflow writes ../train/images for train/images.
        places = [root / entry, root / entry.removeprefix("../")]
        found = next((place for place in places if place.exists()), None)
        if found is None:
            raise UserError(f"{path}: {split} is {entry!r}, and {places[0]} does not exist")
        sources.append(found)
    return sources


def _images(source: Path, root: Path) -> list[str]:
    """Absolute paths of the images in a folder or in the list of a .txt file."""
    if source.is_dir():
        folder = os.path.abspath(source)
        return [os.path.join(folder, name) for name in images_below(source)]
    if source.suffix.lower() != ".txt":
        raise UserError(f"{source} is neither a folder of images nor a .txt file that lists them")
    images = []
    for number, line in listed(source, "list of images"):
        if os.path.splitext(line)[1].lower() not in SUFFIXES:
            raise UserError(f"{source}, line {number}: {line[:100]!r} is not the name of an image")
        beside = source.absolute().parent
        place = beside if os.path.exists(beside / line) else root
        if names_outside([line], place) and names_outside([line], root):
            raise UserError(
                f"{source}, line {number}: {outside_message(line, root)}; `path` in data.yaml names that folder"
            )
        images.append(os.path.normpath(place / line))
    return images


def _relative(image: str, root: Path) -> str:
    prefix = f"{root}{os.sep}"
    return image.removeprefix(prefix).replace(os.sep, "/")


def _lines(path: str, problems: Issues, image: str) -> list[str] | None:
    """Lines of a label file; None if the file is absent."""
    if not os.path.lexists(path):
        return None
    try:
        return read_file(path, "label file", largest=LARGEST_FILE).decode("utf-8-sig").splitlines()
    except UserError as error:
        problems.add("not_readable", str(error), image=image)
    except UnicodeDecodeError as error:
        problems.add("not_readable", f"{path} is not text: {error.reason} at byte {error.start}", image=image)
    return []


def _line(
    line: str, classes: int, place: str, problems: Issues, image: str
) -> tuple[int, float, float, float, float] | None:
    """(class, cx, cy, w, h)"""
    words = line.split()
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    polygon = len(words) >= 7 and len(words) % 2 == 1
    if not numbers or not (len(words) == 5 or polygon):
        message = f"{place} is {line.strip()[:60]!r}; expected are five numbers: class, cx, cy, w, h"
        problems.add("bad_line", message, image=image)
        return None
    if not 0 <= numbers[0] < classes or numbers[0] != int(numbers[0]):
        message = f"{place} has class {words[0]}; data.yaml has the classes 0…{classes - 1}"
        problems.add("bad_class", message, image=image)
        return None
    if not (max(numbers[1:]) <= 2 and min(numbers[1:]) >= -2) or any(map(math.isnan, numbers)):
        message = f"{place} is {line.strip()[:60]!r}; expected are shares of the image's sides (0…1), not pixels"
        problems.add("bad_box", message, image=image)
        return None
    label = int(numbers[0])
    if polygon:
        x1, x2, y1, y2 = min(numbers[1::2]), max(numbers[1::2]), min(numbers[2::2]), max(numbers[2::2])
        return label, (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
    return label, numbers[1], numbers[2], numbers[3], numbers[4]
