"""Threads that prefetch inputs and write results. OpenCV and PyTorch release Python's lock while they run."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


def prefetch_map(
    function: Callable[[T], R], items: Iterable[T], *, threads: int, depth: int
) -> Generator[tuple[T, Future[R]], None, None]:
    """Call `function` on each item in `threads` threads, up to `depth` items before the consumer needs them.

    Yields each item with its future, in the order of the items. `Future.result` raises the exceptions of `function`, so
    an item that fails does not stop the others. Use `contextlib.closing` to stop early: pending calls are cancelled.
    """
    pool = ThreadPoolExecutor(threads, "prefetch")
    pending: deque[tuple[T, Future[R]]] = deque()
    try:
        for item in items:
            pending.append((item, pool.submit(function, item)))
            if len(pending) > depth:
                yield pending.popleft()
        while pending:
            yield pending.popleft()
    finally:
        pool.shutdown(cancel_futures=True)


class AsyncWriter:
    """Runs jobs in background threads; a single thread runs them in order.

    With more than `depth` pending jobs `submit` blocks. All jobs are finished when the `with` block ends, also after
    Ctrl-C. The first error of a job is raised by a later `submit` or at the end of the block.
    """

    def __init__(self, *, threads: int, depth: int) -> None:
        self.depth = depth
        self._pool = ThreadPoolExecutor(threads, "writer")
        self._jobs: deque[Future[None]] = deque()

    def submit(self, job: Callable[..., None], *arguments: Any) -> None:
        self._jobs.append(self._pool.submit(job, *arguments))
        while len(self._jobs) > self.depth:
            self._jobs.popleft().result()

    def __enter__(self) -> "AsyncWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        if error is None:
            for job in self._jobs:
                job.result()


class LatestFrame:
    """The latest frame of a live source, so that a network slower than the camera does not lag behind it.

    A thread reads all frames. `get` waits for a frame newer than the last one that it returned; frames in between are
    dropped.

    Args:
        read: returns the next frame, or None at the end.
    """

    def __init__(self, read: Callable[[], T | None]) -> None:
        self._read = read
        self._frame: Any = None
        self._ended = self._stopped = False
        self._error: BaseException | None = None
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="camera", daemon=True)
        self._thread.start()

    def get(self) -> Any:
        """The latest frame, or None after the last one. Raises the exceptions of `read`."""
        with self._change:
            self._change.wait_for(lambda: self._frame is not None or self._ended)
            frame, self._frame = self._frame, None
            if frame is None and self._error is not None:
                raise self._error
            return frame

    def close(self) -> None:
        """Stop after the frame that is being read."""
        self._stopped = True
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stopped and (frame := self._read()) is not None:
                with self._change:
                    self._frame = frame
                    self._change.notify()
        except BaseException as error:
            self._error = error
        with self._change:
            self._ended = True
            self._change.notify()
