"""How a training is stopped in order."""

import signal


class StopSignal:
    """Ctrl-C and SIGTERM end the training after the step under way; elsewhere, or again, they act at once."""

    def __init__(self) -> None:
        self.requested = self.in_step = False

    def __enter__(self) -> "StopSignal":
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.requested or not self.in_step:
            raise KeyboardInterrupt
        self.requested = True
