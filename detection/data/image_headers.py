"""The size of an image from the header of its file, before anything is decoded, and the limit on it."""

import re
import struct
from typing import Any

from detection.core.limits import limit_of

VARIABLE = "GHOSTNET_MAX_IMAGE_PIXELS"
"""Environment variable that raises or lowers the limit on pixels, for every command."""
MAX_PIXELS = 178_956_970
"""The limit without it: Pillow's own. Decoded to 8 bits, so many take 0.5 GB, and while they are decoded 1.1 GB."""
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of a JPEG that are followed by its size."""
_ALONE = frozenset([0x01, *range(0xD0, 0xD9)])
"""Markers of a JPEG without a segment behind them."""
_COMMENT = rb"(?:\s+|#[^\n]*\n)+"
_PNM = re.compile(rb"P[1-6]" + _COMMENT + rb"(\d{1,9})" + _COMMENT + rb"(\d{1,9})\s")

Size = tuple[int, int]


def max_pixels() -> int:
    """The limit on the pixels of an image. Raises UserError where the environment variable is not a whole number."""
    return limit_of(VARIABLE, MAX_PIXELS)


def largest_file() -> int:
    """Bytes of the largest image file that is read: the most that `max_pixels` take uncompressed (RGBA of 16 bits)."""
    return 8 * max_pixels() + (1 << 20)


def too_large(size: Size) -> str | None:
    """Why an image of (width, height) is not decoded, or None where it is. Raises UserError, see `max_pixels`."""
    limit = max_pixels()
    if size[0] * size[1] <= limit:
        return None
    return (
        f"{size[0]}x{size[1]} pixels, and the limit is {limit:,}: cut it into tiles, or set the environment variable "
        f"{VARIABLE} to a larger number"
    )


def stored_size(data: bytes) -> Size | None:
    """(width, height) of the image in a file's content, before any turn that its EXIF data asks for.

    Known are JPEG, PNG, BMP, WebP, TIFF, JPEG 2000, PNM, GIF and AVIF.

    Returns:
        None for anything else, and where the header is broken.
    """
    try:
        return _size(data)
    except (struct.error, IndexError, ValueError, KeyError):  # it ends within the header, or is no header
        return None


def _size(data: bytes) -> Size | None:
    if data[:2] == b"\xff\xd8":
        return _jpeg(data)
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _unpack(">II", data, 16) if data[12:16] == b"IHDR" else None
    if data[:2] == b"BM":
        if _unpack("<I", data, 14)[0] == 12:
            return _unpack("<HH", data, 18)
        width, height = _unpack("<ii", data, 18)
        return abs(width), abs(height)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data)
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _tiff(data, "<" if data[:2] == b"II" else ">", b"+" in data[2:4])
    if data[:4] == b"\xff\x4f\xff\x51" or data[4:8] == b"jP  ":
        return _largest([_jpeg2000(data, at) for at in _places(data, b"\xff\x4f\xff\x51")])
    if data[4:8] == b"ftyp":
        return _largest([_unpack(">II", data, at + 8) for at in _places(data[: 1 << 16], b"ispe")])
    if data[:4] == b"GIF8":
        return _unpack("<HH", data, 6)
    if match := _PNM.match(data[: 1 << 16]):
        return int(match[1]), int(match[2])
    return None


def _unpack(form: str, data: bytes, offset: int) -> Any:
    return struct.unpack_from(form, data, offset)


def _jpeg(data: bytes) -> Size | None:
    at = 2
    while True:
        at = data.index(b"\xff", at) + 1
        while data[at] == 0xFF:  # fill bytes
            at += 1
        marker = data[at]
        at += 1
        if marker in _FRAMES:
            height, width = _unpack(">HH", data, at + 3)
            return width, height
        if marker in (0xD9, 0xDA):  # the end, or pixels
            return None
        if marker not in _ALONE and marker != 0:
            at += _unpack(">H", data, at)[0]


def _webp(data: bytes) -> Size | None:
    if data[12:16] == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if data[12:16] == b"VP8L":
        bits = _unpack("<I", data, 21)[0]
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = _unpack("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


def _tiff(data: bytes, order: str, big: bool) -> Size:
    """Of the first page. `big`: BigTIFF, whose offsets have 8 bytes."""
    at = _unpack(f"{order}Q", data, 8)[0] if big else _unpack(f"{order}I", data, 4)[0]
    count = _unpack(f"{order}{'Q' if big else 'H'}", data, at)[0]
    at += 8 if big else 2
    sides = {}
    for entry in range(at, at + min(count, 1 << 12) * (20 if big else 12), 20 if big else 12):
        tag, kind = _unpack(f"{order}HH", data, entry)
        if tag in (256, 257):
            form = {1: "B", 3: "H", 4: "I", 16: "Q"}[kind]
            sides[tag] = _unpack(f"{order}{form}", data, entry + (12 if big else 8))[0]
    return sides[256], sides[257]


def _jpeg2000(data: bytes, at: int) -> Size:
    right, bottom, left, top = _unpack(">IIII", data, at + 8)
    return max(0, right - left), max(0, bottom - top)


def _places(data: bytes, mark: bytes) -> list[int]:
    return [match.start() for match in re.finditer(re.escape(mark), data)]


def _largest(sizes: list[Size]) -> Size | None:
    """Several headers in one file: which one counts is the decoder's to say."""
    return max(sizes, key=lambda size: size[0] * size[1], default=None)


TAIL = 65536
"""Bytes from the end in which the mark is looked for: cameras append some after it."""


def is_truncated(head: bytes, tail: bytes) -> bool:
    """Whether a JPEG or PNG lacks its end: OpenCV fills the rest with grey and only warns on stderr.

    Args:
        head: the first bytes of the file, 4 at least.
        tail: its last `TAIL` bytes.
    """
    mark = b"\xff\xd9" if head.startswith(b"\xff\xd8") else b"IEND" if head[:4] == b"\x89PNG" else b""
    return mark not in tail
