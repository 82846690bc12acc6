"""Batches: which images go together in which order, and the DataLoader around them."""

import errno
import logging
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
    """Counts the images that training had to pass over, and ends it when they are too many.

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
    # More processes than batches would only take time to start.
    workers = min(workers, len(batches))
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=partial(_collate, join),
        # Of its own: the seed that each pass draws for its workers would else come out of the stream that dropout
        # reads, and a run that goes on in the middle of an epoch, which is one pass more, would see other dropout.
        generator=torch.Generator(),
        worker_init_fn=_init_worker,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
    )


def iterate(loader: DataLoader, bad: BadImages | None = None) -> Iterator[tuple[Any, Any]]:
    """The batches (images, list of target dicts); what a worker met is told here, in the main process, in plain words.

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
    # The connection to a worker broke off; what a data set raised in a worker is quoted with this text.
    return "in DataLoader worker process" not in text


def _explain_death(loader: DataLoader, error: Exception) -> str:
    """Say how a worker ended, and name the image that it was reading (`DetectionDataset.reading`)."""
    # Only a private attribute names the processes.
    workers = getattr(getattr(loader, "_iterator", None), "_workers", [])
    dead = {worker.pid: worker.exitcode for worker in workers if not worker.is_alive()}
    ends = [_end(pid, code) for pid, code in dead.items()] or [
        str(error).splitlines()[0] if str(error) else repr(error)
    ]
    dataset = loader.dataset
    names = []
    if isinstance(dataset, DetectionDataset):
        names = [
            f"{dataset.images / str(dataset.index.file_names[i])}"
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
    # OpenCV's own thread pool in every worker would fight over the cores.
    cv2.setNumThreads(0)
    # A terminal's Ctrl-C, and signals to a job's process group, are for the main process: it decides what becomes of
    # the run and still needs its workers to finish the step. A group of their own keeps them out of it; the
    # DataLoader can still end them, and they end by themselves when the main process is gone.
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    # The thread that hands tensors over prints a traceback where the main process breaks off in the middle of it.
    sys.excepthook = _pass_over_lost_connections
    # A batch that cannot be handed over would be printed as a traceback and lost: the main process would wait for ever.
    Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]


def _pass_over_lost_connections(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)
