"""What surrounds any training: its folder, its log, resuming, stopping; and how a dry run measures."""

import contextlib
import logging
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from detection.config import BaseConfig
from detection.config_io import save_config
from detection.core import distributed
from detection.core.environment import note_environment
from detection.core.errors import UserError
from detection.core.files import remove_unfinished
from detection.core.memory import memory_advice, peak_memory
from detection.data.loader import iterate
from detection.engine.loop import Evaluate, optimizer_step, train, train_step
from detection.engine.run_folder import check_output_dir, locked, move_aside
from detection.engine.run_logger import Monitor, start_logging
from detection.engine.signals import lasting_console
from detection.engine.trainer import TrainingRun

log = logging.getLogger("detection")


def launch(
    config: BaseConfig,
    *,
    build: Callable[[Any, torch.device], TrainingRun],
    evaluate: Evaluate,
    describe: Callable[[Any], str],
    summarize: Callable[[Any], str],
    resume: bool,
    on_finished: Callable[[Path], None] | None = None,
) -> bool:
    """Train in `config.output_dir`. Returns False where a signal stopped it (resume goes on).

    An earlier run in the same folder is moved aside, never overwritten, and no other training can start there
    meanwhile (`detection.engine.run_folder`). Under torchrun this runs in every process.

    Args:
        build: (config, device) -> run.
        evaluate: see `detection.engine.loop.train`.
        describe, summarize: what to log of the run before and after.
        on_finished: called with the folder of a finished run, in the main process alone.

    Raises:
        UserError: anything the user can mend, see its message.
    """
    folder = Path(config.output_dir)
    check_output_dir(config, resume)
    with lasting_console(), distributed.session(config.device) as device, contextlib.ExitStack() as locks:
        start_logging()
        if distributed.is_main():
            locks.enter_context(locked(folder))
        with memory_advice(config):
            run = build(config, device)
        if distributed.is_main():
            moved = None if resume else move_aside(folder)
            if moved is not None:
                locks.enter_context(locked(folder))
            remove_unfinished(folder)
            start_logging(folder / "train.log")
            if moved is not None:
                log.info("the earlier run in %s was moved to %s", folder, moved)
        distributed.barrier()
        if resume:
            run.load(folder / "last.pt")
            log.info("resumed after epoch %d, step %d", run.progress.epoch, run.progress.step)
        if distributed.is_main():
            save_config(config, folder / "config.yaml")
            note_environment(folder, config.device)
        log.info("%s", describe(run))
        monitor = Monitor(folder, run.progress.step, wandb=config.train.wandb, config=config.model_dump())
        try:
            with memory_advice(config, checkpoint=folder / "last.pt"):
                finished = train(run, monitor, evaluate)
        except KeyboardInterrupt:  # a second one, or one between steps: what was saved last is what there is
            finished = False
        except Exception as error:
            if not isinstance(error, UserError) and (folder / "last.pt").exists():
                log.error(
                    "the training failed at step %d; go on from %s by --resume", run.progress.step, folder / "last.pt"
                )
            raise
        finally:
            monitor.close()
        if finished:
            if distributed.is_main():
                log.info("%s", summarize(run))
                if on_finished is not None:
                    on_finished(folder)
        elif (folder / "last.pt").exists():
            log.info("stopped at step %d; go on with the same command and --resume", run.progress.step)
        else:
            log.info("stopped before the first checkpoint was written")
        return finished


def try_steps(run: TrainingRun) -> tuple[Any, Any, dict[str, float], tuple[float, float]]:
    """Two training steps on one batch; returns images, targets, losses and the seconds of each step.

    The first step prepares kernels; the second one is what a step costs.
    """
    run.objective.train()
    images, targets = next(iterate(run.train_loader))
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        losses = train_step(run, images, targets, group=1)
        optimizer_step(run)
        seconds.append(time.perf_counter() - start)
    return images, targets, losses, (seconds[0], seconds[1])


def dry_run_report(
    run: TrainingRun,
    description: str,
    *,
    train_batch: str,
    seconds: tuple[float, float],
    losses: Mapping[str, float],
    val_batch: str,
    val_seconds: float,
    found: str = "",
) -> str:
    """What a dry run says.

    Args:
        train_batch, val_batch: what the batches held.
        seconds, losses: of the two steps, see `try_steps`.
        val_seconds: of one batch of the evaluation.
        found: what that batch gave, if there is something to say of it.
    """
    return "\n".join(
        [
            description,
            f"train batch    {train_batch}; {seconds[1]:.2f} s a step (the first {seconds[0]:.2f} s)",
            "losses         " + ", ".join(f"{name} {value:.3f}" for name, value in losses.items()),
            f"val batch      {val_batch}, {val_seconds:.2f} s{found}",
            f"peak memory    {peak_memory(run.device)}",
            f"expected time  {expected_time(run, seconds[1], val_seconds)}",
            "dry run: nothing was written",
        ]
    )


def expected_time(run: TrainingRun, step_seconds: float, val_batch_seconds: float) -> str:
    """Of the whole training, from what one step and one batch of the evaluation took."""
    train = run.config.train
    if train.minutes is not None:
        return f"{train.minutes:g} min by train.minutes, about {int(60 * train.minutes / step_seconds)} steps"
    steps = len(run.batches) * train.epochs
    evaluations = train.epochs // train.eval_every * len(run.val_loader) * val_batch_seconds
    return f"{duration(steps * step_seconds + evaluations)} ({steps} steps and the evaluations)"


def describe_machine(run: TrainingRun) -> str:
    device = (
        torch.cuda.get_device_name(run.device)
        if run.device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    processes = distributed.world_size()
    each = f" x {processes} processes" if processes > 1 else ""
    return (
        f"device {run.device} ({device}){each}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"batch {run.batches.batch_size} x {run.config.train.accumulate}{each}, lr {run.lr:g}"
    )


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
