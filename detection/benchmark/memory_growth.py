"""How much memory a network takes, measured in a process of its own."""

import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from detection.core.errors import UserError

STATUS = Path("/proc/self/status")


def peak_memory(measure: Callable[..., list[int | None]], *arguments: Any) -> list[int | None]:
    """What `measure(*arguments)` returns when called in a fresh process; its exceptions are raised here.

    Args:
        measure: a function of a module, and arguments that can be pickled.
    """
    context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        # The imports, which take seconds, are made once for all such processes.
        context.set_forkserver_preload(["detection.benchmark.latency"])
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(theirs, measure, *arguments))
    process.start()
    theirs.close()
    try:
        result = ours.recv()
    except EOFError:
        process.join()
        raise UserError(f"the process ended with code {process.exitcode} (out of memory?)") from None
    finally:
        ours.close()
    process.join()
    if isinstance(result, Exception):
        raise result
    return result


def _run(pipe: Connection, measure: Callable[..., list[int | None]], *arguments: Any) -> None:
    try:
        pipe.send(measure(*arguments))
    except Exception as error:
        pipe.send(error)


class Growth:
    """By how many bytes this process has grown at most since this was made; Linux alone tells that."""

    def __init__(self) -> None:
        self.start = _status("VmRSS")

    def forget_peak(self) -> None:
        """Leave out what was needed so far, to load and to compile, and has been given back."""
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return

    def peak(self) -> int | None:
        """None where the system does not tell."""
        now = _status("VmHWM")
        return None if self.start is None or now is None else max(0, now - self.start)


def _status(key: str) -> int | None:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{key}:")]
    return int(found[0]) * 1024 if found else None
