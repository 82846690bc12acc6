"""The index of a large annotation file, kept in a binary file beside it and opened by memory map.

It is taken only where it was made, by this version of the reader, of a file with the size, the time of change and
samples of the current content of the annotation file; otherwise it is created again.
"""

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

from detection.core.errors import UserError
from detection.core.files import CACHE_FOLDER, open_regular_file, sample_digest
from detection.data.annotations import COLUMNS, Annotations
from detection.data.columns import map_columns, write_columns

log = logging.getLogger("detection")

VERSION = 3
"""To be raised whenever the reader makes something else of the same file, or the index has other columns."""
Stamp = dict[str, Any]
FROM_BYTES = 1 << 24
"""Smaller files are read in a fifth of a second and need no cache."""


def open_cached(path: Path, stamp: Stamp, images: str) -> Annotations | None:
    """The index of annotation file `path` as it was kept; None where there is none that fits its `stamp_of`."""
    for place in places_of(path):
        try:
            file = map_columns(place)
        except (UserError, OSError, ValueError, KeyError, TypeError) as error:
            log.debug("%s is not used: %s", place, error)
            continue
        header = file.header
        if header.get("version") == VERSION and header.get("stamp") == stamp and set(file.columns) == set(COLUMNS):
            columns: dict[str, Any] = file.columns
            return Annotations(
                source=str(path),
                format=header["format"],
                images=images,
                class_names=tuple(header["class_names"]),
                notes=tuple(header["notes"]),
                mapped=file,
                **columns,
            )
    return None


def keep(path: Path, stamp: Stamp, annotations: Annotations) -> Annotations:
    """Write the index of the annotation file `path` beside it or under ~/.cache, and open it from there.

    Args:
        stamp: `stamp_of` the file as it was before it was read, lest a change meanwhile go unseen.

    If neither place is writable, return the index itself.
    """
    header = {
        "version": VERSION,
        "stamp": stamp,
        "format": annotations.format,
        "class_names": annotations.class_names,
        "notes": annotations.notes,
    }
    columns = {name: getattr(annotations, name) for name in COLUMNS}
    for place in places_of(path):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_columns(place, header, columns)
        except (OSError, UserError) as error:
            log.debug("%s", error)
            continue
        return open_cached(path, stamp, annotations.images) or annotations
    log.warning(
        "the index of %s could be kept neither beside it nor in %s: it is read anew each time", path, CACHE_FOLDER
    )
    return annotations


def places_of(path: Path) -> tuple[Path, Path]:
    """Where the index of annotation file `path` may be, the first choice first."""
    absolute = os.path.realpath(path)
    key = hashlib.sha256(absolute.encode("utf-8", "surrogateescape")).hexdigest()[:20]
    return Path(absolute).with_name(f".{Path(absolute).name}.index"), CACHE_FOLDER / f"annotations-{key}.index"


def stamp_of(path: Path) -> Stamp:
    """What tells that the file is the one that was read; a megabyte of it at most is looked at."""
    with open_regular_file(path, "annotations") as file:
        status = os.fstat(file.fileno())
        return {"size": status.st_size, "changed": status.st_mtime_ns, "samples": sample_digest(file)}
