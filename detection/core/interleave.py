"""Times several calls in turns, so that other load on the machine affects all of them equally."""

import time
from collections.abc import Callable, Sequence
from typing import Any

TURN = 5
"""Timed calls in a turn."""
PAUSE = 0.05
"""Seconds before a turn: threads of a runtime spin for a while after their last call and would slow down the next."""
WARM_CALLS = 3
"""Calls at the start of a turn that are not timed: caches are still full of data of another network."""
Clock = Callable[[Callable[[], Any]], float]
"""Makes a call and returns its seconds."""


def interleave(
    calls: Sequence[Callable[[], Any]],
    runs: int,
    clocks: Sequence[Clock] | None = None,
    progress: Callable[[int], Any] = lambda calls: None,
) -> list[list[float]]:
    """Time each call `runs` times in turns. Each round begins with a different call.

    Args:
        clocks: the clock of each call; default: `wall_seconds`.
        progress: called after each turn with the number of its timed calls.

    Returns:
        The seconds of each call, `runs` numbers per call.
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
