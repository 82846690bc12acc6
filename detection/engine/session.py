"""A training in its folder: lock, log, resume, stop, and the summary at the end."""

import contextlib
import logging
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from detection.config import BaseConfig
from detection.config_io import save_config
from detection.core import distributed
from detection.core.environment import note_environment
from detection.core.errors import UserError
from detection.core.files import remove_unfinished
from detection.core.memory import memory_advice
from detection.engine.loop import train
from detection.engine.resume import load_checkpoint
from detection.engine.run_folder import check_output_dir, locked, move_aside
from detection.engine.run_logger import RunLogger, start_logging
from detection.engine.signals import ignore_closed_console
from detection.engine.trainer import Trainer

log = logging.getLogger("detection")


def run_session(
    config: BaseConfig,
    build_trainer: Callable[[Any, torch.device], Trainer],
    *,
    resume: bool,
    on_finished: Callable[[Path], None] | None = None,
) -> bool:
    """Train in `config.output_dir`. Returns False if a signal stopped the training.

    An earlier run in the same folder is moved aside, never overwritten, and no other training can start there
    meanwhile (`detection.engine.run_folder`). Under torchrun this runs in every process.

    Args:
        build_trainer: called with config and device.
        resume: continue from the folder's last.pt.
        on_finished: called with the folder of a finished run, only in the main process.

    Raises:
        UserError: anything that the user can correct; see its message.
    """
    folder = Path(config.output_dir)
    check_output_dir(config, resume)
    with ignore_closed_console(), distributed.session(config.device) as device, contextlib.ExitStack() as locks:
        start_logging()
        if distributed.is_main():
            locks.enter_context(locked(folder))
        with memory_advice(config):
            trainer = build_trainer(config, device)
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
            load_checkpoint(trainer, folder / "last.pt")
            log.info("resumed after epoch %d, step %d", trainer.progress.epoch, trainer.progress.step)
        if distributed.is_main():
            save_config(config, folder / "config.yaml")
            note_environment(folder, config.device)
        log.info("%s", describe(trainer))
        finished = _train(trainer)
        if finished:
            if distributed.is_main():
                log.info("%s", _summary(trainer))
                if on_finished is not None:
                    on_finished(folder)
        elif (folder / "last.pt").exists():
            log.info("stopped at step %d; continue with the same command and --resume", trainer.progress.step)
        else:
            log.info("stopped before the first checkpoint was written")
        return finished


def _train(trainer: Trainer) -> bool:
    config, last = trainer.config, trainer.folder / "last.pt"
    logger = RunLogger(trainer.folder, trainer.progress.step, wandb=config.train.wandb, config=config.model_dump())
    try:
        with memory_advice(config, checkpoint=last):
            return train(trainer, logger)
    except KeyboardInterrupt:  # a second signal, or one during an evaluation: what was saved last remains
        return False
    except Exception as error:
        if not isinstance(error, UserError) and last.exists():
            log.error("the training failed at step %d; continue from %s with --resume", trainer.progress.step, last)
        raise
    finally:
        logger.close()


def describe(trainer: Trainer) -> str:
    """Two lines on what is trained and on which machine."""
    device = trainer.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    processes = distributed.world_size()
    each = f" x {processes} processes" if processes > 1 else ""
    return (
        f"{trainer.task.describe(trainer.model)}\n"
        f"device {device} ({name}){each}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"batch {trainer.sampler.batch_size} x {trainer.config.train.accumulate}{each}, lr {trainer.lr:g}"
    )


def _summary(trainer: Trainer) -> str:
    progress = trainer.progress
    return (
        f"\ndone: {progress.epoch} epochs, {progress.step} steps in {duration(trainer.seconds())}; "
        f"{trainer.task.summarize(progress, trainer.folder)}"
    )


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
