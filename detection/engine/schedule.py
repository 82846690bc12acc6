"""Learning-rate schedules as pure functions of the training progress, so that a checkpoint needs no state of them."""

import math

from detection.config import OptimConfig


def base_lr(config: OptimConfig, images_per_step: int) -> float:
    """`lr`, scaled linearly from `lr_reference_batch` images per step to `images_per_step` (arXiv 1706.02677)."""
    if config.lr_reference_batch is None:
        return config.lr
    return config.lr * images_per_step / config.lr_reference_batch


def lr_factor(config: OptimConfig, step: int, progress: float) -> float:
    """Factor of the base learning rate.

    Args:
        step: optimizer steps done.
        progress: finished part of the training, in [0, 1], by epochs or by time.
    """
    if config.schedule == "onecycle":
        return _one_cycle(min(1.0, progress))
    if config.schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    else:
        factor = 0.1 ** sum(progress >= milestone for milestone in config.milestones)
    if step < config.warmup_steps:
        done = step / config.warmup_steps
        factor *= config.warmup_factor + (1 - config.warmup_factor) * done
    return factor


def _one_cycle(progress: float, rise: float = 0.3, start: float = 1 / 25, end: float = 1e-4) -> float:
    """Up, then down, both along a cosine (arXiv 1708.07120), with the defaults of torch's OneCycleLR."""
    if progress < rise:
        low, share = start, progress / rise
        return low + (1 - low) * 0.5 * (1 - math.cos(math.pi * share))
    low, share = start * end, (progress - rise) / (1 - rise)
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * share))
