"""Signals that stop a training, and a console that closes while it runs."""

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast

log = logging.getLogger("detection")


class _ForgivingStream:
    """A stream that drops what it cannot write, as after its terminal was closed, without an error."""

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
            # The rest of its buffer has to go somewhere.
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def ignore_closed_console() -> Iterator[None]:
    """Continue after the terminal was closed, or after the reader of a pipe (`tee`) ended with the connection."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _ForgivingStream(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class StopSignal:
    """Ctrl-C and SIGTERM set `requested`, so that they interrupt no optimizer step and no write of a file.

    Inside `interruptible`, or when they come a second time, they raise KeyboardInterrupt at once. SIGHUP, which comes
    when a connection drops with its terminal, only logs a warning: the training continues.
    """

    def __init__(self) -> None:
        self.requested = self._received = self._at_once = False

    def __enter__(self) -> "StopSignal":
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        # Windows has no SIGHUP; under nohup it stays ignored.
        hang_up = getattr(signal, "SIGHUP", None)
        # `run_tool` has a handler of its own, which would end the training.
        if hang_up is not None and signal.getsignal(hang_up) not in (signal.SIG_IGN, None):
            self._before[hang_up] = signal.signal(hang_up, self._pass_over)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """For long work that may be cut anywhere: raises KeyboardInterrupt on a request, also on an earlier one."""
        if self.requested:
            raise KeyboardInterrupt
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def _pass_over(self, number: int, frame: object) -> None:
        log.warning("the terminal was closed; the training continues, see train.log")

    def _handle(self, number: int, frame: object) -> None:
        # Not `requested`: that may come from another process of the same training (Trainer.sync_clock_and_stop).
        if self._received or self._at_once:
            raise KeyboardInterrupt
        self._received = self.requested = True
