"""Exponential moving average of weights (train.ema)."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

Tensors = tuple[Tensor, ...] | list[Tensor]


def ema_decay(target: float, step: int) -> float:
    """Decay at an optimizer step: small at first, so that the average soon forgets the random start."""
    return min(target, (1 + step) / (10 + step))


def averaged_model(model: nn.Module, target: float) -> AveragedModel:
    """A copy of `model` that averages its weights and buffers, with a decay that rises to `target`."""

    def average(old: Tensors, new: Tensors, count: Tensor | int) -> None:
        decay = ema_decay(target, int(count))
        if old[0].is_floating_point():
            torch._foreach_lerp_(old, new, 1 - decay)
        else:  # batch norm's step counters
            torch._foreach_copy_(old, new)

    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)
