"""A cache of the arrays of a large annotation file: a binary file beside it, which is memory-mapped.

The cache is valid if this version of the reader wrote it for a file with the same size, time of change and samples of
the content as the current annotation file; otherwise it is written again.
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
"""Increase this if the reader returns other values for the same file, or if the columns change."""
Stamp = dict[str, Any]
FROM_BYTES = 1 << 24
"""Smaller files are read in a fifth of a second and need no cache."""


def open_cached(path: Path, stamp: Stamp, images: str) -> Annotations | None:
    """Open the cache of the annotation file `path`; None if no cache has this `stamp`."""
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
    """Write the cache of the annotation file `path` beside it or below ~/.cache, and open it.

    If neither place is writable, return `annotations` themselves.

    Args:
        stamp: `stamp_of` the file before it was read, so that a change in between makes the cache invalid.
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
        "no cache of %s can be written beside it or in %s: it is read again each time",
        path,
        CACHE_FOLDER,
    )
    return annotations


def places_of(path: Path) -> tuple[Path, Path]:
    """Possible places of the cache of annotation file `path`, the preferred one first."""
    absolute = os.path.realpath(path)
    key = hashlib.sha256(absolute.encode("utf-8", "surrogateescape")).hexdigest()[:20]
    return Path(absolute).with_name(f".{Path(absolute).name}.index"), CACHE_FOLDER / f"annotations-{key}.index"


def stamp_of(path: Path) -> Stamp:
    """Size, time of change and a digest of samples, which identify a state of the file; reads at most a megabyte."""
    with open_regular_file(path, "annotations") as file:
        status = os.fstat(file.fileno())
        return {"size": status.st_size, "changed": status.st_mtime_ns, "samples": sample_digest(file)}
