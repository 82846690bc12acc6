"""Fits depthwise filters that predict one feature map from another, by least squares over all positions.

Used by `ghostify` (cheap operations from the original weights) and `redundancy` (table 1 of arXiv 1911.11907). Maps are
a sequence of [N, C, H, W] tensors, which may differ in N, H and W. Filters are convolutions with zero padding, stride 1
and an output of the same size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# Elements of the unfolded windows in one chunk: 64 MiB in double precision.
CHUNK = 2**23
# Ridge regularization, relative to the mean energy of a window. It keeps the normal equations solvable for constant or
# very smooth maps, and is small enough that an exact filter is found with an error below 1e-8.
RIDGE = 1e-10


@dataclass(frozen=True)
class ChannelStatistics:
    """`mean` and `variance` of each channel, float64 [C], over all `positions` of all images."""

    mean: Tensor
    variance: Tensor
    positions: int

    @property
    def dead(self) -> Tensor:
        """bool [C]: channels that are constant, as after a ReLU that is always zero; they cannot be fitted."""
        return self.variance <= 1e-12 * (self.mean.square() + self.variance).clamp_min(1e-30)


def channel_statistics(maps: Sequence[Tensor]) -> ChannelStatistics:
    positions = sum(m.shape[0] * m.shape[2] * m.shape[3] for m in maps)
    mean = sum((m.double().sum((0, 2, 3)) for m in maps), torch.zeros(())) / positions
    # Two passes: energy minus squared mean would lose a small variance on a large mean to rounding.
    squares = sum(((m.double() - mean[:, None, None]).square().sum((0, 2, 3)) for m in maps), torch.zeros(()))
    return ChannelStatistics(mean, squares / positions, positions)


def pairwise_errors(maps: Sequence[Tensor], kernel_size: int, *, bias: bool = True) -> Tensor:
    """The error of the best filter for every ordered pair of maps.

    Args:
        kernel_size: d, odd.
        bias: fit a constant as well.

    Returns:
        float64 [C, C]: mean squared error of map j (column) predicted from map i (row), divided by the variance of map
        j: 0 is exact, 1 is no better than a constant. (Without a bias it can exceed 1 for a map with a large mean.)
        Columns of dead channels are 0.
    """
    statistics = channel_statistics(maps)
    channels = len(statistics.mean)
    energy = statistics.variance + statistics.mean.square()
    errors = torch.empty(channels, channels, dtype=torch.float64)
    step = _chunk_size(maps, kernel_size)
    for start in range(0, channels, step):
        gram, cross = torch.zeros(()), torch.zeros(())
        for batch in maps:
            windows = _unfold(batch[:, start : start + step], kernel_size, bias)
            gram = gram + _gram_matrix(windows)
            # Most of the time is spent here, so it runs in single precision; the error is about 1e-6 of the energy.
            targets = batch.transpose(0, 1).flatten(1).float()
            cross = cross + (windows.flatten(0, 1) @ targets.mT).unflatten(0, windows.shape[:2]).double()
        explained = (_solve_ridge(gram, cross) * cross).sum(1) / statistics.positions
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
        float64 [K], as of `pairwise_errors`.
    """
    statistics = channel_statistics(maps)
    count, d = len(sources), kernel_size
    source_index, target_index = torch.tensor(sources, dtype=torch.long), torch.tensor(targets, dtype=torch.long)
    solutions = torch.empty(count, d * d + bias, dtype=torch.float64)
    explained = torch.empty(count, dtype=torch.float64)
    step = _chunk_size(maps, kernel_size)
    for start in range(0, count, step):
        part = slice(start, start + step)
        gram, cross = torch.zeros(()), torch.zeros(())
        for batch in maps:
            windows = _unfold(batch[:, source_index[part]].double(), kernel_size, bias)
            gram = gram + _gram_matrix(windows)
            wanted = batch[:, target_index[part]].transpose(0, 1).flatten(1).double()
            cross = cross + windows @ wanted[:, :, None]
        solution = _solve_ridge(gram, cross)
        solutions[part] = solution[:, :, 0]
        # The energy that the regularized filter explains.
        explained[part] = (2 * cross * solution - gram @ solution * solution).sum((1, 2)) / statistics.positions
    variance, mean = statistics.variance[target_index], statistics.mean[target_index]
    errors = (variance + mean.square() - explained).clamp(min=0) / variance
    errors[statistics.dead[target_index]] = 0
    filters = solutions[:, : d * d].reshape(count, d, d)
    return filters, solutions[:, -1] if bias else torch.zeros(count, dtype=torch.float64), errors


def _unfold(maps: Tensor, kernel_size: int, bias: bool) -> Tensor:
    """[N, K, H, W] -> [K, d * d (+ 1, of ones), N * H * W]: the input window of a filter at each position."""
    count, channels = maps.shape[:2]
    windows = F.unfold(maps.reshape(-1, 1, *maps.shape[2:]), kernel_size, padding=kernel_size // 2)
    windows = windows.reshape(count, channels, kernel_size**2, -1).permute(1, 2, 0, 3).flatten(2)
    return F.pad(windows, (0, 0, 0, 1), value=1.0) if bias else windows


def _gram_matrix(windows: Tensor) -> Tensor:
    # Double precision, because neighboring pixels are nearly equal and the matrix is ill-conditioned.
    windows = windows.double()
    return windows @ windows.mT


def _solve_ridge(gram: Tensor, cross: Tensor) -> Tensor:
    size = gram.shape[-1]
    scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-300)
    regular = gram + RIDGE * scale[:, None, None] * torch.eye(size, dtype=gram.dtype)
    return torch.linalg.solve(regular, cross)


def _chunk_size(maps: Sequence[Tensor], kernel_size: int) -> int:
    positions = max(m.shape[0] * m.shape[2] * m.shape[3] for m in maps)
    return max(1, CHUNK // ((kernel_size**2 + 1) * positions))
