"""The training loop."""

from typing import Any

import torch

from detection.core import distributed
from detection.core.device import autocast
from detection.data.loader import iterate
from detection.engine.evaluations import Evaluations
from detection.engine.run_logger import RunLogger
from detection.engine.schedule import lr_factor
from detection.engine.signals import StopSignal
from detection.engine.trainer import Trainer


def train(trainer: Trainer, logger: RunLogger) -> bool:
    """Train to the end of the budget; evaluate and save on the way. Returns False if a signal stopped the training."""
    evaluations = Evaluations(trainer, logger)
    trainer.start_clock()
    with logger.training_bar(trainer.progress_fraction()), StopSignal() as stop:
        while not trainer.sync_clock_and_stop(stop):
            if evaluations.due():
                evaluations.evaluate(stop)
                trainer.save()
            elif evaluations.training_over():
                evaluations.finish()
                return True
            else:
                train_epoch(trainer, logger, stop)
                trainer.save()
    return False


def train_epoch(trainer: Trainer, logger: RunLogger, stop: StopSignal) -> None:
    """Train one epoch, or the rest of one, until its end, the end of train.minutes or a stop request."""
    config, progress, sampler = trainer.config.train, trainer.progress, trainer.sampler
    trainer.begin_epoch()
    trainer.objective.train()
    if progress.batch == 0:
        progress.loss_sum, progress.loss_count = 0.0, 0
    out_of_time = False
    for images, targets in iterate(trainer.train_loader, trainer.bad_images):
        if progress.batch == sampler.start and distributed.is_main():
            logger.image("train_batch", trainer.task.draw_batch(images, targets), progress.step)
        # The last step of an epoch may have fewer batches.
        first_of_step = progress.batch // config.accumulate * config.accumulate
        losses = train_step(trainer, images, targets, group=min(config.accumulate, len(sampler) - first_of_step))
        progress.batch += 1
        step_done = progress.batch % config.accumulate == 0 or progress.batch == len(sampler)
        if step_done:
            optimizer_step(trainer)
        progress.add_losses(losses)
        logger.losses(losses, progress, trainer.progress_fraction(), trainer.current_lr)
        # Not within a step: accumulated gradients are in no checkpoint.
        if step_done:
            stop_now = trainer.sync_clock_and_stop(stop, wait=False)
            out_of_time = config.minutes is not None and trainer.budget_spent()
            if stop_now or out_of_time:
                break
    progress.add_losses(trainer.guard.flush())
    if progress.batch == len(sampler) or out_of_time:
        progress.epoch, progress.batch = progress.epoch + 1, 0
        total, count = distributed.reduce_sum([progress.loss_sum, progress.loss_count])
        progress.loss_sum, progress.loss_count = total, round(count)


def train_step(trainer: Trainer, images: Any, targets: Any, group: int) -> dict[str, float]:
    """Forward, check, backward of one batch. The gradients of `group` batches add up to those of their mean loss.

    Returns:
        The parts of the loss; on a GPU those of the previous batch ({} for the first), see `NonFiniteGuard`.
    """
    progress, guard = trainer.progress, trainer.guard
    number = progress.batch % trainer.config.train.accumulate
    last = number == group - 1
    if number == 0:
        guard.begin_step()
    with trainer.gradient_sync(last):
        with autocast(trainer.device, trainer.config.train.amp):
            losses = trainer.task.losses(trainer.parallel, images, targets)
        stacked = torch.stack(list(losses.values()))
        where = f"epoch {progress.epoch + 1}, step {progress.step}"
        values = guard.check(losses, stacked, targets, where, last=last)
        if not guard.skip_step:
            trainer.scaler.scale(stacked.sum() / group).backward()
    return values


def optimizer_step(trainer: Trainer) -> None:
    """Set the learning rate, clip gradients, update the weights and their average."""
    spec, optimizer, scaler = trainer.config.optim, trainer.optimizer, trainer.scaler
    if trainer.guard.skip_step:
        trainer.guard.discard_step(optimizer)
        return
    trainer.current_lr = trainer.lr * lr_factor(spec, trainer.progress.step, trainer.progress_fraction())
    for group in optimizer.param_groups:
        group["lr"] = trainer.current_lr * group.get("lr_scale", 1.0)
    if spec.clip_grad_norm is not None:
        scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, spec.clip_grad_norm)
    trainer.guard.mask_update(optimizer, scaler)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    trainer.progress.step += 1
    if trainer.ema is not None:
        trainer.ema.update_parameters(trainer.model)
