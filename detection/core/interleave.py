"""Times several calls in turns, so that other load on the machine affects all of them equally."""

import time
from collections.abc import Callable, Sequence
from typing import Any

TURN = 5
"""Timed calls of a turn."""
PAUSE = 0.05
"""Seconds before a turn: a runtime's threads spin on for a while after their last call, at the cost of the next one."""
WARM_CALLS = 3
"""Calls of a turn that are not timed: caches are full of another network at first."""
Clock = Callable[[Callable[[], Any]], float]
"""Makes a call and tells its seconds."""


def interleave(
    calls: Sequence[Callable[[], Any]],
    runs: int,
    clocks: Sequence[Clock] | None = None,
    progress: Callable[[int], Any] = lambda calls: None,
) -> list[list[float]]:
    """Time each call `runs` times, a turn after the other; the first of a round is another in each round.

    Args:
        clocks: of each call what times it; default: `wall_seconds`.
        progress: called with the number of calls timed since.

    Returns:
        Of each call its seconds.
    """
    clocks = clocks or [wall_seconds] * len(calls)
    seconds: list[list[float]] = [[] for _ in calls]
    done = rounds = 0
    while done < runs:
        turn = min(TURN, runs - done)
        start = rounds % max(1, len(calls))
        for i in (*range(start, len(calls)), *range(start)):
            time.sleep(PAUSE)
            for _ in range(WARM_CALLS):
                calls[i]()
            seconds[i] += [clocks[i](calls[i]) for _ in range(turn)]
            progress(turn)
        done, rounds = done + turn, rounds + 1
    return seconds


def wall_seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
