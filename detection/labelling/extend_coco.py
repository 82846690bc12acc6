"""Adds boxes of a detector to a COCO file; its own entries stay as they are."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import msgspec

from detection.core.files import open_regular_file, write_atomically
from detection.data.formats.json_stream import top_level_lists
from detection.labelling.merge import AddedBoxes, MergedClasses


def extend_coco(path: Path, classes: MergedClasses, added: AddedBoxes) -> None:
    """Rewrite a COCO file with the boxes and classes that a detector adds.

    Added annotations have the keys "score" and "source"; doubtful ones have "iscrowd": 1. Of the entries that are
    there, only category ids change, and only where a class has another id in `classes`. The file is read in windows,
    so that memory does not grow with it.
    """

    def write(file: BinaryIO, source: BinaryIO) -> None:
        lists = {
            "licenses": _entries(source, "licenses"),
            "images": _entries(source, "images"),
            "annotations": _annotations(source, classes.new_id, added),
            "categories": _categories(source, classes),
        }
        before = b"{"
        for key, entries in lists.items():
            file.write(before + b'"' + key.encode() + b'": [')
            comma = b""
            for entry in entries:
                file.write(comma + entry)
                comma = b",\n"
            before = b"],\n"
        file.write(b"]}\n")

    with open_regular_file(path, "annotation file") as source:
        write_atomically(path, lambda file: write(file, source))


def _entries(source: BinaryIO, key: str) -> Iterator[bytes]:
    """The entries of a list as they stand in the file."""
    decoder = msgspec.json.Decoder(list[msgspec.Raw])
    source.seek(0)
    for chunk in top_level_lists(source, (key,)):
        for entry in decoder.decode(chunk.text):
            yield bytes(entry)


def _annotations(source: BinaryIO, new_id: Mapping[int, int], added: AddedBoxes) -> Iterator[bytes]:
    moved = any(old != new for old, new in new_id.items())
    largest = 0
    for text in _entries(source, "annotations"):
        entry = msgspec.json.decode(text)
        number = entry.get("id")
        largest = max(largest, int(number)) if isinstance(number, int | float) else largest
        if moved:
            text = msgspec.json.encode({**entry, "category_id": new_id[entry["category_id"]]})
        yield text
    columns = (added.image_ids, added.category_ids, added.boxes, added.scores, added.doubtful)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    for number, (image_id, category_id, box, score, doubtful) in enumerate(rows, largest + 1):
        entry = {
            "id": number, "image_id": image_id, "category_id": category_id, "bbox": box, "area": box[2] * box[3],
            "iscrowd": int(doubtful), "score": score, "source": added.source,
        }  # fmt: skip
        yield msgspec.json.encode(entry)


def _categories(source: BinaryIO, classes: MergedClasses) -> Iterator[bytes]:
    own = {}
    for text in _entries(source, "categories"):
        entry = msgspec.json.decode(text)
        own[classes.new_id[entry["id"]]] = entry
    for number, name in zip(classes.ids, classes.names, strict=True):
        yield msgspec.json.encode({**own.get(number, {"name": name}), "id": number})
