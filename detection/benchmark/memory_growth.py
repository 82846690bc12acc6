"""Measures the memory of a network in a process of its own."""

import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from detection.core.errors import UserError

STATUS = Path("/proc/self/status")


def peak_memory(measure: Callable[..., list[int | None]], *arguments: Any) -> list[int | None]:
    """Call `measure(*arguments)` in a fresh process and return its result; its exceptions are raised here.

    Args:
        measure: a module-level function; its arguments must be picklable.
    """
    context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        # The imports take seconds; the fork server runs them once for all processes.
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


class MemoryGrowth:
    """Peak growth of this process in bytes since this object was created; known on Linux only."""

    def __init__(self) -> None:
        self.start = _status("VmRSS")

    def reset_peak(self) -> None:
        """Reset the peak, to exclude the temporary memory of loading and compiling."""
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return

    def peak(self) -> int | None:
        """Bytes since the last reset; None if the system does not report them."""
        now = _status("VmHWM")
        return None if self.start is None or now is None else max(0, now - self.start)


def _status(key: str) -> int | None:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{key}:")]
    return int(found[0]) * 1024 if found else None
