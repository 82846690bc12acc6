"""The state of a training, whatever its task trains: model, optimizer, averaged weights, progress, clock."""

import contextlib
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from detection.checkpoint import keep_previous, rng_state, save_checkpoint
from detection.config import BaseConfig
from detection.core import distributed
from detection.core.errors import UserError
from detection.data.loader import BadImages
from detection.data.sampler import TrainBatchSampler
from detection.engine.ema import averaged_model
from detection.engine.nan_guard import NonFiniteGuard
from detection.engine.optimizer import build_optimizer
from detection.engine.schedule import base_lr
from detection.engine.signals import StopSignal
from detection.engine.task import Task
from detection.engine.training_progress import TrainingProgress


@dataclass(kw_only=True)
class Trainer:
    """A training in progress; `detection.engine.loop.train` runs it.

    Attributes:
        model: the network whose weights (or their average, `ema`) are evaluated and kept.
        objective: a module that computes the losses and is optimized. It holds `model` and what else is trained with
            it; a detector is its own objective.
        parallel: `objective`, wrapped in DistributedDataParallel if several processes train together.
        lr: base learning rate for the images of one optimizer step, before the schedule.
        current_lr: learning rate of the last optimizer step.
    """

    config: BaseConfig
    device: torch.device
    task: Task
    model: nn.Module
    objective: nn.Module
    sampler: TrainBatchSampler
    train_loader: DataLoader
    bad_images: BadImages | None = None
    progress: TrainingProgress = field(default_factory=TrainingProgress)

    def __post_init__(self) -> None:
        train, optim = self.config.train, self.config.optim
        self.objective = self.objective.to(self.device)
        if train.channels_last:
            self.objective = self.objective.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if train.sync_bn and distributed.world_size() > 1:
            if self.device.type != "cuda":
                raise UserError("train.sync_bn works on CUDA only; set it to false")
            self.objective = nn.SyncBatchNorm.convert_sync_batchnorm(self.objective)
        self.lr = base_lr(optim, self.sampler.batch_size * train.accumulate * distributed.world_size())
        self.ema = averaged_model(self.model, train.ema) if train.ema else None
        self.optimizer = build_optimizer(optim, self.objective, self.lr)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=train.amp == "fp16")
        # After `averaged_model`, which copies the model: compiled code cannot be copied.
        if train.compile:
            self.task.compile(self.model)
        self.parallel = distributed.parallel(self.objective, self.device)
        self.current_lr = self.lr
        self.guard = NonFiniteGuard(
            self.objective, train, optim.lr, self.task.name_images, late=self.device.type == "cuda"
        )
        self._shared_seconds = 0.0
        self._delayed_max = distributed.DelayedMax()
        self.start_clock()

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def eval_model(self) -> nn.Module:
        """The network that is evaluated and saved as best.pt: with averaged weights if there are any."""
        return self.model if self.ema is None else self.ema.module

    def start_clock(self) -> None:
        """Count the time from now on."""
        self.started = time.monotonic()

    def seconds(self) -> float:
        """Training time; of several processes that of the slowest clock at the last `sync_clock_and_stop`."""
        return self._shared_seconds if distributed.world_size() > 1 else self._own_seconds()

    def _own_seconds(self) -> float:
        return self.progress.seconds + time.monotonic() - self.started

    def sync_clock_and_stop(self, stop: StopSignal, *, wait: bool = True) -> bool:
        """Share the time and a stop request among all processes, so that all end after the same optimizer step.

        Args:
            wait: wait for all processes. Otherwise start to share, and take over what the previous call started:
                no process waits for another one or for its GPU, and a request counts one call later.

        Returns:
            Whether to stop, the same in each process.
        """
        if distributed.world_size() == 1:
            return stop.requested
        own = [self._own_seconds(), float(stop.requested)]
        if wait:
            self._delayed_max.finish()
            self._shared_seconds, requested = distributed.reduce_max(own)
            stop.requested = bool(requested)
            return stop.requested
        shared = self._delayed_max.start(own)
        if shared is None:
            return False
        self._shared_seconds, requested = shared
        return bool(requested)

    def progress_fraction(self) -> float:
        """Finished part of the training in [0, 1]: by time if the config has train.minutes, else by epochs."""
        if self.config.train.minutes is not None:
            return min(1.0, self.seconds() / (60 * self.config.train.minutes))
        done = self.progress.epoch + self.progress.batch / len(self.sampler)
        return min(1.0, done / self.config.train.epochs)

    def budget_spent(self) -> bool:
        """Whether train.minutes or train.epochs are over."""
        train = self.config.train
        return self.progress_fraction() >= 1 if train.minutes is not None else self.progress.epoch >= train.epochs

    def begin_epoch(self) -> None:
        """Let the loader continue at the current batch."""
        train, progress = self.config.train, self.progress
        # By epochs: as at the start of the epoch, also if the training resumes within it.
        done = self.progress_fraction() if train.minutes is not None else progress.epoch / train.epochs
        self.sampler.set_epoch(progress.epoch, start=progress.batch, **self.task.epoch_options(done))

    def gradient_sync(self, last: bool) -> contextlib.AbstractContextManager:
        """Context for forward and backward: processes exchange gradients only in the last batch of a step."""
        if last or not isinstance(self.parallel, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.parallel.no_sync()

    def broadcast_buffers(self) -> None:
        """Give all processes the batch-norm averages of the main one, so that they evaluate the same network."""
        distributed.broadcast_buffers(self.objective)
        if self.ema is not None:
            distributed.broadcast_buffers(self.ema.module)

    def metadata(self) -> dict[str, Any]:
        """The sections of a checkpoint that describe the training."""
        classes = self.task.classes
        return {
            "format": self.task.format,
            "config": self.config.model_dump(),
            "classes": {"names": list(classes.names), "ids": list(classes.ids)},
        }

    def save(self) -> None:
        """Write last.pt, all that a resumed training needs. Call it in every process; the main one writes."""
        self.progress.seconds = self._own_seconds()
        self.start_clock()
        rng = distributed.gather(rng_state())
        if distributed.is_main():
            content = {
                **self.metadata(),
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
