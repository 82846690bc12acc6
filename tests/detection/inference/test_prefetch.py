"""Threads that read ahead and write behind: order, bounds, errors, ends."""

import threading
import time

import pytest

from detection import UserError
from detection.inference.prefetch import AsyncWriter, LatestFrame, prefetch_map


def test_prefetch_map_keeps_order_and_bounds():
    running, most, taken = [0], [0], [0]

    def read(item):
        running[0] += 1
        most[0] = max(most[0], running[0] - taken[0])
        time.sleep(0.001 * (5 - item % 5))
        if item == 7:
            raise UserError("seven")
        return item

    results = []
    for _, future in prefetch_map(read, range(20), threads=3, depth=4):
        taken[0] += 1
        try:
            results.append(future.result())
        except UserError:
            results.append("failed")
    assert results == [*range(7), "failed", *range(8, 20)]
    assert most[0] <= 5


def test_prefetch_map_stops_when_closed():
    started = []
    reading = prefetch_map(lambda item: started.append(item) or time.sleep(0.01), range(1000), threads=1, depth=3)
    next(reading)
    reading.close()
    assert len(started) <= 5 and threading.active_count() < 20


def test_async_writer_is_bounded_in_order_and_finishes():
    done = []

    def job(number):
        time.sleep(0.005)
        done.append(number)

    with pytest.raises(KeyboardInterrupt), AsyncWriter(threads=1, depth=2) as writing:
        for number in range(10):
            writing.submit(job, number)
            assert len(done) >= number - 2
        raise KeyboardInterrupt
    assert done == list(range(10))


def test_async_writer_raises_errors_of_jobs():
    def job(number):
        if number == 1:
            raise UserError("disk full")

    with pytest.raises(UserError, match="disk full"), AsyncWriter(threads=1, depth=1) as writing:
        for number in range(10):
            writing.submit(job, number)
        raise AssertionError("not told")
    with pytest.raises(UserError, match="disk full"), AsyncWriter(threads=1, depth=5) as writing:
        writing.submit(job, 1)


def test_latest_frame_passes_the_end_and_errors():
    frames = iter([1, 2, 3])

    def read():
        time.sleep(0.01)
        return next(frames, None)

    newest = LatestFrame(read)
    taken = []
    while (frame := newest.get()) is not None:
        taken.append(frame)
    newest.close()
    assert taken == [1, 2, 3]

    def broken():
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        LatestFrame(broken).get()
