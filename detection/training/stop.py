"""How a training is stopped in order."""

import contextlib
import signal
from collections.abc import Iterator


class StopSignal:
    """Ctrl-C and SIGTERM only leave a request, so that no step and no file is cut in the middle.

    They act at once (as KeyboardInterrupt) inside `interruptible`, and when they come a second time.
    """

    def __init__(self) -> None:
        self.requested = self._received = self._at_once = False

    def __enter__(self) -> "StopSignal":
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
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

    def _handle(self, number: int, frame: object) -> None:
        # Not `requested`: another process of the same training may have been signalled first (TrainingRun.agree).
        if self._received or self._at_once:
            raise KeyboardInterrupt
        self._received = self.requested = True
