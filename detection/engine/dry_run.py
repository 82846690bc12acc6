"""The dry run: two training steps and one batch of the evaluation, with memory and expected time."""

import time
from collections.abc import Callable
from typing import Any

from detection.config import BaseConfig
from detection.core.memory import memory_advice, peak_memory
from detection.data.loader import iterate
from detection.engine.loop import optimizer_step, train_step
from detection.engine.run_logger import start_logging
from detection.engine.session import describe, duration
from detection.engine.trainer import Trainer


def dry_run(config: BaseConfig, build_trainer: Callable[[Any], Trainer]) -> str:
    """Build everything, run one batch of training and one of evaluation; write nothing. Returns a report.

    Raises:
        UserError: as `detection.engine.session.run_session`.
    """
    start_logging()
    with memory_advice(config):
        trainer = build_trainer(config)
        task = trainer.task
        trainer.objective.train()
        images, targets = next(iterate(trainer.train_loader))
        # The first step prepares kernels; the second one shows what a step costs.
        (_, first_seconds), (losses, seconds) = (_timed_step(trainer, images, targets) for _ in range(2))
        trainer.model.eval()
        val_images, _ = next(iterate(task.val_loader))
        start = time.perf_counter()
        found = task.try_prediction(trainer.model, val_images)
        val_seconds = time.perf_counter() - start
    return "\n".join(
        [
            describe(trainer),
            f"train batch    {task.describe_batch(images, targets)}; {seconds:.2f} s a step (the first "
            f"{first_seconds:.2f} s)",
            "losses         " + ", ".join(f"{name} {value:.3f}" for name, value in losses.items()),
            f"val batch      {task.describe_batch(val_images)}, {val_seconds:.2f} s{', ' if found else ''}{found}",
            f"peak memory    {peak_memory(trainer.device)}",
            f"expected time  {_expected_time(trainer, seconds, val_seconds)}",
            "dry run: nothing was written",
        ]
    )


def _timed_step(trainer: Trainer, images: Any, targets: Any) -> tuple[dict[str, float], float]:
    """Losses and seconds of an optimizer step on one batch."""
    start = time.perf_counter()
    losses = train_step(trainer, images, targets, group=1)
    optimizer_step(trainer)
    return losses, time.perf_counter() - start


def _expected_time(trainer: Trainer, step_seconds: float, val_batch_seconds: float) -> str:
    """Of the whole training."""
    train = trainer.config.train
    if train.minutes is not None:
        return f"{train.minutes:g} min by train.minutes, about {int(60 * train.minutes / step_seconds)} steps"
    steps = len(trainer.sampler) * train.epochs
    evaluations = train.epochs // train.eval_every * trainer.task.val_batches() * val_batch_seconds
    return f"{duration(steps * step_seconds + evaluations)} ({steps} steps and the evaluations)"
