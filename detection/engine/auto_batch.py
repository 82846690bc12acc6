"""The largest batch that fits into a GPU (`--auto-batch`)."""

import gc
import logging
from collections.abc import Callable

import torch

from detection.config import DetectionConfig
from detection.core.device import autocast, pick_device
from detection.core.errors import UserError
from detection.data.load_split import read_split
from detection.models.build import build_model

log = logging.getLogger("detection")


def with_largest_batch(config: DetectionConfig, share: float = 0.85) -> DetectionConfig:
    """`config` with the largest `data.batch_size` whose training step takes at most `share` of the free GPU memory.

    The learning rate follows by `optim.lr_reference_batch`, as always.

    Raises:
        UserError: not on CUDA, annotations that cannot be read, or not even one image fits.
    """
    device = pick_device(config.device)
    if device.type != "cuda":
        raise UserError(f"--auto-batch measures GPU memory, and the device is {device}; set data.batch_size by hand")
    num_classes = len(read_split(config.data, "train").class_names)
    model = build_model(config, num_classes).to(device).train()
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    sides = max(config.data.multi_scale, default=config.data.short_side), config.data.long_side

    def fits(batch: int) -> bool:
        torch.cuda.reset_peak_memory_stats(device)
        box = torch.tensor([[8.0, 8.0, 64.0, 64.0]], device=device)
        targets = [{"boxes": box.repeat(20, 1), "labels": torch.ones(20, dtype=torch.int64, device=device)}] * batch
        try:
            images = [torch.zeros(3, *sides, dtype=torch.uint8, device=device) for _ in range(batch)]
            with autocast(device, config.train.amp):
                losses = model(images, targets)
            sum(losses.values()).backward()
        except torch.OutOfMemoryError:
            return False
        finally:
            model.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()
        return torch.cuda.max_memory_reserved(device) <= share * free

    batch = largest_fitting(fits, most=1024)
    if batch == 0:
        raise UserError("--auto-batch: not even one image fits; lower data.short_side or use train.amp=bf16")
    log.info("--auto-batch: %d images fit (%.0f %% of %.1f GiB)", batch, 100 * share, free / 2**30)
    return config.with_overrides([f"data.batch_size={batch}"])


def largest_fitting(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to `most` that fits; 0 if none does. All numbers below one that fits must fit, too."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, high * 2
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
