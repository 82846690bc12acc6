"""Finds configs by path or by name."""

import glob
import os
from pathlib import Path

from detection.core.errors import UserError
from detection.core.files import shown
from detection.core.text import closest_match

_PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"
"""The configs that come with the toolkit: in the package where it is installed from a wheel, else beside it."""
SUFFIXES = (".yaml", ".yml")


def shipped_names(folder: str = "") -> list[str]:
    """Names of the configs in a folder of configs/, without suffix."""
    return sorted(path.stem for path in (CONFIGS / folder).glob("*.yaml"))


def shipped_config(name: str, folder: str = "") -> str | None:
    """Path of the config that comes with the toolkit, by its name with or without .yaml; None where there is none."""
    stem = name.removesuffix(".yaml")
    return str(CONFIGS / folder / f"{stem}.yaml") if stem in shipped_names(folder) else None


def existing_or_shipped(text: str) -> str:
    """`text` where such a file or folder exists, or the path of the config of that name; else `text`."""
    return text if os.path.exists(text) else shipped_config(text) or text


def find_config(text: str, folder: str = "") -> str:
    """Path of a config: the file `text` or `text`.yaml, or the one that comes with the toolkit under this name.

    A path with a folder in it is returned as it is.

    Raises:
        UserError: a name that is neither; the message names the nearest one.
    """
    if os.path.dirname(text):
        return text
    for path in (text, f"{text}.yaml"):
        if os.path.exists(path) and not os.path.isdir(path):
            return path
    found = shipped_config(text, folder)
    if found is None and os.path.isdir(text):
        return text
    if found is None:
        known = shipped_names(folder)
        here = [path for suffix in SUFFIXES for path in glob.glob(f"*{suffix}")]
        close = closest_match(text.removesuffix(".yaml"), known) or closest_match(text, here)
        hint = f"did you mean {close}?" if close else f"these come with the toolkit: {', '.join(known)}"
        raise UserError(f"config {shown(text)} does not exist ({hint})")
    return found
