"""What a run leaves for people to see: log, metrics.jsonl, TensorBoard events, a progress bar."""

import contextlib
import hashlib
import json
import logging
import math
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
from detection.engine.run_folder import read_metrics

log = logging.getLogger("detection")


class Monitor:
    """Writes to one run's folder. metrics.jsonl has one JSON object per evaluation.

    Of several processes the main one alone writes.

    Args:
        step: at which the run goes on.
        wandb: project of Weights & Biases to log to, too; `config` is what it shows of the run.

    Raises:
        UserError: wandb is not installed.
    """

    def __init__(
        self, folder: Path, step: int, *, wandb: str | None = None, config: Mapping[str, Any] | None = None
    ) -> None:
        self.folder = folder
        self.writer: Any = None
        self.wandb: Any = None
        if not distributed.is_main():
            return
        # TensorBoard takes a second to import and is needed in training alone.
        from torch.utils.tensorboard import SummaryWriter

        with self._beside_the_point():
            # purge_step: events past a resumed checkpoint were of steps that are made again.
            self.writer = SummaryWriter(str(folder), purge_step=step or None)
        if wandb is not None:
            self.wandb = _start_wandb(wandb, folder, config or {})

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        with self._beside_the_point():
            for name, value in values.items():
                if self.writer is not None:
                    self.writer.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log({**values, "step": step})

    def image(self, name: str, rgb: np.ndarray, step: int) -> None:
        """An RGB uint8 [H, W, 3] image, to TensorBoard and as NAME.jpg, where the newest one stays."""
        if not distributed.is_main():
            return
        _, data = cv2.imencode(".jpg", np.ascontiguousarray(rgb[..., ::-1]))
        jpeg, (height, width) = data.tobytes(), rgb.shape[:2]
        write_atomically(self.folder / f"{name}.jpg", lambda file: file.write(jpeg))
        with self._beside_the_point():
            if self.writer is not None:
                # The same JPEG: add_image() would make a PNG, which takes ten times as long.
                from tensorboard.compat.proto.summary_pb2 import Summary

                shown = Summary.Image(encoded_image_string=jpeg, height=height, width=width, colorspace=3)
                summary = Summary(value=[Summary.Value(tag=name, image=shown)])
                self.writer.file_writer.add_summary(summary, step)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Append to metrics.jsonl; a line of the same or a later epoch, of a run killed and resumed, is replaced."""
        if not distributed.is_main():
            return
        kept = [earlier for earlier in read_metrics(self.folder) if earlier["epoch"] < record["epoch"]]
        text = "".join(f"{json.dumps(line)}\n" for line in (*kept, record))
        write_atomically(self.folder / "metrics.jsonl", lambda file: file.write(text.encode()))
        numbers = {f"val/{k}": v for k, v in record.items() if isinstance(v, float)}
        self.scalars(numbers, record["step"])
        with self._beside_the_point():
            if self.writer is not None:
                self.writer.flush()

    def recorded(self, epoch: int, key: str) -> float:
        """What metrics.jsonl says of an epoch; NaN where it says nothing."""
        for record in read_metrics(self.folder):
            if record["epoch"] == epoch and isinstance(record.get(key), int | float):
                return float(record[key])
        return math.nan

    def close(self) -> None:
        with self._beside_the_point():
            if self.writer is not None:
                self.writer.close()
        if self.wandb is not None:
            self.wandb.finish()

    @contextlib.contextmanager
    def _beside_the_point(self) -> Iterator[None]:
        """TensorBoard's events are not worth a training: where they cannot be written, it goes on without them."""
        try:
            yield
        except OSError as error:
            self.writer = None
            log.warning(
                "TensorBoard's events cannot be written (%s): the training goes on without them", error.strerror
            )


class Bar:
    """One progress bar over the whole training, whether it is counted in epochs or in minutes."""

    def __init__(self, progress: float) -> None:
        self.bar = progress_bar(
            description="training",
            total=1.0,
            initial=progress,
            bar="{desc} {percentage:3.0f}%|{bar:20}| {elapsed} done, {remaining} left{postfix}",
            disable=not distributed.is_main(),
        )

    def show(self, progress: float, epoch: int, loss: float, lr: float) -> None:
        self.bar.set_description_str(f"epoch {epoch + 1}", refresh=False)
        self.bar.set_postfix_str(f"loss {loss:.3f}, lr {lr:.2g}", refresh=False)
        self.bar.update(max(0.0, min(1.0, progress) - self.bar.n))

    def close(self) -> None:
        self.bar.close()


def start_logging(file: Path | None = None) -> None:
    """Messages to the console above any progress bar, and to `file` with the time.

    Of several processes those but the main one keep silent: they would say the same.
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
        """A full disk: logging would print a traceback for every line; what matters fails with its own message."""


def _start_wandb(project: str, folder: Path, config: Mapping[str, Any]) -> Any:
    require("train.wandb", "wandb")
    import wandb

    # The same id after --resume: one run, one curve.
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return wandb.init(project=project, name=folder.name, id=name, dir=str(folder), config=dict(config), resume="allow")


def _quiet_thread_errors(args: Any) -> None:
    # TensorBoard writes in a thread of its own, tells the main thread of an error, and dies of it with a traceback.
    if type(args.thread).__name__ == "_AsyncWriterThread" and isinstance(args.exc_value, OSError):
        return
    _default_excepthook(args)


_default_excepthook = threading.excepthook
threading.excepthook = _quiet_thread_errors
