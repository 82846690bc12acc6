"""Command-line arguments: parsing, and checks that need no heavy import."""

import argparse
import glob
import os
from typing import NoReturn

from detection.config import PUBLISHED
from detection.core.errors import UserError
from detection.core.files import open_regular_file, shown


class ToolParser(argparse.ArgumentParser):
    """A parser of a tool with `example` at the end of its help, which shows it too where an argument is missing."""

    def __init__(self, description: str | None, example: str) -> None:
        super().__init__(description=description, epilog=example, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add_config(self, config_help: str, example: str) -> None:
        """The arguments CONFIG, as `config`, and key=value, as `overrides`."""
        self.add_argument("config", metavar="CONFIG", help=config_help)
        # Without a default, argparse says that key=value is required.
        self.add_argument(
            "overrides", nargs="*", metavar="key=value", default=[], help=f"override a key, like {example}"
        )

    def parse(self) -> argparse.Namespace:
        """The arguments of the command line, options and others in any order."""
        args = self.parse_intermixed_args()
        config = getattr(args, "config", "")
        if "=" in config and not os.path.exists(config):
            self.error(f"the following arguments are required: CONFIG ({shown(config)} is an override)")
        return args

    def error(self, message: str) -> NoReturn:
        super().error(f"{message}\n{self.epilog}" if "are required" in message else message)


def existing_file(text: str, hint: str = "") -> str:
    """A command-line argument that names a file to be read, for argparse's `type`: `~` is expanded.

    Args:
        hint: what to name instead, for the message where it is not there.

    Raises:
        UserError: it is not there, is not a regular file, or cannot be read.
    """
    path = os.path.expanduser(text)
    if not path:
        raise UserError("an empty name names no file")
    if hint and not os.path.lexists(path):
        raise UserError(f"{shown(path)} does not exist: {hint}")
    open_regular_file(path).close()
    return path


def existing_path(text: str, hint: str = "") -> str:
    """As `existing_file`, for a file or a folder."""
    path = os.path.expanduser(text)
    try:
        folder = os.path.isdir(path)
    except ValueError:  # a NUL character; the next one says so
        folder = False
    return path if folder else existing_file(text, hint)


def existing_source(text: str) -> str:
    """As `existing_path`, for a file, a folder or a glob pattern, which stays as it is."""
    return text if glob.has_magic(text) and not os.path.exists(text) else existing_path(text)


def existing_weights(text: str) -> str:
    """As `existing_file`, for what model.backbone.weights takes: a file, or where published ones are."""
    return text if text in PUBLISHED else existing_file(text)
