"""What a run leaves for people to see: log, metrics.jsonl, TensorBoard events, a progress bar."""

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from detection import distributed
from detection.checkpoint import write_atomically
from detection.device import progress_interval

log = logging.getLogger("detection")


class Monitor:
    """Writes to one run's folder. metrics.jsonl has one JSON object per evaluation.

    Of several processes the main one alone writes.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.folder = folder
        self.writer = None
        if not distributed.is_main():
            return
        # TensorBoard takes a second to import and is needed in training alone.
        from torch.utils.tensorboard import SummaryWriter

        # purge_step: events past a resumed checkpoint were of steps that are made again.
        self.writer = SummaryWriter(str(folder), purge_step=step or None)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        if self.writer is None:
            return
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Append to metrics.jsonl; a line of the same or a later epoch, of a run killed and resumed, is replaced."""
        if self.writer is None:
            return
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if json.loads(line)["epoch"] < record["epoch"]]
        text = "\n".join([*kept, json.dumps(record)]) + "\n"
        write_atomically(path, lambda file: file.write(text.encode()))
        numbers = {f"val/{k}": v for k, v in record.items() if isinstance(v, float)}
        self.scalars(numbers, record["step"])
        self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class Bar:
    """One progress bar over the whole training, whether it is counted in epochs or in minutes."""

    def __init__(self, progress: float) -> None:
        self.bar = tqdm(
            total=1.0,
            initial=progress,
            bar_format="{desc} {percentage:3.0f}%|{bar:20}| {elapsed} done, {remaining} left{postfix}",
            mininterval=progress_interval(),
            leave=False,
            disable=not distributed.is_main(),
            file=sys.stderr,
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
            handler = logging.FileHandler(file)
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
            logger.addHandler(handler)


class _Console(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()
