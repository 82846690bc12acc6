"""Reads the long lists of a large JSON file in windows of a few megabytes, so that memory does not grow with the file.

msgspec decodes only complete texts. This module therefore finds the ends of the elements of a list: NumPy finds the
brackets outside of strings in a window, and their cumulative sum is the depth. This takes a second for the 450 MB of
COCO; the content of the elements is not parsed here.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

WINDOW = 1 << 23
LARGEST_ENTRY = 1 << 28
"""The most bytes of an entry, and of the text between lists."""

_MARKED = bytes(chr(i) in '"\\{}[]' for i in range(256))
_STEP = np.zeros(256, np.int64)
_STEP[[ord("{"), ord("[")]] = 1
_STEP[[ord("}"), ord("]")]] = -1
_KEY = re.compile(rb'("(?:[^"\\]|\\.)*")\s*:\s*\Z')
_SPACE = b" \t\r\n"


class JsonError(ValueError):
    """The text is not JSON, or not an object; `offset` is the byte of the file with the fault."""

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.offset = offset


class NotAnObject(JsonError):
    """The top level is a list."""


@dataclass(frozen=True)
class Chunk:
    """Some elements of the top-level list `key`."""

    key: str
    text: bytes
    """A JSON list, possibly empty."""
    offset: int
    """Offset in the file of the first byte after the opening bracket of `text`."""


def top_level_lists(file: BinaryIO, keys: Collection[str], window: int = WINDOW) -> Iterator[Chunk]:
    """Yield the top-level lists `keys` of a JSON object in the order of the file, each in one or more chunks.

    All other content is skipped and not checked; the caller decodes and checks the chunks.

    Raises:
        JsonError: the text is not an object or is cut off, brackets do not match, or one of the keys occurs twice.
    """
    text = file.read(window)
    offset = 3 if text.startswith(b"\xef\xbb\xbf") else 0  # the byte order mark of some editors
    text = text[offset:]
    if not text.strip(_SPACE):
        raise JsonError("it is empty", 0)
    head = text.lstrip(_SPACE)[:20]
    if head[:1] == b"[":
        raise NotAnObject("it is a list", offset)
    if head[:1] != b"{":
        raise JsonError(f"it begins with {head.decode(errors='replace')!r}", offset)
    top: list[bytes] = []  # the text of the top level, with null for each nested value
    seen: set[str] = set()
    key: str | None = None  # of the list that `text` begins in
    first = True  # whether its first element is still to come
    depth = 0  # at the beginning of `text`
    while True:
        places, depths = _brackets(text, depth)
        at_one, at_two = np.flatnonzero(depths == 1).tolist(), np.flatnonzero(depths == 2).tolist()
        used = event = 0
        while event < len(places):
            if depth == 0:  # only the opening bracket of the top level
                used, depth, event = int(places[event]) + 1, 1, event + 1
                top.append(b"{")
            elif depth == 1:
                end = int(places[event])
                top.append(text[used:end])
                used, depth, event = end + 1, int(depths[event]), event + 1
                if depth == 0:
                    _check_end(file, text[used:], offset + used)
                    _check_top(b"".join([*top, b"}"]), offset + used)
                    return
                top.append(b"null")
                name = _name(b"".join(top[-3:-1]))
                if name is not None and name in keys and text[end : end + 1] == b"[":
                    if name in seen:
                        raise JsonError(f"the key {name!r} is there twice", offset + end)
                    seen.add(name)
                    key, first = name, True
            else:
                i = bisect_left(at_one, event)
                close = at_one[i] if i < len(at_one) else None
                if close is None and key is None:
                    used, depth, event = int(places[-1]) + 1, int(depths[-1]), len(places)
                    continue
                if close is None:
                    i = bisect_left(at_two, event)
                    if i == len(at_two):
                        break
                    end = int(places[at_two[-1]]) + 1
                    event = len(places)
                else:
                    end, event = int(places[close]), close + 1
                if key is not None:
                    chunk = _chunk(key, text[used:end], offset + used, first, close is not None)
                    if chunk is not None:
                        yield chunk
                    first = False
                used = end
                if close is not None:
                    if key is not None and text[end : end + 1] != b"]":
                        raise JsonError(f"the list {key!r} is closed by a brace", offset + end)
                    used, depth, key = end + 1, 1, None
        rest = text[used:]
        if len(rest) > LARGEST_ENTRY:
            raise JsonError(
                f"an entry takes more than {LARGEST_ENTRY >> 20} MB: is a quote or bracket missing?", offset
            )
        more = file.read(max(window, len(rest)))
        if not more:
            raise JsonError("it ends in the middle: it was cut off", offset + len(text))
        offset += used
        text = rest + more


def line_of(file: BinaryIO, offset: int) -> tuple[int, int]:
    """Line and column (in bytes), both counted from 1, of a byte of the file."""
    file.seek(0)
    line, start, at = 1, 0, 0
    while at < offset:
        block = file.read(min(WINDOW, offset - at))
        if not block:
            break
        line += block.count(b"\n")
        if b"\n" in block:
            start = at + block.rindex(b"\n") + 1
        at += len(block)
    return line, offset - start + 1


def _brackets(text: bytes, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of the brackets outside of strings, and the depth after each of them."""
    places = np.flatnonzero(np.frombuffer(text.translate(_MARKED), bool))
    if b"\\" in text:
        places = _without_escapes(np.frombuffer(text, np.uint8), places)
    signs = np.frombuffer(text, np.uint8)[places]
    quotes = signs == ord('"')
    outside = (np.cumsum(quotes) % 2 == 0) & ~quotes
    return places[outside], depth + np.cumsum(_STEP[signs[outside]])


def _without_escapes(text: np.ndarray, places: np.ndarray) -> np.ndarray:
    """`places` without backslashes and the characters that they escape."""
    slashes = places[text[places] == ord("\\")]
    # In a run of backslashes the first, third, … escape the next character.
    starts = np.concatenate([[True], np.diff(slashes) != 1])
    run_start = np.maximum.accumulate(np.where(starts, np.arange(len(slashes)), 0))
    escaping = (np.arange(len(slashes)) - run_start) % 2 == 0
    drop = np.concatenate([slashes, slashes[escaping] + 1])
    return places[~np.isin(places, drop)]


def _chunk(key: str, text: bytes, offset: int, first: bool, last: bool) -> Chunk | None:
    content = text.lstrip(_SPACE)
    if not first and (content or not last):
        if content[:1] != b",":
            raise JsonError(f"two entries of {key!r} without a comma between them", offset)
        content = content[1:].lstrip(_SPACE)
        if not content:
            raise JsonError(f"the list {key!r} ends with a comma", offset)
    elif not first:
        return None
    return Chunk(key, b"[" + content + b"]", offset + len(text) - len(content))


def _name(gap: bytes) -> str | None:
    """The key before a bracket; None if there is none."""
    match = _KEY.search(gap[-1000:])
    try:
        return None if match is None else json.loads(match[1])
    except ValueError:
        return None


def _check_top(text: bytes, offset: int) -> None:
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        raise JsonError(f"something is wrong between its lists: {error}", offset) from None


def _check_end(file: BinaryIO, rest: bytes, offset: int) -> None:
    if (rest + file.read(1000)).strip(_SPACE + b"\0"):
        raise JsonError("something follows its closing bracket", offset)
