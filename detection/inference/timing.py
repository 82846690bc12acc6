"""How long the stages of detection take: `tools/detect.py --timing`."""

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

READ, RESIZE, NETWORK, TRACK = "read and decode", "resize", "network and NMS", "track"
DRAW, WRITE = "draw", "encode and write"
WAIT_READ, WAIT_WRITE = "waiting for reading", "waiting for writing"
STAGES = (READ, RESIZE, NETWORK, TRACK, DRAW, WRITE, WAIT_READ, WAIT_WRITE)
TOTAL = "all, as the clock ran"

# Of the module: Timing goes from process to process, which a lock cannot.
_lock = threading.Lock()


@dataclass
class Timing:
    """Seconds that each stage took, in whichever threads it ran, and from beginning to end.

    Attributes:
        unit: what was counted: images or frames.
        count: of these, done.
        wall: seconds from the first to the last, the loading of the model not counted.
    """

    unit: str
    count: int = 0
    wall: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block to a stage. Results of a GPU must be on the host at its end (`Predictor`'s are)."""
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
        """A small table. Threads work at the same time, so that shares may add up to more than 100 %."""
        count, wall = max(1, self.count), max(self.wall, 1e-9)
        lines = [f"{'stage':<20}  ms per {self.unit[:-1]}  share of the time"]
        for name in (*STAGES, TOTAL):
            seconds = wall if name == TOTAL else self.seconds[name]
            if seconds:
                lines.append(f"{name:<20}  {1000 * seconds / count:>{len(self.unit) + 6}.2f}  {seconds / wall:>17.0%}")
        lines.append(f"{self.count} {self.unit} in {wall:.2f} s: {self.count / wall:.1f} {self.unit} per second")
        return "\n".join(lines)


def at_once(timings: Sequence[Timing]) -> Timing:
    """Of several processes that worked at the same time, as one: stages add up, the longest wall time counts."""
    return replace(in_turn(timings), wall=max(timing.wall for timing in timings))


def in_turn(timings: Sequence[Timing]) -> Timing:
    """Of several runs one after the other, as one."""
    return Timing(
        timings[0].unit,
        sum(timing.count for timing in timings),
        sum(timing.wall for timing in timings),
        {stage: sum(timing.seconds[stage] for timing in timings) for stage in STAGES},
    )
