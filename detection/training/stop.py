"""How a training is stopped in order."""

import contextlib
import logging
import os
import signal
import stat
from collections.abc import Iterator

log = logging.getLogger("detection")


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
        # Writing to a terminal that has gone, or to a pipe whose reader went with it, is an error. A file stays.
        with open(os.devnull, "w") as nowhere:
            for stream in (1, 2):
                if not stat.S_ISREG(os.fstat(stream).st_mode):
                    os.dup2(nowhere.fileno(), stream)
        log.warning("the terminal has gone; the training goes on, see train.log")

    def _handle(self, number: int, frame: object) -> None:
        # Not `requested`: another process of the same training may have been signalled first (TrainingRun.agree).
        if self._received or self._at_once:
            raise KeyboardInterrupt
        self._received = self.requested = True
