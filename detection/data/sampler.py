"""Batches of images and their order, for training and for evaluation."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from detection.data.annotations import ImageSets
from detection.data.dataset import SampleKey


class TrainBatchSampler(Sampler[list[SampleKey]]):
    """Shuffled batches that depend on (seed, epoch) only, so that a resumed run continues where it stopped.

    With several ranks, each returns its own part of the same global batches, which are those that one rank would have
    with `batch_size * world_size`.

    Args:
        sizes: int [n, 2], width and height.
        batch_size: images per rank.
        group_by_aspect: put landscape and portrait images into separate batches, which need less padding.
        short_sides: each batch draws one of them (multi-scale training); () keeps the dataset's own.
        sets: an epoch has the images of each set as often as its weight says. Of a fraction, one epoch after the other
            takes its share of the set in an order that chance fixed; None: each image once.

    All batches are full. Each epoch leaves out the images that do not fill a global batch (other images each time). A
    dataset smaller than one global batch makes one smaller batch, in which each rank has at least one image.
    """

    def __init__(
        self,
        sizes: np.ndarray,
        batch_size: int,
        seed: int,
        group_by_aspect: bool = False,
        *,
        short_sides: Sequence[int] = (),
        sets: ImageSets | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.portrait = (sizes[:, 0] < sizes[:, 1]) & group_by_aspect
        self.batch_size = batch_size
        self.seed = seed
        self.short_sides = tuple(short_sides)
        self.sets = sets
        self.rank, self.world_size = rank, world_size
        self.set_epoch(0)

    def set_epoch(self, epoch: int, *, start: int = 0, mix: bool = True, short_side: int | None = None) -> None:
        """Set what the next iteration returns.

        Args:
            start: the first batch; above 0 when an epoch is resumed in its middle.
            mix: see `SampleKey.mix`.
            short_side: of the images of this epoch (progressive training), unless each batch draws one of
                `short_sides`.
        """
        self.epoch, self.start, self.mix, self.short_side = epoch, start, mix, short_side

    def __len__(self) -> int:
        return max(1, len(self._images()[0]) // (self.batch_size * self.world_size))

    def _images(self) -> tuple[np.ndarray, np.ndarray]:
        """The images of the epoch (rows), and how often each came before; as many in every epoch."""
        if self.sets is None:
            return np.arange(len(self.portrait)), np.zeros(len(self.portrait), np.int64)
        rows, repeats = [], []
        for number, weight in enumerate(self.sets.weights):
            own = np.flatnonzero(self.sets.of_image == number)
            whole = int(weight)
            rest = round((weight - whole) * len(own)) if whole else max(1, round(weight * len(own)))
            order = np.random.default_rng([self.seed, number]).permutation(own)
            share = order[(self.epoch * rest + np.arange(rest)) % len(own)]
            rows += [own] * whole + [share]
            repeats += [np.full(len(own), repeat) for repeat in range(whole)] + [np.full(rest, whole)]
        return np.concatenate(rows), np.concatenate(repeats)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        together = self.batch_size * self.world_size
        rows, repeats = self._images()
        batches: list[list[int]] = []
        waiting: tuple[list[int], list[int]] = ([], [])
        for i in rng.permutation(len(rows)).tolist():
            group = waiting[int(self.portrait[rows[i]])]
            group.append(i)
            if len(group) == together:
                batches.append(group.copy())
                group.clear()
        rest = waiting[0] + waiting[1]
        for start in range(0, len(rest), together):
            batches.append(rest[start : start + together])
        sides = [self.short_side] * len(batches)
        if self.short_sides:
            sides = rng.choice(self.short_sides, len(batches)).tolist()
        for batch, side in list(zip(batches, sides, strict=True))[self.start : len(self)]:
            own = batch[self.rank :: self.world_size] or batch[:1]
            yield [SampleKey(self.epoch, int(rows[i]), side, self.mix, int(repeats[i])) for i in own]


class EvalBatchSampler(Sampler[list[SampleKey]]):
    """Each image once, images of similar shape together: less padding, and fewer shapes that kernels are tuned for.

    With several ranks, each has every `world_size`-th batch. No image is repeated, so some ranks have one batch less.
    """

    def __init__(self, sizes: np.ndarray, batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        order = np.lexsort((np.arange(len(sizes)), sizes[:, 1], sizes[:, 0] / sizes[:, 1])).tolist()
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        self.batches = batches[rank::world_size]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for batch in self.batches:
            yield [SampleKey(0, i) for i in batch]
