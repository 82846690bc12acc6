"""Paths that a config names: `~` is the home folder, and what no file system takes is refused."""

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from detection.errors import UserError

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


def check_output_dir(output_dir: str) -> None:
    """Refuse a folder that belongs to more than one run: the working folder, what it is in, the home folder.

    Raises:
        UserError: it is one of these.
    """
    try:
        folder, here = Path(output_dir).resolve(), Path.cwd()
        home = Path.home().resolve()
    except (OSError, RuntimeError) as error:  # a link that leads back to itself; a user without a home
        raise UserError(f"output_dir {output_dir!r} cannot be used: {error}") from None
    if folder == home or here.is_relative_to(folder):
        what = "the home folder" if folder == home else "the working folder" if folder == here else "a folder around it"
        raise UserError(
            f"output_dir {output_dir!r} is {what}; name a folder for this run alone, like output_dir=runs/mine"
        )
