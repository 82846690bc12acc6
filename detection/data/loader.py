"""Batches: which images go together in which order, and the DataLoader around them."""

import errno
import logging
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.queues import Queue
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader, Dataset

from detection.core.errors import UserError
from detection.core.memory import is_out_of_memory
from detection.data.dataset import DetectionDataset, Sample
from detection.data.sampler import EvalBatchSampler, TrainBatchSampler

log = logging.getLogger("detection")
Batch = tuple[list[torch.Tensor], list[dict]]
NO_MEMORY = errno.ENOMEM
"""Exit status of a worker that had no memory to hand its batch over."""


class BadImages:
    """Counts the images that the training skipped, and ends the training if they are too many.

    One broken file among a hundred thousand should not end a night's run; a broken disk should.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.messages: set[str] = set()

    def add(self, message: str) -> None:
        """Say it once. Raises UserError beyond the limit of *different* images."""
        if message in self.messages:
            return
        self.messages.add(message)
        if len(self.messages) > self.limit:
            shown = "\n  ".join(sorted(self.messages)[:10])
            raise UserError(
                f"{len(self.messages)} bad images, more than data.max_bad_images={self.limit}; mend or remove them, "
                f"or raise the limit:\n  {shown}"
            )
        log.warning("passed over, another image takes its place: %s", message)


def build_loader(
    dataset: Dataset,
    batches: TrainBatchSampler | EvalBatchSampler,
    *,
    workers: int,
    device: torch.device,
    join: Callable[[list[torch.Tensor]], Any] = list,
) -> DataLoader:
    """A DataLoader of (`join`ed images, list of targets); use `iterate` on it."""
    # Processes beyond the number of batches would have nothing to read.
    workers = min(workers, len(batches))
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=partial(_collate, join),
        # Each pass over the loader draws a seed for its workers. From the global generator, which dropout uses, that
        # draw would change the dropout of a run that resumes within an epoch, because it makes one more pass.
        generator=torch.Generator(),
        worker_init_fn=_init_worker,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
    )


def iterate(loader: DataLoader, bad: BadImages | None = None) -> Iterator[tuple[Any, Any]]:
    """Yield the batches (images, list of target dicts); errors of workers become a `UserError` in the main process.

    Args:
        bad: counts images passed over; None allows none.

    Raises:
        UserError: a bad image; too many of them; a worker that died.
    """
    bad = bad or BadImages(0)
    try:
        for batch in _begin(loader):
            if isinstance(batch, UserError):
                raise batch
            for target in batch[1]:
                for message in target.pop("skipped", ()):
                    bad.add(message)
            yield batch
    except (RuntimeError, ConnectionError, EOFError) as error:
        if not _comes_of_a_death(error):
            raise
        raise UserError(_explain_death(loader, error)) from error


def _begin(loader: DataLoader) -> Iterator[Any]:
    """`iter(loader)`, without the handler of SIGCHLD that comes with it.

    The handler raises an exception wherever the main process happens to be, inside the writing of a file, too. The
    loader itself looks every five seconds whether the workers are alive while it waits for one.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loader)
    finally:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def _end_worker(error: Exception, batch: Any) -> None:
    os._exit(NO_MEMORY if is_out_of_memory(error) else 1)


def _comes_of_a_death(error: Exception) -> bool:
    text = str(error)
    if isinstance(error, RuntimeError):
        return "DataLoader worker (pid" in text
    # The connection to a worker was lost. PyTorch adds this text to an exception that the data set raised.
    return "in DataLoader worker process" not in text


def _explain_death(loader: DataLoader, error: Exception) -> str:
    """Say how a worker ended, and name the image that it was reading (`DetectionDataset.reading`)."""
    # Only a private attribute lists the processes.
    workers = getattr(getattr(loader, "_iterator", None), "_workers", [])
    # A dying process closes its connections before it counts as ended: without the wait, no worker would be dead yet.
    ended = multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=5)
    for worker in workers:
        if worker.sentinel in ended:
            worker.join(5)
    dead = {worker.pid: worker.exitcode for worker in workers if not worker.is_alive()}
    ends = [_end(pid, code) for pid, code in dead.items()] or [
        str(error).splitlines()[0] if str(error) else repr(error)
    ]
    dataset = loader.dataset
    names = []
    if isinstance(dataset, DetectionDataset):
        names = [
            f"{dataset.images / str(dataset.annotations.file_names[i])}"
            for pid, i in dataset.reading.tolist()
            if i >= 0 and pid in dead
        ]
    while_reading = f" while it read {', '.join(names)}" if names else ""
    return (
        f"a process that reads images died{while_reading} ({', '.join(ends)}). If memory ran out, "
        "lower data.workers or data.batch_size; /dev/shm too small for shared memory: see --shm-size of Docker"
    )


def _end(pid: int, code: int | None) -> str:
    if code is not None and code < 0:
        return f"process {pid} was killed by {signal.Signals(-code).name}"
    return f"process {pid} {'ran out of memory' if code == NO_MEMORY else f'ended with exit status {code}'}"


def _collate(
    join: Callable[[list[torch.Tensor]], Any], samples: list[Sample | UserError]
) -> tuple[Any, list[dict[str, Any]]] | UserError:
    good: list[Sample] = []
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
        good.append(sample)
    images, targets = zip(*good, strict=True)
    return join(list(images)), list(targets)


def _init_worker(worker: int) -> None:
    # A thread pool of OpenCV in every worker would oversubscribe the cores.
    cv2.setNumThreads(0)
    # Ctrl-C and signals to a process group are meant for the main process, which needs its workers to finish the step.
    # In a process group of their own the workers do not receive them. The DataLoader can still stop the workers, and
    # they end when the main process ends.
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    # The thread that sends tensors prints a traceback if the main process ends meanwhile.
    sys.excepthook = _pass_over_lost_connections
    # PyTorch prints and drops a batch that cannot be sent; the main process would then wait forever.
    Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]


def _pass_over_lost_connections(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)
