"""Weights of ghost modules from those of the convolutions that they replace, and how good a start they are.

Each primary filter is one of the original's, each cheap filter is fitted by least squares to another of its maps.
Layers are fitted one by one, on what the *original* network computes from the calibration inputs.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from backbones.filter_fitting import fit_filters, map_statistics, pair_errors
from backbones.ghost_conv import GhostConv2d
from backbones.hooks import evaluation, watched

# Of each layer's map, over all images; more tell a filter of a few dozen weights nothing new, and early layers of
# a large network would fill the memory.
MAX_POSITIONS = 2**15


def record(
    model: nn.Module, layers: Mapping[str, nn.Module], inputs: Iterable[Any], max_positions: int = MAX_POSITIONS
) -> dict[str, list[Tensor]]:
    """Run the model on all inputs and keep what the layers put out: name -> list of [N, C, H, W] on the CPU.

    A layer that is called several times (a detection head on five levels) has several entries an input. Once a
    layer has `max_positions` positions (N x H x W) no more are kept.

    Raises:
        ValueError: there are no inputs, or a layer did not run.
    """
    maps: dict[str, list[Tensor]] = {name: [] for name in layers}
    room = dict.fromkeys(layers, max_positions)

    def keep(name: str, args: tuple, output: Tensor) -> None:
        if room[name] > 0:
            maps[name].append(output.reshape(-1, *output.shape[-3:]).float().cpu().clone())
            room[name] -= maps[name][-1][:, 0].numel()

    count = 0
    with watched(layers, keep):
        for batch in inputs:
            model(*(batch if isinstance(batch, tuple) else (batch,)))
            count += 1
    if count == 0:
        raise ValueError("there are no calibration inputs")
    idle = [name for name, kept in maps.items() if not kept]
    if idle:
        raise ValueError(f"the calibration inputs do not reach {idle[0]}: exclude it, or give inputs that use it")
    return maps


@torch.no_grad()
def fit(ghost: GhostConv2d, convolution: nn.Conv2d, maps: Sequence[Tensor]) -> float:
    """Set the weights of `ghost` so that it comes as near as its structure allows to what `convolution` put out.

    Output channel i of the ghost module stands for channel i of the convolution (`GhostConv2d.order`).

    Args:
        maps: outputs of the convolution, [N, C, H, W] each, as `record` gives them.

    Returns:
        Squared error over all channels, divided by their variances' sum; primary channels are exact.
    """
    d, bias = ghost.cheap.kernel_size[0], ghost.cheap.bias is not None
    variance = map_statistics(maps).variance
    # Squared errors, not those relative to each channel's variance: on tf_efficientnet_lite0's ImageNet weights that
    # left less error both in the layers (0.22 in place of 0.31) and in the network's output.
    groups = choose_groups(pair_errors(maps, d, bias=bias) * variance, ghost.ratio)
    primaries = [primary for primary, _ in groups]
    # Cheap filters p * (ratio - 1) … see primary map p; where a group has fewer ghosts, the rest stay zero and unused.
    pairs = [
        (primary, ghost_channel, place * (ghost.ratio - 1) + offset)
        for place, (primary, ghosts) in enumerate(groups)
        for offset, ghost_channel in enumerate(ghosts)
    ]
    sources, targets, places = (list(column) for column in zip(*pairs, strict=True))
    filters, constants, errors = fit_filters(maps, sources, targets, d, bias=bias)

    ghost.primary.weight.copy_(convolution.weight[primaries])
    ghost.cheap.weight.zero_()[places] = filters[:, None].to(ghost.cheap.weight)
    if ghost.primary.bias is not None and ghost.cheap.bias is not None and convolution.bias is not None:
        ghost.primary.bias.copy_(convolution.bias[primaries])
        ghost.cheap.bias.zero_()[places] = constants.to(ghost.cheap.bias)
    order = torch.empty(ghost.out_channels, dtype=torch.long)
    order[primaries] = torch.arange(len(primaries))
    order[targets] = len(primaries) + torch.tensor(places)
    ghost.set_order(order)
    return float((errors * variance[targets]).sum() / variance.sum())


def choose_groups(errors: Tensor, ratio: int) -> list[tuple[int, list[int]]]:
    """Divide channels into `ceil(C / ratio)` groups of one primary channel and at most ratio - 1 ghosts.

    The sum of errors[primary, ghost] is kept small; the least cannot be had in reasonable time (for
    larger ratios the problem is NP-hard). First, primary channels are chosen greedily: always the one with which most
    of the error is gone. Then ghosts are assigned to primaries at least total error, and the best channel of each
    group becomes its primary, in turns, until nothing improves.

    Args:
        errors: [C, C], errors[i, j] of predicting j from i, zeros in the diagonal.

    Returns:
        (primary, ghosts) of each group.
    """
    errors = errors.double()
    channels = len(errors)
    primaries = _spread(errors, -(-channels // ratio))
    groups: list[tuple[int, list[int]]] = []
    best = float("inf")
    while True:
        candidate = _assign(errors, primaries, ratio)
        total = sum(float(errors[primary, ghosts].sum()) for primary, ghosts in candidate)
        if total >= best * (1 - 1e-9):
            return groups
        best, groups = total, candidate
        primaries = []
        for primary, ghosts in groups:
            members = torch.tensor([primary, *ghosts])
            primaries.append(int(members[errors[members][:, members].sum(1).argmin()]))


def _spread(errors: Tensor, count: int) -> list[int]:
    """Greedy choice of channels that together predict all channels best, each being predicted by the best of them."""
    left = errors.max(0).values
    gain = (left - errors).clamp(min=0).sum(1)
    chosen: list[int] = []
    for _ in range(count):
        gain[chosen] = -torch.inf
        best = int(gain.argmax())
        chosen.append(best)
        # Only what the new primary channel predicts better than those before it changes anybody's gain.
        better = errors[best] < left
        own = errors[:, better]
        gain -= (left[better] - own).clamp(min=0).sum(1)
        left[better] = errors[best, better]
        gain += (left[better] - own).clamp(min=0).sum(1)
    return chosen


def _assign(errors: Tensor, primaries: Sequence[int], ratio: int) -> list[tuple[int, list[int]]]:
    """All other channels to primaries, at most ratio - 1 each, at least total error."""
    taken = set(primaries)
    others = [channel for channel in range(len(errors)) if channel not in taken]
    cost = errors[list(primaries)][:, others].repeat_interleave(ratio - 1, dim=0)
    rows, columns = linear_sum_assignment(cost.numpy())
    groups: list[tuple[int, list[int]]] = [(primary, []) for primary in primaries]
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
        groups[row // (ratio - 1)][1].append(others[column])
    return groups


class RelativeError:
    """Squared error relative to variance, summed over batches: 0 is equal, 1 as far off as a constant would be.

    Feature maps [N, C, H, W] are a constant of its own in each channel then; anything else (logits) a single one.
    """

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    def add(self, found: Tensor, expected: Tensor) -> None:
        found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
        if expected.dim() == 4:
            found, expected = (x.transpose(0, 1).flatten(1) for x in (found, expected))
        else:
            found, expected = found.reshape(1, -1), expected.reshape(1, -1)
        count = torch.full((len(expected),), float(expected.shape[1]))
        sums = torch.stack([count, expected.sum(1), expected.square().sum(1), (found - expected).square().sum(1)])
        self.sums = sums if self.sums is None else self.sums + sums

    def value(self) -> float:
        if self.sums is None:
            return float("nan")
        count, total, squares, error = self.sums
        variance = squares - total.square() / count
        return float(error.sum() / variance.sum())


def output_errors(
    original: nn.Module,
    ghosted: nn.Module,
    layers: Sequence[str],
    inputs: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> tuple[dict[str, float], float]:
    """How far a ghosted copy is from the network that it was made of.

    Args:
        layers: names of the replaced convolutions.
        inputs: batches: an input, or a tuple of arguments.
        forward: what to compare of the networks: (network, batch) -> tensors in lists, tuples and dicts. By
            default their output.

    Returns:
        layer -> error of that ghost module given the original's own input (so, without the errors of
        those before it), and the error of the whole network's output, mean over its tensors; see `RelativeError`.
    """

    def run(model: nn.Module, batch: Any) -> Any:
        return model(*(batch if isinstance(batch, tuple) else (batch,)))

    forward = forward or run
    by_layer = {name: RelativeError() for name in layers}
    by_tensor: list[RelativeError] = []

    def compare(name: str, args: tuple, output: Tensor) -> None:
        by_layer[name].add(ghosted.get_submodule(name)(*args), output)

    watch = watched({name: original.get_submodule(name) for name in layers}, compare)
    with watch, evaluation(original), evaluation(ghosted):
        for batch in inputs:
            expected, found = tensors_of(forward(original, batch)), tensors_of(forward(ghosted, batch))
            by_tensor = by_tensor or [RelativeError() for _ in expected]
            for error, tensor, reference in zip(by_tensor, found, expected, strict=True):
                error.add(tensor, reference)
    values = [error.value() for error in by_tensor]
    return {name: error.value() for name, error in by_layer.items()}, sum(values) / max(1, len(values))


def tensors_of(output: Any) -> list[Tensor]:
    """The floating-point tensors in nested dicts, lists and tuples, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    return [tensor for part in output for tensor in tensors_of(part)] if isinstance(output, list | tuple) else []
