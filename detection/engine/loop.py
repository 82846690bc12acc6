"""The training loop, top to bottom."""

import time
from collections.abc import Callable
from typing import Any

import torch

from detection.core import distributed
from detection.core.device import autocast
from detection.data.loader import iterate
from detection.engine.evaluations import evaluate as evaluate_detector
from detection.engine.run_logger import Bar, Monitor
from detection.engine.schedule import lr_factor
from detection.engine.signals import StopSignal
from detection.engine.trainer import TrainingRun

# (run, monitor, mean training loss of the epoch, stop): scores the weights, records the numbers, keeps the best.
Evaluate = Callable[[Any, Monitor, float, StopSignal], None]


def train(run: TrainingRun, monitor: Monitor, evaluate: Evaluate = evaluate_detector) -> bool:
    """Train to the end of the budget, evaluating and saving on the way. Returns False if stopped by a signal."""
    progress = run.progress
    run.started = time.monotonic()
    bar = Bar(run.share_done())
    try:
        with StopSignal() as stop:
            while True:
                run.agree(stop)
                if _evaluation_due(run):
                    run.align()
                    evaluate(run, monitor, progress.loss, stop)
                    progress.evaluated = progress.epoch
                    run.share_score()
                    run.save()
                elif _finished(run):
                    run.settle(monitor)
                    return True
                else:
                    train_epoch(run, monitor, bar, stop)
                    run.save()
                run.agree(stop)
                if stop.requested:
                    return False
    finally:
        bar.close()


def train_epoch(run: TrainingRun, monitor: Monitor, bar: Bar, stop: StopSignal) -> None:
    """Train one epoch, or the rest of one, until its end, the end of the budget or a stop."""
    config, progress = run.config, run.progress
    accumulate = config.train.accumulate
    run.begin_epoch()
    run.objective.train()
    out_of_time = False
    if progress.batch == 0:
        progress.loss_sum, progress.loss_count = 0.0, 0
    for images, targets in iterate(run.train_loader, run.bad_images):
        if progress.batch == run.batches.start:
            run.show(monitor, images, targets)
        losses = train_step(run, images, targets, group=_group(run, accumulate))
        progress.batch += 1
        run.agree(stop)
        whole_group = progress.batch % accumulate == 0 or progress.batch == len(run.batches)
        if whole_group:
            optimizer_step(run)
        if losses:
            value = sum(losses.values())
            progress.loss_sum, progress.loss_count = progress.loss_sum + value, progress.loss_count + 1
            bar.show(run.share_done(), progress.epoch, value, run.current_lr)
            if progress.loss_count % 10 == 1:
                parts = {f"train/{name}": part for name, part in losses.items()}
                monitor.scalars({"train/loss": value, "train/lr": run.current_lr, **parts}, progress.step)
        # Not within a group: gradients gathered so far are in no checkpoint.
        out_of_time = config.train.minutes is not None and run.share_done() >= 1
        if whole_group and (stop.requested or out_of_time):
            break
    if rest := run.watch.flush():
        progress.loss_sum, progress.loss_count = progress.loss_sum + sum(rest.values()), progress.loss_count + 1
    if progress.batch == len(run.batches) or out_of_time:
        progress.epoch, progress.batch = progress.epoch + 1, 0
        total, count = distributed.reduce_sum([progress.loss_sum, progress.loss_count])
        progress.loss_sum, progress.loss_count = total, round(count)


def train_step(run: TrainingRun, images: Any, targets: Any, group: int) -> dict[str, float]:
    """Forward, check, backward. Gradients of `group` batches add up to those of their mean.

    Returns:
        The parts of the loss; on a GPU those of the batch before ({} for the first), see `NonFiniteGuard`.
    """
    done = run.progress.batch % run.config.train.accumulate
    if done == 0:
        run.watch.begin_step()
    # Processes exchange gradients once a step, not once a batch.
    with run.gradients(last=done == group - 1):
        with autocast(run.device, run.config.train.amp):
            losses = run.losses(images, targets)
        stacked = torch.stack(list(losses.values()))
        values = run.watch.look(losses, stacked, targets)
        if not run.watch.spoiled:
            run.scaler.scale(stacked.sum() / group).backward()
    return values


def optimizer_step(run: TrainingRun) -> None:
    """Set the learning rate, clip, step, average."""
    spec = run.config.optim
    if run.watch.spoiled:
        run.watch.leave_out()
        return
    run.current_lr = run.lr * lr_factor(spec, run.progress.step, run.share_done())
    for group in run.optimizer.param_groups:
        group["lr"] = run.current_lr * group.get("lr_scale", 1.0)
    if spec.clip_grad_norm is not None:
        run.scaler.unscale_(run.optimizer)
        parameters = [p for g in run.optimizer.param_groups for p in g["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, spec.clip_grad_norm)
    run.watch.guard(run.optimizer)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.progress.step += 1
    if run.ema is not None:
        run.ema.update_parameters(run.model)


def _group(run: TrainingRun, accumulate: int) -> int:
    """How many batches the accumulation group of the next batch has; the last of an epoch may be smaller."""
    start = run.progress.batch // accumulate * accumulate
    return min(accumulate, len(run.batches) - start)


def _evaluation_due(run: TrainingRun) -> bool:
    progress = run.progress
    regular = progress.epoch % run.config.train.eval_every == 0
    return progress.evaluated < progress.epoch and progress.batch == 0 and (regular or _finished(run))


def _finished(run: TrainingRun) -> bool:
    train, progress = run.config.train, run.progress
    if train.patience is not None and progress.scored - progress.best_epoch >= train.patience * train.eval_every:
        return True
    if train.minutes is not None:
        return run.share_done() >= 1
    return progress.epoch >= train.epochs
