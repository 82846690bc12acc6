"""Limits for files of weights, known from their headers before memory is taken."""

import os
import stat
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

LARGEST_FILE_VARIABLE = "GHOSTNET_LARGEST_FILE"
"""Environment variable: the largest file of weights that is read, in GiB."""
LARGEST_FILE = 2.0
LARGEST_DIRECTORY = 1 << 24
"""Of the list of records of a zip file, in bytes."""


class Unreadable(ValueError):
    """Why a file cannot be read; the message goes on after "weights file … cannot be read: "."""


def check_size(path: str | os.PathLike[str]) -> int:
    """The size of a regular file in bytes.

    Raises:
        Unreadable: it is no regular file, it is empty, or it is larger than `LARGEST_FILE_VARIABLE` allows.
        OSError: it is not there.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise Unreadable("it is not a regular file")
    text = os.environ.get(LARGEST_FILE_VARIABLE, str(LARGEST_FILE))
    try:
        limit = float(text) * 2**30
    except ValueError:
        raise Unreadable(f"the environment variable {LARGEST_FILE_VARIABLE}={text} is not a number (of GiB)") from None
    if status.st_size > limit:
        raise Unreadable(
            f"it has {status.st_size / 2**30:.1f} GiB, the limit is {text}; {LARGEST_FILE_VARIABLE}=… in the "
            "environment raises it"
        )
    if status.st_size == 0:
        raise Unreadable("it is empty")
    return status.st_size


def read_whole(path: Path) -> bytearray:
    """The content of a regular file. Raises Unreadable, see `check_size`."""
    content = bytearray(check_size(path))
    with path.open("rb") as file:
        if file.readinto(content) != len(content):
            raise Unreadable("it became shorter while it was read")
    return content


def zip_records(file: BinaryIO, size: int, *, largest_compressed: int = 0) -> list[zipfile.ZipInfo]:
    """The records of a zip file, after a check of the sizes that its directory tells, before any of them is read.

    Args:
        size: of the file.
        largest_compressed: how many bytes all compressed records together may expand to.

    Raises:
        Unreadable: no whole zip file, or one that expands to more than its own size.
    """
    file.seek(max(0, size - 98))
    tail = file.read().rjust(98, b"\0")
    if tail[-22:-18] != b"PK\x05\x06":
        raise Unreadable("it is truncated or damaged: its end is not that of a zip file")
    length, start = struct.unpack("<2L", tail[-10:-2])
    end = size - 22
    if tail[-42:-38] == b"PK\x06\x07":  # a zip file of 64 bits, as PyTorch writes them
        end = size - 98
        length, start = struct.unpack("<2Q", tail[-58:-42])
        if struct.unpack("<Q", tail[-34:-26]) != (end,):
            raise Unreadable("its directory is damaged")
    # Readers of zip files take different directories where these do not agree.
    if start + length != end:
        raise Unreadable("its directory is damaged")
    if length > LARGEST_DIRECTORY:
        raise Unreadable(f"its directory has {length:,} bytes, which no file of weights needs")
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, UnicodeDecodeError, NotImplementedError) as error:
        raise Unreadable(f"it is damaged ({error})") from None
    compressed = [record for record in records if record.compress_type != zipfile.ZIP_STORED]
    expanded = sum(record.file_size for record in compressed)
    if expanded > largest_compressed:
        largest = max(compressed, key=lambda record: record.file_size)
        raise Unreadable(
            f"{largest.filename[:100]} in it is compressed and expands to {largest.file_size:,} bytes; "
            f"{'files of torch.save are not compressed' if largest_compressed == 0 else 'that is too much'}"
        )
    if sum(record.file_size for record in records) - expanded > size:
        raise Unreadable("its records claim to be larger than the file")
    return records
