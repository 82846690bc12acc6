"""What every training run consists of, whatever is trained, and its way to and from `last.pt`."""

import contextlib
import logging
import math
import os
import random
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from detection.checkpoint import (
    FORMAT,
    Classes,
    classes_of,
    keep_previous,
    load_model_state,
    read_checkpoint,
    rng_state,
    save_checkpoint,
    section,
)
from detection.config import BaseConfig, check
from detection.config_check import migrate
from detection.core import distributed
from detection.core.errors import UserError
from detection.data.loader import BadImages
from detection.data.sampler import TrainBatchSampler
from detection.engine.nan_guard import NonFiniteGuard
from detection.engine.optimizer import build_optimizer
from detection.engine.restore import load_counters, load_optimizer, load_rng, section_errors
from detection.engine.resume import compare_configs
from detection.engine.run_logger import Monitor
from detection.engine.schedule import base_lr, ema_decay
from detection.engine.signals import StopSignal

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
    scored: int = 0
    """Epochs finished at the last evaluation whose score is known; less than `evaluated` while one is worked out."""
    best: float | None = None
    """Best score (AP, top-1) so far; None before the first that is a number."""
    best_epoch: int = 0
    loss_sum: float = 0.0
    """Of the batches done of the epoch under way or, between epochs, of the last one; and how many they are."""
    loss_count: int = 0

    @property
    def loss(self) -> float:
        """Mean training loss of that epoch; NaN before the first batch."""
        return self.loss_sum / self.loss_count if self.loss_count else math.nan


