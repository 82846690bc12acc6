"""The training loop, top to bottom."""

import logging
import math
import signal
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from detection.data.loader import iterate
from detection.device import autocast
from detection.errors import UserError
from detection.evaluation.coco import evaluate_results, write_results
from detection.evaluation.evaluate import detect_dataset
from detection.training.monitor import Bar, Monitor
from detection.training.schedule import lr_factor
from detection.training.state import Run

log = logging.getLogger("detection")


class StopSignal:
    """Ctrl-C and SIGTERM end the training after the step under way; elsewhere, or again, they act at once."""

    def __init__(self) -> None:
        self.requested = self.in_step = False

    def __enter__(self) -> "StopSignal":
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.requested or not self.in_step:
            raise KeyboardInterrupt
        self.requested = True


def train(run: Run, monitor: Monitor) -> bool:
    """Train to the end of the budget, evaluating and saving on the way. Returns False if stopped by a signal."""
    config, progress = run.config, run.progress
    run.started = time.monotonic()
    with StopSignal() as stop:
        loss, bar = math.nan, Bar(run.share_done())
        while not _finished(run) or progress.evaluated < progress.epoch:
            if progress.evaluated == progress.epoch:
                loss = train_epoch(run, monitor, bar, stop)
                run.save()
                if stop.requested:
                    return False
            due = progress.epoch % config.train.eval_every == 0 or _finished(run)
            if due:
                evaluate(run, monitor, loss)
            progress.evaluated = progress.epoch
            run.save()
    return True


def train_epoch(run: Run, monitor: Monitor, bar: Bar, stop: StopSignal) -> float:
    """Train one epoch, or the rest of one, until its end, the end of the budget or a stop; returns the mean loss."""
    config, progress = run.config, run.progress
    accumulate = config.train.accumulate
    run.batches.epoch, run.batches.start = progress.epoch, progress.batch
    run.model.train()
    total, count = 0.0, 0
    try:
        for images, targets in iterate(run.train_loader):
            stop.in_step = True
            losses = train_step(run, images, targets, group=_group(run, accumulate))
            progress.batch += 1
            if progress.batch % accumulate == 0 or progress.batch == len(run.batches):
                optimizer_step(run)
            value = sum(losses.values())
            total, count = total + value, count + 1
            lr = run.optimizer.param_groups[0]["lr"]
            bar.show(run.share_done(), progress.epoch, value, lr)
            if count % 10 == 1:
                parts = {f"train/{name}": part for name, part in losses.items()}
                monitor.scalars({"train/loss": value, "train/lr": lr, **parts}, progress.step)
            stop.in_step = False
            if stop.requested or (config.train.minutes is not None and run.share_done() >= 1):
                break
    finally:
        stop.in_step = False
    if progress.batch == len(run.batches) or not stop.requested:
        progress.epoch, progress.batch = progress.epoch + 1, 0
    return total / max(1, count)


def train_step(run: Run, images: list[Tensor], targets: list[dict[str, Any]], group: int) -> dict[str, float]:
    """Forward, check, backward. Gradients of `group` batches add up to those of their mean."""
    device = run.device
    images = [image.to(device, non_blocking=True) for image in images]
    on_device = [{k: t[k].to(device, non_blocking=True) for k in ("boxes", "labels")} for t in targets]
    with autocast(device, run.config.train.amp):
        losses = run.model(images, on_device)
    stacked = torch.stack(list(losses.values()))
    # One transfer for all parts: each would make a GPU wait.
    values = dict(zip(losses, stacked.tolist(), strict=True))
    check_finite(values, targets, run)
    run.scaler.scale(stacked.sum() / group).backward()
    return values


def optimizer_step(run: Run) -> None:
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


def check_finite(losses: Mapping[str, float], targets: list[dict[str, Any]], run: Run) -> None:
    """Raises UserError before a NaN reaches the weights, naming the parts of the loss and the images."""
    if all(math.isfinite(value) for value in losses.values()):
        return
    parts = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
    images = ", ".join(str(target["image_id"]) for target in targets)
    raise UserError(
        f"the loss is not finite at epoch {run.progress.epoch + 1}, step {run.progress.step} ({parts}), on images with "
        f"ids {images}. The weights are as before this step. Lower optim.lr ({run.config.optim.lr:g}), set "
        "optim.clip_grad_norm=10, use amp=off or bf16 in place of fp16, or look at these images' boxes"
    )


def evaluate(run: Run, monitor: Monitor, loss: float) -> None:
    """Score the evaluated weights on val; write metrics, predictions and, when it is the best so far, best.pt."""
    config, progress = run.config, run.progress
    start = time.monotonic()
    results = detect_dataset(run.eval_model, run.val_loader, run.classes.ids, run.device, amp=config.train.amp)
    evaluation = evaluate_results(run.val_index, results)
    write_results(run.folder / "predictions.json", results)
    numbers = evaluation.to_json()
    ap = evaluation.numbers["AP"]
    # NaN, of a set without ground truth, compares false and so never becomes the best.
    better = ap > (-1.0 if progress.best is None else progress.best)
    if better:
        progress.best, progress.best_epoch = ap, progress.epoch
        run.save_best(numbers)
    elif math.isnan(ap):
        log.warning("val has no ground truth: AP is undefined; the latest weights are kept as best.pt")
        run.save_best(numbers)
    per_class = numbers.pop("per_class")
    record = {"epoch": progress.epoch, "step": progress.step, **numbers}
    record |= {"loss": None if math.isnan(loss) else loss, "seconds": run.seconds(), "per_class": per_class}
    monitor.evaluation(record)
    log.info(
        "epoch %d  loss %.3f  AP %.3f  AP50 %.3f  AP75 %.3f%s  (%.0f s training, %.1f s evaluation)",
        progress.epoch, loss, ap, evaluation.numbers["AP50"], evaluation.numbers["AP75"],
        "  best so far" if better else "", run.seconds(), time.monotonic() - start,
    )  # fmt: skip
    if ap == 0 and run.share_done() > 0.3:
        log.warning(
            "AP is still 0: are images and boxes of one piece? Look at them with their boxes, and see that "
            "ground truth scored as its own detections gives AP 1.0"
        )


def _group(run: Run, accumulate: int) -> int:
    """How many batches the accumulation group of the next batch has; the last of an epoch may be smaller."""
    start = run.progress.batch // accumulate * accumulate
    return min(accumulate, len(run.batches) - start)


def _finished(run: Run) -> bool:
    if run.config.train.minutes is not None:
        return run.share_done() >= 1
    return run.progress.epoch >= run.config.train.epochs
