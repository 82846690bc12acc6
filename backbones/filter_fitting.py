"""How well one feature map is a depthwise filter's image of another: least squares over all positions.

Shared by `ghostify` (cheap operations from the original weights) and `redundancy` (table 1 of arXiv 1911.11907).
Maps are given as a sequence of [N, C, H, W] tensors, which may differ in N, H and W. A filter sees them as a
convolution does: zeros around the map, stride 1, the same size out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# Numbers of unfolded windows held at a time: 64 MiB in double precision.
CHUNK = 2**23
# Keeps the normal equations solvable for constant or very smooth maps; relative to a window's mean energy. Small
# enough that a map that is exactly a filter's image of another is still found with an error below 1e-8.
RIDGE = 1e-10


@dataclass(frozen=True)
class MapStatistics:
    """Per channel, over all positions of all images: `mean` and `variance`, float64 [C]; `positions` in all."""

    mean: Tensor
    variance: Tensor
    positions: int

    @property
    def dead(self) -> Tensor:
        """bool [C]: maps that are constant, as behind a ReLU that never opens; nothing can be said of them."""
        return self.variance <= 1e-12 * (self.mean.square() + self.variance).clamp_min(1e-30)


def map_statistics(maps: Sequence[Tensor]) -> MapStatistics:
    positions = sum(m.shape[0] * m.shape[2] * m.shape[3] for m in maps)
    mean = sum((m.double().sum((0, 2, 3)) for m in maps), torch.zeros(())) / positions
    # In two passes: energy minus squared mean would leave nothing of a small variance on a large mean.
    squares = sum(((m.double() - mean[:, None, None]).square().sum((0, 2, 3)) for m in maps), torch.zeros(()))
    return MapStatistics(mean, squares / positions, positions)


def pair_errors(maps: Sequence[Tensor], kernel_size: int, *, bias: bool = True) -> Tensor:
    """The error of every ordered pair of maps under its best filter.

    Args:
        kernel_size: d, odd.
        bias: whether a constant may be added to the filtered map.

    Returns:
        float64 [C, C]: mean squared error of map j (column) predicted from map i (row), divided by the variance
        of map j: 0 is exact; 1 is no better than a constant. (Without a bias it can be above 1: a map of large mean is
        then not even predicted as well as by its mean.) Columns of dead maps are 0.
    """
    statistics = map_statistics(maps)
    channels = len(statistics.mean)
    energy = statistics.variance + statistics.mean.square()
    errors = torch.empty(channels, channels, dtype=torch.float64)
    step = _sources_at_a_time(maps, kernel_size)
    for start in range(0, channels, step):
        gram, cross = torch.zeros(()), torch.zeros(())
        for batch in maps:
            windows = _windows(batch[:, start : start + step], kernel_size, bias)
            gram = gram + _gram(windows)
            # By far the most work, in single precision: its error is some 1e-6 of the energy.
            targets = batch.transpose(0, 1).flatten(1).float()
            cross = cross + (windows.flatten(0, 1) @ targets.mT).unflatten(0, windows.shape[:2]).double()
        explained = (_solve(gram, cross) * cross).sum(1) / statistics.positions
        errors[start : start + step] = energy - explained
    errors.clamp_(min=0)
    errors /= statistics.variance
    errors[:, statistics.dead] = 0
    return errors.fill_diagonal_(0)


def fit_filters(
    maps: Sequence[Tensor], sources: Sequence[int], targets: Sequence[int], kernel_size: int, *, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """The best filter of each pair (sources[k], targets[k]), in double precision.

    Returns:
        filters float64 [K, d, d] as `conv2d` takes them, constants float64 [K] (zeros without `bias`), and errors
        float64 [K], as of `pair_errors`.
    """
    statistics = map_statistics(maps)
    count, d = len(sources), kernel_size
    source_index, target_index = torch.tensor(sources, dtype=torch.long), torch.tensor(targets, dtype=torch.long)
    solutions = torch.empty(count, d * d + bias, dtype=torch.float64)
    explained = torch.empty(count, dtype=torch.float64)
    step = _sources_at_a_time(maps, kernel_size)
    for start in range(0, count, step):
        part = slice(start, start + step)
        gram, cross = torch.zeros(()), torch.zeros(())
        for batch in maps:
            windows = _windows(batch[:, source_index[part]].double(), kernel_size, bias)
            gram = gram + _gram(windows)
            wanted = batch[:, target_index[part]].transpose(0, 1).flatten(1).double()
            cross = cross + windows @ wanted[:, :, None]
        solution = _solve(gram, cross)
        solutions[part] = solution[:, :, 0]
        # What the filter that was found really explains, ridge and all.
        explained[part] = (2 * cross * solution - gram @ solution * solution).sum((1, 2)) / statistics.positions
    variance, mean = statistics.variance[target_index], statistics.mean[target_index]
    errors = (variance + mean.square() - explained).clamp(min=0) / variance
    errors[statistics.dead[target_index]] = 0
    filters = solutions[:, : d * d].reshape(count, d, d)
    return filters, solutions[:, -1] if bias else torch.zeros(count, dtype=torch.float64), errors


def _windows(maps: Tensor, kernel_size: int, bias: bool) -> Tensor:
    """[N, K, H, W] -> [K, d * d (+ 1, of ones), N * H * W]: what a filter sees at each position."""
    count, channels = maps.shape[:2]
    windows = F.unfold(maps.reshape(-1, 1, *maps.shape[2:]), kernel_size, padding=kernel_size // 2)
    windows = windows.reshape(count, channels, kernel_size**2, -1).permute(1, 2, 0, 3).flatten(2)
    return F.pad(windows, (0, 0, 0, 1), value=1.0) if bias else windows


def _gram(windows: Tensor) -> Tensor:
    # Neighbouring pixels are nearly equal, so that the inverse of this matrix is large: double precision.
    windows = windows.double()
    return windows @ windows.mT


def _solve(gram: Tensor, cross: Tensor) -> Tensor:
    size = gram.shape[-1]
    scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-300)
    regular = gram + RIDGE * scale[:, None, None] * torch.eye(size, dtype=gram.dtype)
    return torch.linalg.solve(regular, cross)


def _sources_at_a_time(maps: Sequence[Tensor], kernel_size: int) -> int:
    positions = max(m.shape[0] * m.shape[2] * m.shape[3] for m in maps)
    return max(1, CHUNK // ((kernel_size**2 + 1) * positions))
