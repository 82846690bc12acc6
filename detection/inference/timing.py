"""Measures the time of each stage of detection: `tools/detect.py --timing`."""

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from detection.core.text import text_table

READ, RESIZE, NETWORK, TRACK = "read and decode", "resize", "network and NMS", "track"
DRAW, WRITE = "draw", "encode and write"
WAIT_READ, WAIT_WRITE = "waiting for reading", "waiting for writing"
STAGES = (READ, RESIZE, NETWORK, TRACK, DRAW, WRITE, WAIT_READ, WAIT_WRITE)
TOTAL = "all, as the clock ran"

# A module variable, because a Timing is pickled and a lock cannot be.
_lock = threading.Lock()


@dataclass
class Timing:
    """Seconds of each stage, summed over all threads, and the wall time.

    Attributes:
        unit: "images" or "frames".
        count: number of processed images or frames.
        wall: wall time in seconds, without the loading of the model.
    """

    unit: str
    count: int = 0
    wall: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block to a stage. At its end GPU results must be on the CPU, as with `Predictor`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            with _lock:
                self.seconds[name] += spent

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Add the time of the block to `wall`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.wall += time.perf_counter() - start

    def __str__(self) -> str:
        """A table. Stages run in parallel, so their shares may add up to more than 100 %."""
        count, wall = max(1, self.count), max(self.wall, 1e-9)
        stages = {**self.seconds, TOTAL: wall}
        cells = [(name, f"{1000 * s / count:.2f}", f"{s / wall:.0%}") for name, s in stages.items() if s]
        table = text_table(("stage", f"ms per {self.unit[:-1]}", "share of the time"), cells, left=1)
        return f"{table}\n{self.count} {self.unit} in {wall:.2f} s: {self.count / wall:.1f} {self.unit} per second"


def merge_parallel(timings: Sequence[Timing]) -> Timing:
    """Merge the timings of processes that ran at the same time: the sum of the stages, the longest wall time."""
    return replace(merge_sequential(timings), wall=max(timing.wall for timing in timings))


def merge_sequential(timings: Sequence[Timing]) -> Timing:
    """Merge the timings of runs one after the other."""
    return Timing(
        timings[0].unit,
        sum(timing.count for timing in timings),
        sum(timing.wall for timing in timings),
        {stage: sum(timing.seconds[stage] for timing in timings) for stage in STAGES},
    )
