"""Command-line arguments: parsing, and checks that need no heavy import."""

import argparse
import glob
import os
import re
from collections.abc import Iterable, Sequence
from typing import NoReturn

from detection.cli.find_config import find_config, shipped_names
from detection.config import PUBLISHED
from detection.core.commands import runs_script
from detection.core.errors import UserError
from detection.core.files import open_regular_file, shown
from detection.zoo.names import find_detector

# Help texts name the scripts of a checkout; where the command `ghostdet` shows them, they name that.
_SCRIPT_TO_COMMAND = (
    (re.compile(r"(torchrun [^\n]*?)tools/(\w+)\.py"), r"\1-m detection \2"),
    (re.compile(r"(?:python )?\btools/(\w+)\.py"), r"ghostdet \1"),
    (re.compile(r"\bconfigs/(?:pretrain/)?(\w+)\.yaml"), r"\1"),
)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of description and example, and shows the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        default = action.default
        hidden = default is None or default is False or default in ([], argparse.SUPPRESS)
        if hidden or not action.option_strings or "default" in text:
            return text
        shown_default = " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
        return f"{text} (default: {shown_default.replace('%', '%%')})".lstrip()


class ToolParser(argparse.ArgumentParser):
    """The parser of one command: `python tools/NAME.py` or `ghostdet NAME`, whichever was called.

    Args:
        name: of the command, as in tools/NAME.py.
        description: the first lines of the help.
        example: the end of the help, with commands as `python tools/NAME.py`. An error about a missing argument shows
            it, too.
    """

    def __init__(self, name: str, description: str | None, example: str) -> None:
        self.is_script = runs_script()
        self.config_folder = ""
        super().__init__(
            prog=f"python tools/{name}.py" if self.is_script else f"ghostdet {name}",
            description=description,
            epilog=example if self.is_script else _name_command(example),
            formatter_class=HelpFormatter,
        )

    def add_config(self, example: str, folder: str = "") -> None:
        """Add the arguments CONFIG, as `config`, and key=value, as `overrides`.

        Args:
            example: of an override.
            folder: of configs/, where CONFIG is looked up by name.
        """
        self.config_folder = folder
        self.add_argument(
            "config",
            metavar="CONFIG",
            help=f"YAML file, or the name of a config that comes with the toolkit: {', '.join(shipped_names(folder))}",
        )
        # Without a default, argparse says that key=value is required.
        self.add_argument(
            "overrides", nargs="*", metavar="key=value", default=[], help=f"override a key, like {example}"
        )

    def add_adapter(self) -> None:
        """Add the option `--adapter` of a command that runs a detector."""
        self.add_argument(
            "--adapter",
            metavar="NAME|FILE",
            type=existing_adapter,
            help="how to run an ONNX file of another project: yolox, yolov5, yolov8, fastestdet, or a YAML file",
        )

    def add_force(self) -> None:
        """Add the option `--force` of a command that writes files."""
        self.add_argument("--force", action="store_true", help="overwrite files that this toolkit did not write")

    def parse(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse `arguments` (default: the command line), options and others in any order.

        Raises:
            UserError: CONFIG is neither a file nor the name of a config that comes with the toolkit.
        """
        args = self.parse_intermixed_args(arguments)
        if hasattr(args, "config"):
            if "=" in args.config and not os.path.exists(args.config):
                self.error(f"the following arguments are required: CONFIG ({shown(args.config)} is an override)")
            args.config = find_config(args.config, self.config_folder)
        return args

    def format_help(self) -> str:
        return super().format_help() if self.is_script else _name_command(super().format_help())

    def error(self, message: str) -> NoReturn:
        super().error(f"{message}\n{self.epilog}" if "are required" in message else message)


def _name_command(text: str) -> str:
    for pattern, replacement in _SCRIPT_TO_COMMAND:
        text = pattern.sub(replacement, text)
    return text


def split_overrides(words: Iterable[str]) -> tuple[list[str], list[str]]:
    """Split arguments into names of files and key=value overrides."""
    words = list(words)
    return [word for word in words if "=" not in word], [word for word in words if "=" in word]


def positive(text: str) -> int:
    """A number of 1 or more, for argparse's `type`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


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


def existing_detector(text: str) -> str:
    """As `existing_file`, for a checkpoint or an exported file, or what `detection.zoo.names.find_detector` finds by
    name."""
    return existing_file(find_detector(os.path.expanduser(text)))


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


def existing_adapter(text: str) -> str:
    """As `existing_file`, for what `--adapter` takes: a YAML file, or a name, which stays as it is."""
    return existing_file(text) if os.path.dirname(text) or text.endswith((".yaml", ".yml")) else text


def existing_weights(text: str) -> str:
    """As `existing_file`, for what model.backbone.weights takes: a file, or where published ones are."""
    return text if text in PUBLISHED else existing_file(text)
