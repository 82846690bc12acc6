"""Which images go together in which order, for training and for evaluation."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from detection.data.dataset import Draw


class TrainBatchSampler(Sampler[list[Draw]]):
    """Shuffled batches, a function of (seed, epoch) alone, so that a resumed run goes on where it was.

    Of several ranks each gets its own part of the same global batches, which are as `batch_size * world_size` on one
    rank would make them.

    Args:
        sizes: int [n, 2], width and height.
        batch_size: images a rank.
        group_by_aspect: landscape and portrait images go into separate batches, so that a batch is padded little.
        short_sides: each batch has one of them by chance (multi-scale training); () leaves the data set's own.

    All batches are full; less than a global batch of images sits out an epoch (others each time). A set smaller
    than one global batch makes one smaller batch, in which a rank has at least one image.
    """

    def __init__(
        self,
        sizes: np.ndarray,
        batch_size: int,
        seed: int,
        group_by_aspect: bool = False,
        *,
        short_sides: Sequence[int] = (),
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.portrait = (sizes[:, 0] < sizes[:, 1]) & group_by_aspect
        self.batch_size = batch_size
        self.seed = seed
        self.short_sides = tuple(short_sides)
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.start = 0
        """First batch to give: above 0 when an epoch is resumed in its middle."""
        self.mix = True
        """Whether samples may be mixed from several images; see `Draw.mix`."""
        self.short_side: int | None = None
        """Of the images of this epoch (progressive training), where no batch draws one by chance."""

    def __len__(self) -> int:
        return max(1, len(self.portrait) // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[Draw]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        together = self.batch_size * self.world_size
        batches: list[list[int]] = []
        waiting: tuple[list[int], list[int]] = ([], [])
        for i in rng.permutation(len(self.portrait)).tolist():
            group = waiting[int(self.portrait[i])]
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
            yield [Draw(self.epoch, i, side, self.mix) for i in own]


class EvalBatchSampler(Sampler[list[Draw]]):
    """Each image once, images of like shape together: less padding, and few shapes for kernels to prepare.

    Of several ranks each gets every `world_size`-th batch: nothing is padded with duplicates, some ranks have one less.
    """

    def __init__(self, sizes: np.ndarray, batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        order = np.lexsort((np.arange(len(sizes)), sizes[:, 1], sizes[:, 0] / sizes[:, 1])).tolist()
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        self.batches = batches[rank::world_size]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Draw]]:
        for batch in self.batches:
            yield [Draw(0, i) for i in batch]
