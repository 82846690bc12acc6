"""The training loop, top to bottom."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from detection.data.loader import iterate
from detection.device import autocast
from detection.errors import UserError
from detection.training.base import TrainingRun
from detection.training.monitor import Bar, Monitor
from detection.training.schedule import lr_factor
from detection.training.stop import StopSignal
from detection.training.validate import evaluate as evaluate_detector

# (run, monitor, mean training loss of the epoch, stop): scores the weights, records the numbers, keeps the best.
Evaluate = Callable[[Any, Monitor, float, StopSignal], None]


def train(run: TrainingRun, monitor: Monitor, evaluate: Evaluate = evaluate_detector) -> bool:
    """Train to the end of the budget, evaluating and saving on the way. Returns False if stopped by a signal."""
    progress = run.progress
    run.started = time.monotonic()
    loss, bar = math.nan, Bar(run.share_done())
    try:
        with StopSignal() as stop:
            while True:
                run.agree(stop)
                if _evaluation_due(run):
                    run.align()
                    evaluate(run, monitor, loss, stop)
                    progress.evaluated = progress.epoch
                    run.save()
                elif _finished(run):
                    return True
                else:
                    loss = train_epoch(run, monitor, bar, stop)
                    run.save()
                run.agree(stop)
                if stop.requested:
                    return False
    finally:
        bar.close()


def train_epoch(run: TrainingRun, monitor: Monitor, bar: Bar, stop: StopSignal) -> float:
    """Train one epoch, or the rest of one, until its end, the end of the budget or a stop; returns the mean loss."""
    config, progress = run.config, run.progress
    accumulate = config.train.accumulate
    run.batches.epoch, run.batches.start = progress.epoch, progress.batch
    run.objective.train()
    total, count, out_of_time = 0.0, 0, False
    for images, targets in iterate(run.train_loader):
        losses = train_step(run, images, targets, group=_group(run, accumulate))
        progress.batch += 1
        run.agree(stop)
        whole_group = progress.batch % accumulate == 0 or progress.batch == len(run.batches)
        if whole_group:
            optimizer_step(run)
        value = sum(losses.values())
        total, count = total + value, count + 1
        lr = run.optimizer.param_groups[0]["lr"]
        bar.show(run.share_done(), progress.epoch, value, lr)
        if count % 10 == 1:
            parts = {f"train/{name}": part for name, part in losses.items()}
            monitor.scalars({"train/loss": value, "train/lr": lr, **parts}, progress.step)
        # Not within a group: gradients gathered so far are in no checkpoint.
        out_of_time = config.train.minutes is not None and run.share_done() >= 1
        if whole_group and (stop.requested or out_of_time):
            break
    if progress.batch == len(run.batches) or out_of_time:
        progress.epoch, progress.batch = progress.epoch + 1, 0
    return total / max(1, count)


def train_step(run: TrainingRun, images: Any, targets: Any, group: int) -> dict[str, float]:
    """Forward, check, backward. Gradients of `group` batches add up to those of their mean."""
    with autocast(run.device, run.config.train.amp):
        losses = run.losses(images, targets)
    stacked = torch.stack(list(losses.values()))
    # One transfer for all parts: each would make a GPU wait.
    values = dict(zip(losses, stacked.tolist(), strict=True))
    check_finite(values, targets, run)
    run.scaler.scale(stacked.sum() / group).backward()
    return values


def optimizer_step(run: TrainingRun) -> None:
    """Set the learning rate, clip, step, average."""
    spec = run.config.optim
    lr = run.lr * lr_factor(spec, run.progress.step, run.share_done())
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    if spec.clip_grad_norm is not None:
        run.scaler.unscale_(run.optimizer)
        parameters = [p for g in run.optimizer.param_groups for p in g["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, spec.clip_grad_norm)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.progress.step += 1
    if run.ema is not None:
        run.ema.update_parameters(run.model)


def check_finite(losses: Mapping[str, float], targets: Any, run: TrainingRun) -> None:
    """Raises UserError before a NaN reaches the weights, naming the parts of the loss and the images."""
    if all(math.isfinite(value) for value in losses.values()):
        return
    parts = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
    raise UserError(
        f"the loss is not finite at epoch {run.progress.epoch + 1}, step {run.progress.step} ({parts}), on "
        f"{run.name_images(targets)}. The weights are as before this step. Lower optim.lr ({run.config.optim.lr:g}), "
        "set optim.clip_grad_norm=10, or use amp=off or bf16 in place of fp16"
    )


def _group(run: TrainingRun, accumulate: int) -> int:
    """How many batches the accumulation group of the next batch has; the last of an epoch may be smaller."""
    start = run.progress.batch // accumulate * accumulate
    return min(accumulate, len(run.batches) - start)


def _evaluation_due(run: TrainingRun) -> bool:
    progress = run.progress
    regular = progress.epoch % run.config.train.eval_every == 0
    return progress.evaluated < progress.epoch and progress.batch == 0 and (regular or _finished(run))


def _finished(run: TrainingRun) -> bool:
    if run.config.train.minutes is not None:
        return run.share_done() >= 1
    return run.progress.epoch >= run.config.train.epochs
