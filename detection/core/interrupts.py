"""Ctrl-C, SIGTERM and SIGHUP, taken where nothing is left half done."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def interrupts_at_checks() -> Iterator[Callable[[], None]]:
    """Within the block signals that would raise KeyboardInterrupt are only noted, however many come.

    It gives a function that raises KeyboardInterrupt if there was one; so does the end of the block. What is inside is
    then closed in order: a handler that raises could do so in the middle of a `finally` or between two of them.
    SIGQUIT (Ctrl-\\) still ends the process at once. In other threads than the main one, which get no signals, the
    block does nothing.
    """
    noted: list[int] = []

    def check() -> None:
        if noted:
            raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in INTERRUPTS:
            # Not callable: switched off by nohup, or as the system has it.
            if callable(signal.getsignal(number)):
                before[number] = signal.signal(number, lambda number, frame: noted.append(number))
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    check()


# Not all are known on Windows.
INTERRUPTS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
