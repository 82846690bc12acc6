"""Reads COCO detection files (instances_*.json) in windows into arrays; polygons are skipped.

msgspec decodes the needed fields of the entries. If an entry of a window does not match (a bbox of three numbers, NaN,
text as id), Python's json reads the window again, entry by entry, to describe each fault.
"""

import json
import math
import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import msgspec
import numpy as np

from detection.core.errors import UserError, shorten
from detection.core.files import open_regular_file
from detection.data.annotations import Annotations
from detection.data.formats.json_stream import Chunk, JsonError, NotAnObject, line_of, top_level_lists
from detection.data.formats.raw import Issues, RawAnnotations, printable, to_annotations

LISTS = ("images", "annotations", "categories")


Integer = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Side = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
FileName = Annotated[str, msgspec.Meta(pattern=r"^[^\x00]+$")]


class _Image(msgspec.Struct, gc=False):
    id: Integer
    file_name: FileName
    width: Side
    height: Side


class _Annotation(msgspec.Struct, gc=False):
    image_id: Integer
    category_id: Integer
    bbox: tuple[float, float, float, float]
    id: Integer | None = None
    area: float | None = None
    iscrowd: int | None = None


class _Category(msgspec.Struct, gc=False):
    id: Integer
    name: str


_DECODERS: dict[str, Any] = {
    "images": msgspec.json.Decoder(list[_Image]),
    "annotations": msgspec.json.Decoder(list[_Annotation]),
    "categories": msgspec.json.Decoder(list[_Category]),
}


def read_coco(path: str | Path) -> Annotations:
    """Read a COCO detection file strictly and without a cache; see `detect_format.read_annotations`.

    Raises:
        UserError: the file is absent, not JSON or not COCO, an annotation has an unknown image or category, or an id
            occurs twice; the message names the file and the entry.
    """
    return to_annotations(parse_coco(path))


def parse_coco(path: str | Path, images: str | Path | None = None) -> RawAnnotations:
    """Read the rows of the file, see `RawAnnotations`.

    Args:
        images: folder of the images, if it is not the usual one.

    Raises:
        UserError: the file is absent, not JSON, or lacks one of the three lists.
    """
    path = Path(path)
    try:
        with open_regular_file(path, "annotation file") as file:
            tables = _read(file, path)
    except OSError as error:
        raise UserError(f"annotation file {path} cannot be read: {error.strerror}") from None
    return tables.finish(str(path), Path(images) if images is not None else images_beside(path))


def files_of(folder: Path) -> list[Path]:
    """The COCO files of a folder, at the usual places: in it, in annotations/, or one per split (Roboflow)."""
    splits = [folder / name / "_annotations.coco.json" for name in ("train", "valid", "val", "test")]
    places = [*folder.glob("*.json"), *(folder / "annotations").glob("instances_*.json"), *filter(Path.is_file, splits)]
    return sorted(path for path in places if not path.name.startswith("."))


def split_of(path: Path) -> str:
    """Split by the name of a file: "val" for instances_val2017.json, val.json and valid/_annotations.coco.json."""
    name = path.parent.name if path.name.startswith("_annotations.coco") else path.stem
    name = name.removeprefix("instances_").rstrip("0123456789")
    return {"valid": "val", "validation": "val"}.get(name, name)


def find_file(path: Path, split: str | None) -> Path:
    """The COCO file for `split` in a folder, or the only one there; `path` itself if it is a file.

    Raises:
        UserError: there is none, or there are several.
    """
    if not path.is_dir():
        return path
    files = files_of(path)
    fitting = [file for file in files if split is not None and split_of(file) == split] or files
    if len(fitting) != 1:
        shown = (
            f"has several: {', '.join(str(file.relative_to(path)) for file in fitting)}; name one"
            if fitting
            else "has none"
        )
        raise UserError(f"expected is a COCO file (*.json), and folder {path} {shown}")
    return fitting[0]


def images_beside(path: Path) -> Path:
    """The usual folder of the images of a COCO file: train2017/ as in COCO, images/, or the folder of the file."""
    if path.name.startswith("_annotations.coco"):  # Roboflow
        return path.parent
    if path.parent.name != "annotations":
        return path.parent / "images"
    split, root = path.stem.removeprefix("instances_"), path.parent.parent
    places = [root / split, root / "images" / split, path.parent / "images", root / "images"]
    # If none exists, error messages name the usual one.
    return next((folder for folder in places if folder.is_dir()), places[0] if split != path.stem else places[2])


