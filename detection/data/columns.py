"""Named arrays in one file that is opened by memory map: all processes that open it share the pages.

    magic (8 bytes), BLAKE2b of all that follows (16), length of the header (8, little-endian), header (JSON), columns

Each column begins at a multiple of 64 bytes; the header tells type, shape and place. Little-endian throughout.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from detection.core.files import open_regular_file, write_atomically

MAGIC = b"GNDCOL\x00\x01"
START = len(MAGIC) + 16 + 8
ALIGNED = 64


@dataclass(frozen=True)
class ColumnFile:
    """What such a file holds."""

    path: Path
    digest: str
    header: dict[str, Any]
    columns: dict[str, np.ndarray]
    """Read-only, of memory that is the file."""


def write_columns(path: Path, header: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> None:
    """Write atomically. `header` is any JSON. Raises UserError where it cannot be written."""
    arrays = {name: np.ascontiguousarray(array, array.dtype.newbyteorder("<")) for name, array in columns.items()}
    places: dict[str, tuple[str, list[int], int]] = {}
    end = 0  # counted from the first column, since the header's length depends on what is in it
    for name, array in arrays.items():
        begin = _aligned(end)
        places[name] = (array.dtype.str, list(array.shape), begin)
        end = begin + array.nbytes
    text = json.dumps({**header, "columns": places}).encode()
    text += b" " * (_aligned(START + len(text)) - START - len(text))
    digest = hashlib.blake2b(digest_size=16)

    def write(file: BinaryIO) -> None:
        file.write(MAGIC + bytes(16))

        def add(data: Any) -> None:
            digest.update(data)
            file.write(data)

        add(len(text).to_bytes(8, "little"))
        add(text)
        at = 0
        for array in arrays.values():
            add(bytes(_aligned(at) - at))
            add(array.reshape(-1).view(np.uint8).data)
            at = _aligned(at) + array.nbytes
        file.seek(len(MAGIC))
        file.write(digest.digest())

    write_atomically(path, write)


def map_columns(path: Path, *, check: bool = True) -> ColumnFile:
    """Open by memory map. `check`: compare the digest with the whole content (a second for 1 GB).

    Raises:
        UserError: the file cannot be opened.
        ValueError: the file is of another kind, or damaged.
    """
    with open_regular_file(path) as file:
        whole = np.asarray(np.memmap(file, np.uint8, "r"))
    head = whole[:START].tobytes()
    if head[: len(MAGIC)] != MAGIC or len(head) < START:
        raise ValueError(f"{path} is not a column file")
    digest = head[len(MAGIC) : -8]
    if check and hashlib.blake2b(whole[START - 8 :].data, digest_size=16).digest() != digest:
        raise ValueError(f"{path} is damaged: its content is not what was written")
    length = int.from_bytes(head[-8:], "little")
    header = json.loads(whole[START : START + length].tobytes())
    columns = {}
    for name, (dtype, shape, place) in header.pop("columns").items():
        begin = START + length + place
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        columns[name] = whole[begin : begin + size].view(dtype).reshape(shape)
    return ColumnFile(path, digest.hex(), header, columns)


def _aligned(place: int) -> int:
    return -(-place // ALIGNED) * ALIGNED
