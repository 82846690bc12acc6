"""Everything that a training run consists of, built from a config, and its way to and from `last.pt`."""

import logging
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from detection.checkpoint import (
    Classes,
    load_model_state,
    read_checkpoint,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from detection.config import Config
from detection.data.dataset import build_dataset, check_same_classes
from detection.data.index import AnnotationIndex
from detection.data.loader import TrainBatches, build_loader
from detection.device import pick_device
from detection.errors import UserError
from detection.evaluation.evaluate import eval_loader
from detection.models import build_model
from detection.training.schedule import base_lr, ema_decay

log = logging.getLogger("detection")
Tensors = tuple[Tensor, ...] | list[Tensor]


@dataclass
class Progress:
    """Where a run stands."""

    epoch: int = 0
    """Epochs finished."""
    batch: int = 0
    """Batches done of the epoch under way."""
    step: int = 0
    """Optimizer steps done."""
    seconds: float = 0.0
    """Time spent, over all sittings."""
    evaluated: int = 0
    """Epochs finished at the last evaluation."""
    best: float | None = None
    """Best AP so far; None before the first that is a number."""
    best_epoch: int = 0


@dataclass
class Run:
    """A training in progress."""

    config: Config
    device: torch.device
    classes: Classes
    model: nn.Module
    ema: AveragedModel | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    batches: TrainBatches
    train_loader: DataLoader
    val_loader: DataLoader
    val_index: AnnotationIndex
    lr: float
    progress: Progress = field(default_factory=Progress)
    started: float = field(default_factory=time.monotonic)

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def eval_model(self) -> nn.Module:
        """The weights that are evaluated and kept as best: the averaged ones where there are any."""
        return self.model if self.ema is None else self.ema.module

    def seconds(self) -> float:
        return self.progress.seconds + time.monotonic() - self.started

    def share_done(self) -> float:
        """In [0, 1]; by time where the config has a time budget, else by epochs."""
        if self.config.train.minutes is not None:
            return min(1.0, self.seconds() / (60 * self.config.train.minutes))
        done = self.progress.epoch + self.progress.batch / len(self.batches)
        return min(1.0, done / self.config.train.epochs)

    def save(self) -> None:
        """Write last.pt: all that a resumed run needs."""
        now = time.monotonic()
        self.progress.seconds += now - self.started
        self.started = now
        save_checkpoint(
            self.folder / "last.pt",
            {
                **self.description(),
                "model": self.model.state_dict(),
                "ema": None if self.ema is None else self.ema.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "progress": asdict(self.progress),
                "rng": rng_state(),
            },
        )

    def save_best(self, numbers: dict[str, Any]) -> None:
        """Write best.pt: the evaluated weights and their numbers, without the optimizer."""
        content = {**self.description(), "model": self.eval_model.state_dict(), "numbers": numbers}
        save_checkpoint(self.folder / "best.pt", content)

    def description(self) -> dict[str, Any]:
        return {
            "config": self.config.model_dump(),
            "classes": {"names": list(self.classes.names), "ids": list(self.classes.ids)},
        }

    def load(self, path: Path) -> None:
        """Take up everything from a last.pt. Raises UserError where it is unreadable or of another model."""
        content = read_checkpoint(path)
        if "optimizer" not in content:
            raise UserError(f"{path} holds weights alone; a run is resumed from its last.pt")
        if tuple(content["classes"]["names"]) != self.classes.names:
            raise UserError(f"{path} was trained on other classes: {', '.join(content['classes']['names'])}")
        load_model_state(self.model, content["model"], path)
        if self.ema is not None:
            load_model_state(self.ema.module, content["ema"] or content["model"], path)
        try:
            self.optimizer.load_state_dict(content["optimizer"])
        except ValueError as error:
            raise UserError(f"{path}: the optimizer's state does not fit optim.name: {error}") from None
        if self.scaler.is_enabled() and content["scaler"]:
            self.scaler.load_state_dict(content["scaler"])
        self.progress = Progress(**content["progress"])
        if self.ema is not None:
            self.ema.n_averaged.fill_(self.progress.step)
        set_rng_state(content["rng"])


def build_run(config: Config) -> Run:
    """Build data, model and optimizer. Raises UserError for anything wrong with config or data."""
    device = pick_device(config.device)
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed)

    train_set, val_set = build_dataset(config, "train"), build_dataset(config, "val")
    log.info("train: %s", train_set.index.report())
    log.info("val:   %s", val_set.index.report())
    check_same_classes(train_set.index, val_set.index)
    classes = Classes(train_set.index.class_names, tuple(train_set.index.category_ids.tolist()))

    model = build_model(config, len(classes.names))
    _say_how_it_starts(config)
    model = model.to(device)
    if config.train.channels_last:
        model = model.to(memory_format=torch.channels_last)

    batch_size = config.data.batch_size
    lr = base_lr(config.optim, batch_size * config.train.accumulate)
    batches = TrainBatches(train_set.index.sizes, batch_size, config.seed, config.data.group_by_aspect)
    return Run(
        config=config,
        device=device,
        classes=classes,
        model=model,
        ema=_averaged(model, config.train.ema) if config.train.ema else None,
        optimizer=_optimizer(config, model, lr),
        scaler=torch.amp.GradScaler(device.type, enabled=config.train.amp == "fp16"),
        batches=batches,
        train_loader=build_loader(train_set, batches, workers=config.data.workers, device=device),
        val_loader=eval_loader(val_set, config.eval.batch_size or batch_size, config.data.workers, device),
        val_index=val_set.index,
        lr=lr,
    )


def _say_how_it_starts(config: Config) -> None:
    spec = config.model.backbone
    if spec.weights is not None:
        return
    ignored = [key for key in ("frozen_stages", "freeze_bn") if getattr(spec, key)]
    log.warning(
        "TRAINING FROM SCRATCH: the backbone has random weights%s. Detectors need far longer this way, and on "
        "few images end lower; give model.backbone.weights a file or 'timm' to start from ImageNet.",
        f" (so {' and '.join(ignored)} is ignored: nothing is frozen)" if ignored else "",
    )


def _optimizer(config: Config, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    spec = config.optim
    # Fused: one kernel for all parameters; 2.5 ms a step in place of 11 for GhostNet 0.5 on two cores.
    if spec.name == "sgd":
        return torch.optim.SGD(parameters, lr, momentum=spec.momentum, weight_decay=spec.weight_decay, fused=True)
    return torch.optim.AdamW(parameters, lr, weight_decay=spec.weight_decay, fused=True)


def _averaged(model: nn.Module, target: float) -> AveragedModel:
    """Exponential moving average of weights and buffers, with torch's own class and a decay that warms up."""

    def average(old: Tensors, new: Tensors, count: Tensor | int) -> None:
        decay = ema_decay(target, int(count))
        if old[0].is_floating_point():
            torch._foreach_lerp_(old, new, 1 - decay)
        else:  # batch norm's step counters
            torch._foreach_copy_(old, new)

    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)
