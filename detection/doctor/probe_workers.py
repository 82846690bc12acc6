"""Processes that look at images. Of one that dies it is known over which file; all end when the command does."""

import contextlib
import multiprocessing
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from detection.core.interrupts import interrupts_at_checks
from detection.doctor.image_probe import ImageProbe, init_worker, probe_many

Job = tuple[list[int], list[str]]
"""Numbers of images, and their files."""


def probe_in_processes(jobs: Sequence[Job], workers: int, decode: bool) -> Iterator[tuple[list[int], list[ImageProbe]]]:
    """Jobs as they are done. A file over which a process dies is told as damaged, and the rest goes on.

    The pipes are waited for by this thread alone. An executor's threads and locks do not survive a KeyboardInterrupt at
    any moment.
    """
    waiting = deque(jobs)
    busy: dict[Connection, tuple[_Worker, Job]] = {}
    everyone: list[_Worker] = []

    def start() -> None:
        with interrupts_at_checks() as check:  # so that none is started and not known
            try:
                everyone.append(_Worker())
            except (EOFError, OSError):
                check()  # the signal may have ended the process that starts them
                raise
        give(everyone[-1])

    def give(worker: _Worker) -> None:
        if waiting:
            job = waiting.popleft()
            busy[worker.pipe] = worker, job
            with contextlib.suppress(OSError):  # it has died, which is seen below
                worker.pipe.send((job[1], decode))

    try:
        for _ in range(min(workers, len(jobs))):
            start()
        while busy:
            for pipe in connection.wait(list(busy)):
                worker, (rows, names) = busy.pop(pipe)  # type: ignore[call-overload]
                try:
                    found = worker.pipe.recv()
                except (EOFError, OSError):
                    if len(rows) > 1:  # each for itself, until it is known which one it was
                        waiting.extendleft(([row], [name]) for row, name in zip(rows, names, strict=True))
                    else:
                        yield rows, [ImageProbe("damaged", f"the process that read {Path(names[0]).name} died of it")]
                    start()
                else:
                    give(worker)
                    yield rows, found
    finally:
        for worker in everyone:
            worker.end()


class _Worker:
    def __init__(self) -> None:
        # Not forked: OpenCV's and PyTorch's threads do not live on in a copy.
        context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
        if sys.platform == "linux":
            # The imports are made once for all of them.
            context.set_forkserver_preload(["detection.doctor.image_probe"])
            # A terminal's Ctrl-C goes to all processes. The server, and so the workers that it forks, never sees it.
            resource_tracker.ensure_running()  # at its own start it would unblock SIGINT
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                forkserver.ensure_running()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, probe_many), daemon=True)
        self.process.start()
        theirs.close()

    def end(self) -> None:
        self.process.kill()
        self.process.join(5)
        self.pipe.close()


def _serve(pipe: Connection, work: Callable[[list[str], bool], list[ImageProbe]]) -> None:
    init_worker()
    with contextlib.suppress(EOFError, OSError):  # the main process has gone
        while True:
            names, decode = pipe.recv()
            pipe.send(work(names, decode))
