"""Runs a command: exit statuses, signals and the last resort for unexpected exceptions."""

import contextlib
import errno
import math
import os
import signal
import sys
import time
from collections.abc import Callable

from detection.core.crash_report import keep_trace
from detection.core.errors import UserError
from detection.core.files import reason_of, shown
from detection.core.interrupts import INTERRUPTS
from detection.core.memory import is_out_of_memory

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
