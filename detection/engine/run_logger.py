"""What people see of a training: log, progress bar, TensorBoard events, images, Weights & Biases."""

import contextlib
import hashlib
import logging
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from detection.core import distributed
from detection.core.extras import require
from detection.core.files import write_atomically
from detection.core.progress import progress_bar
from detection.engine.training_progress import TrainingProgress

log = logging.getLogger("detection")


class RunLogger:
    """Writes TensorBoard events and images to one run's folder, and shows a progress bar.

    Of several processes only the main one writes.

    Args:
        step: optimizer steps at the start, above 0 for a resumed training.
        wandb: project of Weights & Biases to log to as well, together with `config`.

    Raises:
        UserError: wandb is not installed.
    """

    def __init__(
        self, folder: Path, step: int, *, wandb: str | None = None, config: Mapping[str, Any] | None = None
    ) -> None:
        self.folder = folder
        self.writer: Any = None
        self.wandb: Any = None
        self.bar: Any = None
        if not distributed.is_main():
            return
        # TensorBoard takes a second to import and is needed in training alone.
        from torch.utils.tensorboard import SummaryWriter

        with self._optional_events():
            # purge_step: the training repeats the steps after the checkpoint that it resumes from.
            self.writer = SummaryWriter(str(folder), purge_step=step or None)
        if wandb is not None:
            self.wandb = _start_wandb(wandb, folder, config or {})

    @contextlib.contextmanager
    def training_bar(self, fraction: float) -> Iterator[None]:
        """Show one progress bar over the whole training, counted in epochs or in minutes, from `fraction` to 1."""
        with progress_bar(
            description="training",
            total=1.0,
            initial=fraction,
            bar="{desc} {percentage:3.0f}%|{bar:20}| {elapsed} done, {remaining} left{postfix}",
        ) as self.bar:
            yield
        self.bar = None

    def losses(self, losses: Mapping[str, float], progress: TrainingProgress, fraction: float, lr: float) -> None:
        """Show the losses of a batch on the bar; send those of every tenth batch to TensorBoard. {} shows nothing.

        Args:
            fraction: finished part of the training in [0, 1].
        """
        if not losses:
            return
        total = sum(losses.values())
        if self.bar is not None:
            self.bar.set_description_str(f"epoch {progress.epoch + 1}", refresh=False)
            self.bar.set_postfix_str(f"loss {total:.3f}, lr {lr:.2g}", refresh=False)
            self.bar.update(max(0.0, min(1.0, fraction) - self.bar.n))
        if progress.loss_count % 10 == 1:
            parts = {f"train/{name}": part for name, part in losses.items()}
            self.scalars({"train/loss": total, "train/lr": lr, **parts}, progress.step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        with self._optional_events():
            for name, value in values.items():
                if self.writer is not None:
                    self.writer.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log({**values, "step": step})

    def image(self, name: str, rgb: np.ndarray | None, step: int) -> None:
        """Write an RGB uint8 [H, W, 3] image to TensorBoard and over NAME.jpg; None writes nothing."""
        if rgb is None or not distributed.is_main():
            return
        _, data = cv2.imencode(".jpg", np.ascontiguousarray(rgb[..., ::-1]))
        jpeg, (height, width) = data.tobytes(), rgb.shape[:2]
        write_atomically(self.folder / f"{name}.jpg", lambda file: file.write(jpeg))
        with self._optional_events():
            if self.writer is not None:
                # The same JPEG: add_image() would make a PNG, which takes ten times as long.
                from tensorboard.compat.proto.summary_pb2 import Summary

                shown = Summary.Image(encoded_image_string=jpeg, height=height, width=width, colorspace=3)
                summary = Summary(value=[Summary.Value(tag=name, image=shown)])
                self.writer.file_writer.add_summary(summary, step)

    def flush(self) -> None:
        with self._optional_events():
            if self.writer is not None:
                self.writer.flush()

    def close(self) -> None:
        with self._optional_events():
            if self.writer is not None:
                self.writer.close()
        if self.wandb is not None:
            self.wandb.finish()

    @contextlib.contextmanager
    def _optional_events(self) -> Iterator[None]:
        """Continue without TensorBoard if its events cannot be written."""
        try:
            yield
        except OSError as error:
            self.writer = None
            log.warning(
                "TensorBoard's events cannot be written (%s): the training continues without them", error.strerror
            )


def start_logging(file: Path | None = None) -> None:
    """Log messages to the console, above any progress bar, and with the time to `file`.

    Of several processes only the main one logs: the others would log the same.
    """
    for name in ("detection", "backbones"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO if distributed.is_main() else logging.ERROR)
        logger.propagate = False
        if not any(isinstance(handler, _Console) for handler in logger.handlers):
            logger.addHandler(_Console())
        if file is not None:
            handler = _LogFile(file)
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
            logger.addHandler(handler)


class _Console(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Print no traceback for each line on a full disk; the files that matter raise errors."""


def _start_wandb(project: str, folder: Path, config: Mapping[str, Any]) -> Any:
    require("train.wandb", "wandb")
    import wandb

    # The same id after --resume continues the same curve.
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return wandb.init(project=project, name=folder.name, id=name, dir=str(folder), config=dict(config), resume="allow")


def _quiet_thread_errors(args: Any) -> None:
    # TensorBoard writes in a thread, which hands an error to the main thread and ends with a traceback.
    if type(args.thread).__name__ == "_AsyncWriterThread" and isinstance(args.exc_value, OSError):
        return
    _default_excepthook(args)


_default_excepthook = threading.excepthook
threading.excepthook = _quiet_thread_errors