class _Tables:
    """The columns of the three lists, extended chunk by chunk."""

    def __init__(self) -> None:
        self.problems = Issues()
        self.categories: list[tuple[int, str]] = []
        self.image_ids: list[int] = []
        self.file_names: list[str] = []
        self.sizes: list[tuple[int, int]] = []
        self.boxes: list[np.ndarray] = []
        self.areas: list[np.ndarray] = []
        self.integers: list[np.ndarray] = []  # id, image_id, category_id, crowd
        self.counts = dict.fromkeys(LISTS, 0)

    def add(self, key: str, entries: Sequence[Any]) -> None:
        """Append valid entries of the list `key`."""
        number = self.counts[key]
        self.counts[key] += len(entries)
        if key == "categories":
            self.categories += [(c.id, c.name) for c in entries]
        elif key == "images":
            self.image_ids += [im.id for im in entries]
            self.file_names += [im.file_name for im in entries]
            self.sizes += [(im.width, im.height) for im in entries]
        else:
            count = len(entries)
            flat = chain.from_iterable(a.bbox for a in entries)
            self.boxes.append(np.fromiter(flat, np.float64, 4 * count).reshape(-1, 4))
            areas = (math.nan if a.area is None else a.area for a in entries)
            self.areas.append(np.fromiter(areas, np.float64, count))
            rows = np.empty((4, count), np.int64)
            rows[0] = [-number - i - 1 if a.id is None else a.id for i, a in enumerate(entries)]
            rows[1] = [a.image_id for a in entries]
            rows[2] = [a.category_id for a in entries]
            rows[3] = [-1 if a.iscrowd is None else a.iscrowd != 0 for a in entries]
            self.integers.append(rows)

    def finish(self, source: str, images: Path) -> RawAnnotations:
        integers = np.concatenate([np.empty((4, 0), np.int64), *self.integers], axis=1)
        return RawAnnotations(
            source=source,
            format="coco",
            images=images,
            categories=self.categories,
            image_ids=np.array(self.image_ids, np.int64),
            file_names=np.array(self.file_names, np.str_),
            sizes=np.array(self.sizes, np.int64).reshape(-1, 2),
            box_images=integers[1],
            box_categories=integers[2],
            boxes=np.concatenate([np.empty((0, 4)), *self.boxes]),
            areas=np.concatenate([np.empty(0), *self.areas]),
            crowd=integers[3].astype(np.int8),
            box_numbers=integers[0],
            problems=self.problems,
        )


def _read(file: BinaryIO, path: Path) -> _Tables:
    tables = _Tables()
    seen = set()
    try:
        for chunk in top_level_lists(file, LISTS):
            seen.add(chunk.key)
            try:
                tables.add(chunk.key, _DECODERS[chunk.key].decode(chunk.text))
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                _add_one_by_one(tables, chunk)
    except NotAnObject:
        pass
    except JsonError as error:
        line, column = line_of(file, error.offset)
        where = "" if os.fstat(file.fileno()).st_size == 0 else f" (line {line}, column {column})"
        raise UserError(f"annotation file {path} is not JSON: {error}{where}") from None
    for key in LISTS:
        if key not in seen:
            raise UserError(
                f"annotation file {path} is not in COCO format: it has no list {key!r} at the top "
                "(expected are images, annotations and categories)"
            )
    return tables


def _add_one_by_one(tables: _Tables, chunk: Chunk) -> None:
    try:
        text = chunk.text.decode()
    except UnicodeDecodeError as error:
        raise JsonError(f"it is not UTF-8 text ({error.reason})", chunk.offset + error.start - 1) from None
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise JsonError(error.msg, chunk.offset + len(text[: error.pos].encode()) - 1) from None
    except (ValueError, RecursionError) as error:  # a whole number of 5000 digits; 100 000 brackets
        raise JsonError(str(error), chunk.offset) from None
    check = {"images": _image, "annotations": _annotation, "categories": _category}[chunk.key]
    kind = {"images": "image", "annotations": "annotation", "categories": "category"}[chunk.key]
    for entry in entries:
        name = f"number {tables.counts[chunk.key] + 1}"
        if isinstance(entry, dict) and isinstance(entry.get("id"), str | int | float):
            name = str(entry["id"])
        good = check(entry, f"{kind} {name}", tables.problems)
        if good is None:
            tables.counts[chunk.key] += 1
        else:
            tables.add(chunk.key, [good])


