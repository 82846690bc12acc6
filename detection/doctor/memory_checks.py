"""Predict the memory of a training step without running it, and compare it with the free memory of the device."""

import math

from detection.config import DetectionConfig
from detection.core.errors import UserError
from detection.core.memory import available_memory
from detection.doctor.findings import Finding, make_finding

DIVISOR = 32


def predict_training_memory(config: DetectionConfig, num_classes: int) -> dict[str, float]:
    """Bytes of a training step on `data.batch_size` images of full size, without those of the process and CUDA.

    Keys: weights (weights, gradients, optimizer state and EMA weights), images (activations kept for the backward pass)
    and total. `images` is for float32; mixed precision takes about half of it.
    """
    # PyTorch takes seconds to import; the checks of datasets without a config do not need it.
    import torch

    from detection.benchmark.detector_cost import detector_costs
    from detection.models.build import build_model

    config = config.model_copy(deep=True)
    config.model.backbone.weights = None
    with torch.device("meta"):
        model = build_model(config, num_classes)
    short = max(config.data.multi_scale, default=config.data.short_side)
    long = round(config.data.long_side * short / config.data.short_side)
    padded = [-(-side // DIVISOR) * DIVISOR for side in (short, long)]
    total = next(row for row in detector_costs("", model, (padded[0], padded[1])) if row.part == "total")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    states = {"sgd": 1, "adamw": 2}[config.optim.name]
    weights = 4 * (total.parameters * (2 if config.train.ema else 1) + trainable * (1 + states))
    losses = 0
    if config.model.detector == "retinanet":
        positions = sum(math.prod(-(-side // (8 << level)) for side in padded) for level in range(5))
        # The focal loss keeps about five tensors of the size of the logits at a time.
        losses = 5 * 4 * 9 * positions * num_classes
    images = config.data.batch_size * (total.memory * (0.55 if config.train.amp != "off" else 1) + losses)
    return {"weights": weights, "images": images, "total": weights + images}


def check_memory(predicted: float, free: float | None, split: str) -> list[Finding]:
    """A finding if the predicted bytes exceed 90 % of the free ones; none if `free` is unknown (None)."""
    if free is None or predicted <= 0.9 * free:
        return []
    return [make_finding("memory-high", split, math.ceil(predicted / 1e9), detail=f"{free / 1e9:.1f} GB are free")]


def free_memory(device: str) -> float | None:
    """Bytes that are free for training on `device` now; None if unknown."""
    import torch  # see above

    from detection.core.device import pick_device

    try:
        picked = pick_device(device)
    except UserError:
        return None  # the training may be planned for another machine
    if picked.type == "cuda":
        return float(torch.cuda.mem_get_info(picked)[0])
    return available_memory()
