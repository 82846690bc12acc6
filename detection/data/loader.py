"""Batches: which images go together in which order, and the DataLoader around them."""

import os
from collections.abc import Iterator

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from detection.data.dataset import DetectionDataset, Sample
from detection.errors import UserError

Batch = tuple[list[torch.Tensor], list[dict]]


class TrainBatches(Sampler[list[tuple[int, int]]]):
    """Shuffled batches of (epoch, index), a function of (seed, epoch) alone, so that a resumed run goes on.

    Args:
        sizes: int [n, 2], width and height.
        group_by_aspect: landscape and portrait pictures go into separate batches, so that a batch is padded little.

    All batches are full; up to batch_size - 1 images sit out an epoch (others each time). A set smaller than
    one batch makes one smaller batch.
    """

    def __init__(self, sizes: np.ndarray, batch_size: int, seed: int, group_by_aspect: bool) -> None:
        self.portrait = (sizes[:, 0] < sizes[:, 1]) & group_by_aspect
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self.start = 0
        """First batch to give: above 0 when an epoch is resumed in its middle."""

    def __len__(self) -> int:
        return max(1, len(self.portrait) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        batches: list[list[int]] = []
        waiting: tuple[list[int], list[int]] = ([], [])
        for i in rng.permutation(len(self.portrait)).tolist():
            group = waiting[int(self.portrait[i])]
            group.append(i)
            if len(group) == self.batch_size:
                batches.append(group.copy())
                group.clear()
        rest = waiting[0] + waiting[1]
        for start in range(0, len(rest), self.batch_size):
            batches.append(rest[start : start + self.batch_size])
        for batch in batches[self.start : len(self)]:
            yield [(self.epoch, i) for i in batch]


class EvalBatches(Sampler[list[tuple[int, int]]]):
    """Each image once, pictures of like shape together: less padding, and few shapes for kernels to prepare."""

    def __init__(self, sizes: np.ndarray, batch_size: int) -> None:
        self.order = np.lexsort((np.arange(len(sizes)), sizes[:, 1], sizes[:, 0] / sizes[:, 1])).tolist()
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for start in range(0, len(self.order), self.batch_size):
            yield [(0, i) for i in self.order[start : start + self.batch_size]]


def build_loader(
    dataset: DetectionDataset, batches: TrainBatches | EvalBatches, *, workers: int, device: torch.device
) -> DataLoader:
    """A DataLoader of (images, targets) lists; use `iterate` on it."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_init_worker,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
    )


def iterate(loader: DataLoader) -> Iterator[Batch]:
    """The batches; a UserError met by a worker is raised here, in the main process, with its plain message."""
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def _collate(samples: list[Sample | UserError]) -> Batch | UserError:
    good: list[Sample] = []
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
        good.append(sample)
    images, targets = zip(*good, strict=True)
    return list(images), list(targets)


def _init_worker(worker: int) -> None:
    # OpenCV's own thread pool in every worker would fight over the cores.
    cv2.setNumThreads(0)
    # A terminal's Ctrl-C, and signals to a job's process group, are for the main process: it decides what becomes of
    # the run and still needs its workers to finish the step. A group of their own keeps them out of it; the
    # DataLoader can still end them, and they end by themselves when the main process is gone.
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
