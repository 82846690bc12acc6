"""Copies the entries of some images of a COCO file to a new file with all their content: polygons, licences, …"""

from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import msgspec

from detection.core.files import open_regular_file, write_atomically
from detection.data.annotations import Annotations
from detection.data.formats.coco import LISTS
from detection.data.formats.json_stream import top_level_lists


class _Ids(msgspec.Struct, gc=False):
    """Ids of an entry of any of the three lists; numbers may be written as 1.0."""

    id: int | float | str | None = None
    image_id: int | float | None = None
    category_id: int | float | None = None


def copy_entries(annotations: Annotations, out: Path, names: Mapping[int, str]) -> bool:
    """Write the entries of the images and classes of `annotations` to `out`, as in the COCO file `annotations.source`.

    Entries are copied byte by byte, except for file names of images whose ids are in `names`. The file is read in
    windows, so that memory does not grow with its size.

    Returns:
        Whether the file was written; not if entries contain values that are not JSON (such as NaN).
    """
    images, categories = set(annotations.image_ids.tolist()), set(annotations.category_ids.tolist())
    entries = msgspec.json.Decoder(list[msgspec.Raw])
    ids = msgspec.json.Decoder(_Ids)

    def wanted(key: str, entry: msgspec.Raw) -> bool:
        of = ids.decode(entry)
        if key == "annotations":
            return of.image_id in images and of.category_id in categories
        return of.id in (images if key == "images" else categories)

    def write(file: BinaryIO, source: BinaryIO) -> None:
        before = b"{"
        for key in ("licenses", *LISTS):  # in this order, whatever that of the source: one pass for each
            source.seek(0)
            file.write(before + b'"' + key.encode() + b'": [')
            comma = b""
            for chunk in top_level_lists(source, (key,)):
                for entry in entries.decode(chunk.text):
                    if key != "licenses" and not wanted(key, entry):
                        continue
                    text = bytes(entry)
                    if key == "images":
                        content = msgspec.json.decode(text)
                        if content["id"] in names:
                            text = msgspec.json.encode({**content, "file_name": names[content["id"]]})
                    file.write(comma + text)
                    comma = b",\n"
            file.write(b"]")
            before = b",\n"
        file.write(b"}\n")

    try:
        with open_regular_file(annotations.source, "annotation file") as source:
            write_atomically(out, lambda file: write(file, source))
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return False
    return True
