"""Defers Ctrl-C, SIGTERM and SIGHUP to places where no work is half done."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def interrupts_at_checks() -> Iterator[Callable[[], None]]:
    """Within the block, signals that would raise KeyboardInterrupt are only recorded.

    Yields a function that raises KeyboardInterrupt if there was a signal; the end of the block does the same. All code
    inside is therefore closed in order, whereas a handler that raises could interrupt a `finally`. SIGQUIT (Ctrl-\\)
    still ends the process at once. In threads other than the main one, which get no signals, the block does nothing.
    """
    noted: list[int] = []

    def check() -> None:
        if noted:
            raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in INTERRUPTS:
            # A handler that is not callable: switched off by nohup, or the default of the system.
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
