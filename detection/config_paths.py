"""Paths that a config names: `~` is the home folder, and what no file system takes is refused."""

import os
from typing import Annotated

from pydantic import AfterValidator

LONGEST_NAME, LONGEST_PATH = 255, 4095
"""Bytes that Linux, macOS and Windows allow at most, of one name and of all of it."""


def usable_path(text: str) -> str:
    """`text` with `~` expanded. Raises ValueError where nothing can have this name."""
    if not text.strip():
        raise ValueError("the path is empty")
    if "\0" in text:
        raise ValueError("the path holds a NUL character")
    path = os.path.expanduser(text)
    try:
        data = os.fsencode(path)
    except UnicodeEncodeError:
        raise ValueError("the path holds a character that no file system takes") from None
    longest = max(map(len, data.split(os.fsencode(os.sep))))
    if longest > LONGEST_NAME or len(data) > LONGEST_PATH:
        raise ValueError(
            f"the path is too long: {len(data)} bytes, its longest name {longest}; at most {LONGEST_PATH} and "
            f"{LONGEST_NAME} are possible"
        )
    return path


PathText = Annotated[str, AfterValidator(usable_path)]
"""A path, or a word that stands for one ("timm")."""
