"""How a training is stopped in order."""

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast

log = logging.getLogger("detection")


class _Lasting:
    """A stream whose end may go away: what is written after that is lost, and is no error."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except OSError:
            # What is left in its buffer has to go somewhere, too.
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lasting_console() -> Iterator[None]:
    """A terminal that is closed, or a pipe whose reader (`tee`) went with the connection, ends no training."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _Lasting(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class StopSignal:
    """Ctrl-C and SIGTERM only leave a request, so that no step and no file is cut in the middle.

    SIGHUP, which comes when a connection drops and takes the terminal with it, is noted and passed over: the run
    goes on, and train.log says how.

    They act at once (as KeyboardInterrupt) inside `interruptible`, and when they come a second time.
    """

    def __init__(self) -> None:
        self.requested = self._received = self._at_once = False

    def __enter__(self) -> "StopSignal":
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        # Not on Windows; and where nohup has switched it off, it stays off.
        hang_up = getattr(signal, "SIGHUP", None)
        if hang_up is not None and signal.getsignal(hang_up) is signal.SIG_DFL:
            self._before[hang_up] = signal.signal(hang_up, self._pass_over)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """For long work that leaves nothing half done: raises KeyboardInterrupt on a request, also an earlier one."""
        if self.requested:
            raise KeyboardInterrupt
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def _pass_over(self, number: int, frame: object) -> None:
        log.warning("the terminal has gone; the training goes on, see train.log")

    def _handle(self, number: int, frame: object) -> None:
        # Not `requested`: that may come from another process of the same training (Trainer.sync_clock_and_stop).
        if self._received or self._at_once:
            raise KeyboardInterrupt
        self._received = self.requested = True