def _image(entry: Any, name: str, problems: Issues) -> _Image | None:
    if not _has(entry, ("id", "file_name", "width", "height"), name, problems):
        return None
    number = _whole_id(entry["id"], "image", problems)
    if number is None:
        return None
    file_name = entry["file_name"]
    if not isinstance(file_name, str) or not file_name or "\0" in file_name or _broken(file_name):
        problems.add("bad_value", f"{name} has file_name {shorten(file_name)}; expected is the name of an image")
        return None
    sides = []
    for key in ("width", "height"):
        side = entry[key]
        if not _is_number(side) or not 1 <= side < 2**31:
            message = f"image {file_name} has {key} {shorten(side)}; expected are its pixels"
            problems.add("bad_size", message, image=file_name)
            side = 0
        sides.append(int(side))
    return _Image(number, file_name, *sides)


def _annotation(entry: Any, name: str, problems: Issues) -> _Annotation | None:
    if not _has(entry, ("image_id", "category_id", "bbox"), name, problems):
        return None
    ids = [_whole(entry[key]) for key in ("image_id", "category_id")]
    for key, value in zip(("image", "category"), ids, strict=True):
        if value is None:
            message = f"{name} names {key} {shorten(entry[f'{key}_id'])}, which the file does not have"
            problems.add(f"unknown_{key}", message)
            return None
    box, area = entry["bbox"], entry.get("area")
    good = isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))
    if not good or not (area is None or _is_number(area)):
        message = (
            f"{name} has bbox {shorten(box)}, area {shorten(area)}; "
            "expected are four numbers [x, y, width, height] in pixels and one number"
        )
        problems.add("bad_box", message)
        return None
    crowd = entry.get("iscrowd")
    if crowd is not None and not isinstance(crowd, int | float):
        problems.add("bad_value", f"{name} has iscrowd {shorten(crowd)}; expected is 0 or 1")
        return None
    numbers = [float(value) for value in box]
    return _Annotation(
        image_id=ids[0],  # type: ignore[arg-type]
        category_id=ids[1],  # type: ignore[arg-type]
        bbox=(numbers[0], numbers[1], numbers[2], numbers[3]),
        id=_whole(entry.get("id")),
        area=None if area is None else float(area),
        iscrowd=None if crowd is None else int(bool(crowd)),
    )


def _category(entry: Any, name: str, problems: Issues) -> _Category | None:
    if not _has(entry, ("id", "name"), name, problems):
        return None
    number = _whole_id(entry["id"], "category", problems)
    if not isinstance(entry["name"], str | int | float):
        problems.add("bad_value", f"{name} has name {shorten(entry['name'])}; expected is text")
        return None
    return None if number is None else _Category(number, printable(str(entry["name"])))


def _has(entry: Any, keys: tuple[str, ...], name: str, problems: Issues) -> bool:
    for key in keys:
        if not isinstance(entry, dict) or key not in entry:
            problems.add("missing_key", f"{name} has no {key!r}; a COCO file has {', '.join(keys)} there")
            return False
    return True


def _whole_id(value: Any, kind: str, problems: Issues) -> int | None:
    if not isinstance(value, int) or _whole(value) is None:
        problems.add("bad_value", f"{kind} id {shorten(value)} is not a whole number of 64 bits")
        return None
    return value


def _whole(value: Any) -> int | None:
    """1 and 1.0 -> 1; None unless the value is a whole number of 64 bits."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -(2**63) <= value < 2**63:
        return None
    return int(value) if value == int(value) else None


def _is_number(value: Any) -> bool:
    """Whether a value is a number. NaN and infinity are; `raw.checks` reports them."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**999)


def _broken(text: str) -> bool:
    """Whether a text has a lone surrogate (an escape like \\ud800), which no file system accepts."""
    return any("\ud800" <= character <= "\udfff" for character in text)
