"""Work before it is needed and after it was asked for: OpenCV and networks run without Python's lock."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ahead(
    work: Callable[[T], R], items: Iterable[T], *, threads: int, depth: int
) -> Generator[tuple[T, Future[R]], None, None]:
    """Call `work` on each of `items` in `threads` threads, `depth` items ahead of who takes the results.

    Yields each item with its future, in the order of the items. What `work` raises is raised by `Future.result`, so
    that one item that fails need not end the others. Leave early by `contextlib.closing`: what has not begun is left.
    """
    pool = ThreadPoolExecutor(threads, "ahead")
    waiting: deque[tuple[T, Future[R]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) > depth:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        pool.shutdown(cancel_futures=True)


class AsyncWriter:
    """Does jobs in threads of its own, with one thread in order, while the caller goes on.

    At most `depth` jobs are kept waiting; then `submit` waits, too. On leaving the `with` block, also by Ctrl-C, all
    jobs are done to the end. The first error of a job is raised by a later `submit`, or on leaving.
    """

    def __init__(self, *, threads: int, depth: int) -> None:
        self.depth = depth
        self._pool = ThreadPoolExecutor(threads, "behind")
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
    """The newest frame of a live source: a network slower than the camera must not fall ever further behind it.

    A thread takes frames as they come. `take` waits for one that is newer than the last it gave; those in between are
    lost.

    Args:
        read: gives the next frame, or None at the end.
    """

    def __init__(self, read: Callable[[], T | None]) -> None:
        self._read = read
        self._frame: Any = None
        self._ended = self._stopped = False
        self._error: BaseException | None = None
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="camera", daemon=True)
        self._thread.start()

    def take(self) -> Any:
        """The newest frame, or None after the last one. Raises what reading raised."""
        with self._change:
            self._change.wait_for(lambda: self._frame is not None or self._ended)
            frame, self._frame = self._frame, None
            if frame is None and self._error is not None:
                raise self._error
            return frame

    def close(self) -> None:
        """Stop; waits for the frame that is being read."""
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
