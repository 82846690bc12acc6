"""`run_training`: from a config to a trained detector in its folder; and the dry run."""

from collections.abc import Callable
from pathlib import Path

from detection.config import DetectionConfig
from detection.engine import dry_run as dry_runs
from detection.engine.detection_task import build_trainer
from detection.engine.session import run_session


def run_training(
    config: DetectionConfig, *, resume: bool = False, on_finished: Callable[[Path], None] | None = None
) -> bool:
    """Train a detector; the results are in `config.output_dir`. Returns False if a signal stopped the training.

    An earlier run in the same folder is moved aside, never overwritten.

    Args:
        resume: continue from the folder's last.pt.
        on_finished: called with the folder of a finished run, only in the main process.

    Raises:
        UserError: anything that the user can correct; see its message.
    """
    return run_session(config, build_trainer, resume=resume, on_finished=on_finished)


def dry_run(config: DetectionConfig) -> str:
    """Build everything, run one batch of training and one of evaluation; write nothing. Returns a report."""
    return dry_runs.dry_run(config, build_trainer)
