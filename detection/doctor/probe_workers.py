"""Probe images in worker processes; a worker that crashes is replaced, and its file is reported as damaged."""

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
"""Rows of images, and their paths."""


def probe_in_processes(jobs: Sequence[Job], workers: int, decode: bool) -> Iterator[tuple[list[int], list[ImageProbe]]]:
    """Yield the rows and probes of each job when it is done, in any order. All processes end with the generator.

    Uses pipes and no other thread: the threads and locks of an executor do not survive a KeyboardInterrupt.
    """
    waiting = deque(jobs)
    busy: dict[Connection, tuple[_Worker, Job]] = {}
    all_workers: list[_Worker] = []

    def start_worker() -> None:
        with interrupts_at_checks() as check:  # so that no worker is started without being in the list
            try:
                all_workers.append(_Worker())
            except (EOFError, OSError):
                check()  # the signal may have ended the fork server
                raise
        assign_job(all_workers[-1])

    def assign_job(worker: _Worker) -> None:
        if waiting:
            job = waiting.popleft()
            busy[worker.pipe] = worker, job
            with contextlib.suppress(OSError):  # the worker has died; connection.wait reports it below
                worker.pipe.send((job[1], decode))

    try:
        for _ in range(min(workers, len(jobs))):
            start_worker()
        while busy:
            for pipe in connection.wait(list(busy)):
                worker, (rows, names) = busy.pop(pipe)  # type: ignore[call-overload]
                try:
                    found = worker.pipe.recv()
                except (EOFError, OSError):
                    if len(rows) > 1:  # retry one by one, to find the file
                        waiting.extendleft(([row], [name]) for row, name in zip(rows, names, strict=True))
                    else:
                        yield rows, [ImageProbe("damaged", f"the process that read {Path(names[0]).name} crashed")]
                    start_worker()
                else:
                    assign_job(worker)
                    yield rows, found
    finally:
        for worker in all_workers:
            worker.end()


class _Worker:
    def __init__(self) -> None:
        # No fork: the threads of OpenCV and PyTorch do not survive it.
        context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
        if sys.platform == "linux":
            # Import once for all workers.
            context.set_forkserver_preload(["detection.doctor.image_probe"])
            # Ctrl-C in a terminal reaches all processes. Block it in the fork server and in the workers that it forks.
            resource_tracker.ensure_running()  # first, because its start unblocks SIGINT
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                forkserver.ensure_running()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self.pipe, worker_pipe = context.Pipe()
        self.process = context.Process(target=_run_worker, args=(worker_pipe, probe_many), daemon=True)
        self.process.start()
        worker_pipe.close()

    def end(self) -> None:
        self.process.kill()
        self.process.join(5)
        self.pipe.close()


def _run_worker(pipe: Connection, probe: Callable[[list[str], bool], list[ImageProbe]]) -> None:
    init_worker()
    with contextlib.suppress(EOFError, OSError):  # the main process has ended
        while True:
            names, decode = pipe.recv()
            pipe.send(probe(names, decode))
