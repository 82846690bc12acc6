"""What every command-line tool shares: how it ends, and checks of its arguments that need no heavy import."""

import argparse
import contextlib
import datetime
import errno
import glob
import math
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from detection.errors import UserError
from detection.files import CACHE_FOLDER, open_regular_file, reason_of, shown
from detection.memory import is_out_of_memory

PUBLISHED = ("timm", "torchvision", "pretrained")
"""What weights may be besides a file."""
# Not all are known on Windows.
INTERRUPTS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
TOGETHER = 1.0
"""Seconds."""
_interrupted = -math.inf
UNEXPECTED = 70
"""Exit status where the toolkit itself is at fault (EX_SOFTWARE of sysexits.h)."""
# Errors of the operating system that say enough with the name of the file: nothing is wrong with the toolkit.
_OF_THE_SYSTEM = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG,
    errno.EROFS, errno.EIO, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE,
}  # fmt: skip


def run_tool(main: Callable[[], int | None]) -> None:
    """Call `main` and exit: 0, its own code, 2 for a user's mistake (message only), 130 for Ctrl-C, SIGTERM or SIGHUP.

    An unforeseen exception is one line, too, with exit status 70; the trace is kept in a file that the line names.
    """
    # OpenCV's lines about damaged images would stand beside this toolkit's message. Read when OpenCV is imported.
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    # Where nohup, or a shell that starts a tool in the background, has switched one off, it stays off.
    signals = [s for s in INTERRUPTS if signal.getsignal(s) in (signal.SIG_DFL, signal.default_int_handler)]
    for number in signals:
        signal.signal(number, _interrupt)
    try:
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        _say(f"error: {error}")
        code = 2
    except KeyboardInterrupt:
        _say("stopped")
        code = 130
    except BrokenPipeError:
        # The reader (head, less) has gone; nothing more can be written, the interpreter's flush included.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        code = _last_resort(error)
    # Python's own end must not be interrupted: a traceback, or the exit status of the signal.
    for number in signals:
        signal.signal(number, signal.SIG_IGN if code == 130 else signal.SIG_DFL)
    sys.exit(code)


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


def _last_resort(error: Exception) -> int:
    lines = [line for line in str(error).splitlines() if line.strip()] or ["(no message)"]
    # What a worker process raised is quoted whole; its last line is the error itself.
    message = shown(lines[-1] if lines[0].startswith("Caught ") else lines[0])
    if is_out_of_memory(error):
        _say("error: out of memory; close other programs, or choose smaller sizes, batches or fewer workers")
        return 2
    if isinstance(error, OSError) and error.errno in _OF_THE_SYSTEM:
        where = f"{shown(os.fsdecode(error.filename))}: " if isinstance(error.filename, str | bytes) else ""
        _say(f"error: {where}{reason_of(error, error.filename or '')}")
        return 2
    kept = keep_trace(error)
    _say(
        f"error: unexpected {type(error).__name__}: {message}. This is a fault of the toolkit, not yours; what was "
        f"written so far is kept. The full trace is in {kept}: please report it with that file and the command"
    )
    return UNEXPECTED


def keep_trace(error: Exception) -> str:
    """Write the trace of an unforeseen exception; returns where, in words."""
    text = f"command: {sys.argv}\nPython {sys.version}\n\n{''.join(traceback.format_exception(error))}"
    name = f"trace-{datetime.datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}.txt"
    for folder in (CACHE_FOLDER / "traces", Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
            return str(folder / name)
    return "no file, as none could be written"


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # a terminal that has gone
        print(text, file=sys.stderr, flush=True)


def _interrupt(number: int, frame: object) -> None:
    """What clusters, `timeout` and a closed terminal send lets the tool close its files, as Ctrl-C does.

    Signals that come together are one: a terminal's SIGHUP and its shell's, torchrun's SIGTERM after Ctrl-C.
    """
    global _interrupted
    if time.monotonic() - _interrupted > TOGETHER:
        _interrupted = time.monotonic()
        raise KeyboardInterrupt