@dataclass(kw_only=True)
class TrainingRun:
    """A training in progress.

    Attributes:
        model: what is trained for; its weights (or their running average, `ema`) are evaluated and kept.
        objective: called on a batch in training, gives a dict of losses. It holds `model`, and whatever else is
            trained along with it; a detector is its own objective.
        parallel: the objective as it is called: wrapped, where several processes train together.
        lr: base learning rate for the images of one step, before the schedule.
    """

    config: BaseConfig
    device: torch.device
    classes: Classes
    model: nn.Module
    objective: nn.Module
    batches: TrainBatchSampler
    train_loader: DataLoader
    val_loader: DataLoader
    progress: Progress = field(default_factory=Progress)
    bad_images: BadImages | None = None
    started: float = field(default_factory=time.monotonic)

    format = FORMAT
    """Marks the checkpoints."""

    def __post_init__(self) -> None:
        train, optim = self.config.train, self.config.optim
        self.objective = self.objective.to(self.device)
        if train.channels_last:
            self.objective = self.objective.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if train.sync_bn and distributed.world_size() > 1:
            if self.device.type != "cuda":
                raise UserError("train.sync_bn works on CUDA only; set it to false")
            self.objective = nn.SyncBatchNorm.convert_sync_batchnorm(self.objective)
        self.lr = base_lr(optim, self.batches.batch_size * train.accumulate * distributed.world_size())
        self.ema = _averaged(self.model, train.ema) if train.ema else None
        self.optimizer = build_optimizer(optim, self.objective, self.lr)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=train.amp == "fp16")
        # After the copy for the average was made: compiled code is not to be copied.
        if train.compile:
            self.compile()
        self.parallel = distributed.parallel(self.objective, self.device)
        self.current_lr = self.lr
        self.watch = NonFiniteGuard(self)
        self._agreed_seconds = 0.0

    def losses(self, images: Any, targets: Any) -> dict[str, Tensor]:
        """The parts of the loss, scalars, of one batch as the loader gives it."""
        raise NotImplementedError

    def compile(self) -> None:
        """Compile what is worth it, in place (train.compile)."""
        self.model.compile()

    def begin_epoch(self) -> None:
        """Let the loader go on where the run stands."""
        self.batches.epoch, self.batches.start = self.progress.epoch, self.progress.batch

    def gradients(self, last: bool) -> contextlib.AbstractContextManager:
        """Around forward and backward of a batch: gradients are exchanged after the last one of a step alone."""
        if last or not isinstance(self.parallel, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.parallel.no_sync()

    def show(self, monitor: Monitor, images: Any, targets: Any) -> None:
        """Leave an image of the first batch of an epoch; nothing here."""

    def name_images(self, targets: Any) -> str:
        """The images of a batch, for a message, and what to look for in them."""
        raise NotImplementedError

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def eval_model(self) -> nn.Module:
        """The weights that are evaluated and kept as best: the averaged ones where there are any."""
        return self.model if self.ema is None else self.ema.module

    def seconds(self) -> float:
        """Time spent; among several processes the time of the slowest clock at the last `agree`."""
        if distributed.world_size() > 1:
            return self._agreed_seconds
        return self._own_seconds()

    def _own_seconds(self) -> float:
        return self.progress.seconds + time.monotonic() - self.started

    def agree(self, stop: StopSignal) -> None:
        """Let all processes see the same time and the same stop request, so that they end in the same step."""
        if distributed.world_size() > 1:
            self._agreed_seconds, requested = distributed.reduce_max([self._own_seconds(), float(stop.requested)])
            stop.requested = bool(requested)

    def align(self) -> None:
        """Let all processes have the same batch-norm averages, so that they evaluate one network."""
        distributed.broadcast_buffers(self.objective)
        if self.ema is not None:
            distributed.broadcast_buffers(self.ema.module)

    def share_done(self) -> float:
        """In [0, 1]; by time where the config has a time budget, else by epochs."""
        if self.config.train.minutes is not None:
            return min(1.0, self.seconds() / (60 * self.config.train.minutes))
        done = self.progress.epoch + self.progress.batch / len(self.batches)
        return min(1.0, done / self.config.train.epochs)

    def save(self) -> None:
        """Write last.pt: all that a resumed run needs. To be called in every process; the main one writes."""
        now = time.monotonic()
        self.progress.seconds += now - self.started
        self.started = now
        rng = distributed.gather(rng_state())
        if distributed.is_main():
            content = {
                **self.description(),
                "model": self.objective.state_dict(),
                "ema": None if self.ema is None else self.ema.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "progress": asdict(self.progress),
                "rng": rng,
                "processes": distributed.world_size(),
            }
            keep_previous(self.folder / "last.pt")
            save_checkpoint(self.folder / "last.pt", content)

    def save_best(self, numbers: Mapping[str, Any]) -> None:
        """Write best.pt: the evaluated weights and their numbers, without the optimizer."""
        content = {**self.description(), "model": self.eval_model.state_dict(), "numbers": dict(numbers)}
        save_checkpoint(self.folder / "best.pt", content)

    def keep_if_best(self, score: float, numbers: Mapping[str, Any]) -> bool:
        """Note the score of an evaluation and write best.pt if it is the best so far; returns whether it is."""
        better = self.is_best(score, self.progress.epoch)
        if better:
            self.save_best(numbers)
        return better

    def is_best(self, score: float, epoch: int) -> bool:
        """Note the score of the evaluation after an epoch; returns whether it is the best so far."""
        # NaN, of a set without ground truth, compares false and so never becomes the best.
        better = score > (-1.0 if self.progress.best is None else self.progress.best)
        if better:
            self.progress.best, self.progress.best_epoch = score, epoch
        self.progress.scored = epoch
        return better

    def share_score(self) -> None:
        """The main process alone scores; the others take over what it knows."""
        progress = self.progress
        progress.best, progress.best_epoch, progress.scored = distributed.gather(
            (progress.best, progress.best_epoch, progress.scored)
        )[0]

    def settle(self, monitor: Monitor) -> None:
        """At the end: wait for an evaluation that is still scored in the background, and take it in."""
        if self.progress.scored < self.progress.evaluated:
            if distributed.is_main():
                self.take_score(monitor)
            self.share_score()
            self.save()

    def take_score(self, monitor: Monitor) -> None:
        """Wait for the score of the last evaluation and write what it means; only runs that evaluate in the
        background have one to wait for."""

    def description(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "config": self.config.model_dump(),
            "classes": {"names": list(self.classes.names), "ids": list(self.classes.ids)},
        }

    def load(self, path: Path) -> None:
        """Take up everything from a last.pt.

        Raises:
            UserError: it is unreadable, incomplete, or of another model or other data.
        """
        content = read_checkpoint(path, self.format)
        if "optimizer" not in content:
            raise UserError(f"{path} holds weights alone; a run is resumed from its last.pt")
        values = section(content, "progress", path)
        # Files of version 0.1 know of no scores that come later.
        progress = load_counters(Progress, {"scored": values.get("evaluated", 0)} | values, path)
        self._compare(content, path, progress.batch > 0)
        if progress.batch > 0 and progress.batch >= len(self.batches):
            raise UserError(
                f"{path} was written after batch {progress.batch} of an epoch, and an epoch has {len(self.batches)} "
                "now: the data have changed; train from the start, without --resume"
            )
        classes = classes_of(content, path)
        if classes.names != self.classes.names:
            raise UserError(f"{path} was trained on other classes: {', '.join(classes.names)}")
        load_model_state(self.objective, section(content, "model", path), path)
        if self.ema is not None:
            # A run that had no average so far starts it from its weights.
            average = section(content, "ema", path) or self.model.state_dict()
            load_model_state(self.ema.module, average, path)
        load_optimizer(self.optimizer, content["optimizer"], path)
        scaler = section(content, "scaler", path)
        if self.scaler.is_enabled() and scaler:
            with section_errors(path, "scaler"):
                self.scaler.load_state_dict(scaler)
        self.progress = progress
        if self.ema is not None:
            self.ema.n_averaged.fill_(self.progress.step)
        load_rng(section(content, "rng", path), distributed.rank(), path)

    def _compare(self, content: Mapping[str, Any], path: Path, in_epoch: bool) -> None:
        """Say which keys of the config have changed. Raises UserError for one that cannot."""
        before = check(type(self.config), migrate(section(content, "config", path)), f"config in {path}")
        old, new = before.model_dump(), self.config.model_dump()
        # What counts is how many images all processes together take at a time.
        old["data"]["batch_size"] *= content.get("processes", 1)
        new["data"]["batch_size"] *= distributed.world_size()
        for message in compare_configs(old, new, in_epoch):
            log.info("changed since the run was stopped: %s", message)


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """The same in every process, so that all build the same network; see `part_ways`.

    deterministic: only algorithms that give the same bits each time; where CUDA has none, a warning says so.
    """
    if deterministic:
        # cuBLAS reads it when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def part_ways(seed: int) -> None:
    """Give every process but the main one random numbers of its own, for dropout and mixing, once all is built."""
    if not distributed.is_main():
        seed_everything(seed + 1_000_003 * distributed.rank())


def _averaged(model: nn.Module, target: float) -> AveragedModel:
    """Exponential moving average of weights and buffers, with torch's own class and a decay that warms up."""

    def average(old: Tensors, new: Tensors, count: Tensor | int) -> None:
        decay = ema_decay(target, int(count))
        if old[0].is_floating_point():
            torch._foreach_lerp_(old, new, 1 - decay)
        else:  # batch norm's step counters
            torch._foreach_copy_(old, new)

    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)
