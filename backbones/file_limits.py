"""Size limits of weight files, checked from their headers before memory is allocated."""

import os
import stat
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

MAX_FILE_SIZE_VARIABLE = "GHOSTNET_LARGEST_FILE"
"""Environment variable: the largest weight file that is read, in GiB."""
MAX_FILE_SIZE = 2.0
MAX_ZIP_DIRECTORY = 1 << 24
"""Largest directory of a zip file, in bytes."""


class UnreadableFile(ValueError):
    """A file cannot be read. The message completes "weights file … cannot be read: "."""


def check_size(path: str | os.PathLike[str]) -> int:
    """The size of a regular file in bytes.

    Raises:
        UnreadableFile: it is not a regular file, it is empty, or it is larger than `MAX_FILE_SIZE_VARIABLE` allows.
        OSError: it does not exist.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableFile("it is not a regular file")
    text = os.environ.get(MAX_FILE_SIZE_VARIABLE, str(MAX_FILE_SIZE))
    try:
        limit = float(text) * 2**30
    except ValueError:
        raise UnreadableFile(
            f"the environment variable {MAX_FILE_SIZE_VARIABLE}={text} is not a number (of GiB)"
        ) from None
    if status.st_size > limit:
        raise UnreadableFile(
            f"it has {status.st_size / 2**30:.1f} GiB, the limit is {text}; {MAX_FILE_SIZE_VARIABLE}=… in the "
            "environment raises it"
        )
    if status.st_size == 0:
        raise UnreadableFile("it is empty")
    return status.st_size


def read_bytes(path: Path) -> bytearray:
    """The content of a regular file. Raises UnreadableFile, see `check_size`."""
    content = bytearray(check_size(path))
    with path.open("rb") as file:
        if file.readinto(content) != len(content):
            raise UnreadableFile("it became shorter while it was read")
    return content


def read_zip_directory(file: BinaryIO, size: int, *, max_expanded: int = 0) -> list[zipfile.ZipInfo]:
    """The records of a zip file. The sizes in its directory are checked before any record is read.

    Args:
        size: of the file in bytes.
        max_expanded: largest expanded size of all compressed records together, in bytes.

    Raises:
        UnreadableFile: the file is not a complete zip file, or it expands to more than allowed.
    """
    file.seek(max(0, size - 98))
    tail = file.read().rjust(98, b"\0")
    if tail[-22:-18] != b"PK\x05\x06":
        raise UnreadableFile("it is truncated or damaged: its end is not that of a zip file")
    length, start = struct.unpack("<2L", tail[-10:-2])
    end = size - 22
    if tail[-42:-38] == b"PK\x06\x07":  # zip64, as PyTorch writes it
        end = size - 98
        length, start = struct.unpack("<2Q", tail[-58:-42])
        if struct.unpack("<Q", tail[-34:-26]) != (end,):
            raise UnreadableFile("its directory is damaged")
    # If these do not agree, different zip readers use different directories.
    if start + length != end:
        raise UnreadableFile("its directory is damaged")
    if length > MAX_ZIP_DIRECTORY:
        raise UnreadableFile(f"its directory has {length:,} bytes, more than any weight file needs")
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, UnicodeDecodeError, NotImplementedError) as error:
        raise UnreadableFile(f"it is damaged ({error})") from None
    compressed = [record for record in records if record.compress_type != zipfile.ZIP_STORED]
    expanded = sum(record.file_size for record in compressed)
    if expanded > max_expanded:
        largest = max(compressed, key=lambda record: record.file_size)
        raise UnreadableFile(
            f"{largest.filename[:100]} in it is compressed and expands to {largest.file_size:,} bytes; "
            f"{'files of torch.save are not compressed' if max_expanded == 0 else 'that is too much'}"
        )
    if sum(record.file_size for record in records) - expanded > size:
        raise UnreadableFile("its records claim to be larger than the file")
    return records
