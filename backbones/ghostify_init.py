"""Initializes ghost modules from the convolutions that they replace, and measures the error.

Each primary filter is a copy of one of the original filters; each cheap filter is fitted by least squares to another
output channel. Layers are fitted one by one, on the outputs of the *original* network for the calibration inputs.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from backbones.filter_fitting import channel_statistics, fit_filters, pairwise_errors
from backbones.ghost_conv import GhostConv2d
from backbones.hooks import eval_mode, forward_hooks

# Positions of each layer's map that are kept, over all images. More do not improve a filter of a few dozen weights, and
# the early layers of a large network would fill the memory.
MAX_POSITIONS = 2**15


def record_outputs(
    model: nn.Module, layers: Mapping[str, nn.Module], inputs: Iterable[Any], max_positions: int = MAX_POSITIONS
) -> dict[str, list[Tensor]]:
    """Run the model on all inputs and record the outputs of the layers: name -> list of [N, C, H, W] on the CPU.

    A layer that is called several times (a detection head on five levels) has several entries for each input. A layer
    stops recording at `max_positions` positions (N x H x W).

    Raises:
        ValueError: there are no inputs, or a layer did not run.
    """
    maps: dict[str, list[Tensor]] = {name: [] for name in layers}
    remaining = dict.fromkeys(layers, max_positions)

    def record(name: str, args: tuple, output: Tensor) -> None:
        if remaining[name] > 0:
            maps[name].append(output.reshape(-1, *output.shape[-3:]).float().cpu().clone())
            remaining[name] -= maps[name][-1][:, 0].numel()

    count = 0
    with forward_hooks(layers, record):
        for batch in inputs:
            model(*(batch if isinstance(batch, tuple) else (batch,)))
            count += 1
    if count == 0:
        raise ValueError("there are no calibration inputs")
    unused = [name for name, outputs in maps.items() if not outputs]
    if unused:
        raise ValueError(f"the calibration inputs do not reach {unused[0]}: exclude it, or give inputs that use it")
    return maps


@torch.no_grad()
def fit_ghost_weights(ghost: GhostConv2d, convolution: nn.Conv2d, maps: Sequence[Tensor]) -> float:
    """Set the weights of `ghost` so that it approximates the outputs of `convolution` as well as its structure allows.

    Output channel i of the ghost module corresponds to channel i of the convolution (`GhostConv2d.order`).

    Args:
        maps: outputs of the convolution from `record_outputs`, [N, C, H, W] each.

    Returns:
        Squared error over all channels, divided by the sum of their variances; primary channels are exact.
    """
    d, bias = ghost.cheap.kernel_size[0], ghost.cheap.bias is not None
    variance = channel_statistics(maps).variance
    # Squared errors, not errors relative to the variance of each channel: with the ImageNet weights of
    # tf_efficientnet_lite0 they gave a lower error in the layers (0.22 instead of 0.31) and in the network's output.
    groups = choose_groups(pairwise_errors(maps, d, bias=bias) * variance, ghost.ratio)
    primaries = [primary for primary, _ in groups]
    # Cheap filters p * (ratio - 1) … read primary map p; in a group with fewer ghosts, the rest stay zero and unused.
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

    The sum of errors[primary, ghost] is minimized approximately, because for larger ratios the exact problem is
    NP-hard. First, primary channels are chosen greedily: each time the one that reduces the error most. Then two steps
    alternate until the error no longer falls: ghosts are assigned to primaries with the least total error, and the best
    channel of each group becomes its primary.

    Args:
        errors: [C, C], errors[i, j] of predicting j from i, with zeros on the diagonal.

    Returns:
        (primary, ghosts) of each group.
    """
    errors = errors.double()
    channels = len(errors)
    primaries = _choose_primaries(errors, -(-channels // ratio))
    groups: list[tuple[int, list[int]]] = []
    best = float("inf")
    while True:
        candidate = _assign_ghosts(errors, primaries, ratio)
        total = sum(float(errors[primary, ghosts].sum()) for primary, ghosts in candidate)
        if total >= best * (1 - 1e-9):
            return groups
        best, groups = total, candidate
        primaries = []
        for primary, ghosts in groups:
            members = torch.tensor([primary, *ghosts])
            primaries.append(int(members[errors[members][:, members].sum(1).argmin()]))


def _choose_primaries(errors: Tensor, count: int) -> list[int]:
    """Choose greedily the channels that predict all channels best, each predicted from its best primary channel."""
    left = errors.max(0).values
    gain = (left - errors).clamp(min=0).sum(1)
    chosen: list[int] = []
    for _ in range(count):
        gain[chosen] = -torch.inf
        best = int(gain.argmax())
        chosen.append(best)
        # Only channels that the new primary predicts better than the earlier ones change the gains.
        better = errors[best] < left
        own = errors[:, better]
        gain -= (left[better] - own).clamp(min=0).sum(1)
        left[better] = errors[best, better]
        gain += (left[better] - own).clamp(min=0).sum(1)
    return chosen


def _assign_ghosts(errors: Tensor, primaries: Sequence[int], ratio: int) -> list[tuple[int, list[int]]]:
    """Assign all other channels to primaries, at most ratio - 1 to each, with the least total error."""
    taken = set(primaries)
    others = [channel for channel in range(len(errors)) if channel not in taken]
    cost = errors[list(primaries)][:, others].repeat_interleave(ratio - 1, dim=0)
    rows, columns = linear_sum_assignment(cost.numpy())
    groups: list[tuple[int, list[int]]] = [(primary, []) for primary in primaries]
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
        groups[row // (ratio - 1)][1].append(others[column])
    return groups


class RelativeError:
    """Squared error divided by the variance, accumulated over batches: 0 is equal, 1 is the error of a constant.

    For feature maps [N, C, H, W] the variance is that within each channel; for other tensors (logits) that of all
    elements.
    """

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    def update(self, found: Tensor, expected: Tensor) -> None:
        found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
        if expected.dim() == 4:
            found, expected = (x.transpose(0, 1).flatten(1) for x in (found, expected))
        else:
            found, expected = found.reshape(1, -1), expected.reshape(1, -1)
        count = torch.full((len(expected),), float(expected.shape[1]))
        sums = torch.stack([count, expected.sum(1), expected.square().sum(1), (found - expected).square().sum(1)])
        self.sums = sums if self.sums is None else self.sums + sums

    def compute(self) -> float:
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
    """The errors of a ghosted copy against the original network.

    Args:
        layers: names of the replaced convolutions.
        inputs: batches: an input, or a tuple of arguments.
        forward: (network, batch) -> the tensors to compare, in lists, tuples and dicts. Default: the network's output.

    Returns:
        layer -> error of that ghost module on the original's input (so without the errors of earlier layers); and the
        error of the network's output, averaged over its tensors; see `RelativeError`.
    """

    def run(model: nn.Module, batch: Any) -> Any:
        return model(*(batch if isinstance(batch, tuple) else (batch,)))

    forward = forward or run
    by_layer = {name: RelativeError() for name in layers}
    by_tensor: list[RelativeError] = []

    def compare(name: str, args: tuple, output: Tensor) -> None:
        by_layer[name].update(ghosted.get_submodule(name)(*args), output)

    watch = forward_hooks({name: original.get_submodule(name) for name in layers}, compare)
    with watch, eval_mode(original), eval_mode(ghosted):
        for batch in inputs:
            expected, found = float_tensors(forward(original, batch)), float_tensors(forward(ghosted, batch))
            by_tensor = by_tensor or [RelativeError() for _ in expected]
            for error, tensor, reference in zip(by_tensor, found, expected, strict=True):
                error.update(tensor, reference)
    values = [error.compute() for error in by_tensor]
    return {name: error.compute() for name, error in by_layer.items()}, sum(values) / max(1, len(values))


def float_tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors in nested dicts, lists and tuples, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    return [tensor for part in output for tensor in float_tensors(part)] if isinstance(output, list | tuple) else []
