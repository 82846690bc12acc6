"""An evaluation whose predictions are known and whose score is computed in the background (eval.background).

Its file in the run's folder holds weights, predictions and the line of metrics.jsonl without the score, so that a
training that is killed meanwhile loses nothing: resumed, it scores the same predictions again.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detection.checkpoint import read_checkpoint, save_checkpoint, section
from detection.engine.resume import section_errors
from detection.engine.task import Task

PATTERN = "pending-*.pt"


@dataclass
class DeferredEvaluation:
    """One such evaluation.

    Attributes:
        path: its file, pending-EPOCH.pt. It stays until a last.pt with the score is written.
        record: the line of metrics.jsonl without the score.
        wait: waits for the score; returns its numbers.
    """

    path: Path
    task: Task
    record: dict[str, Any]
    wait: Callable[[], dict[str, Any]]

    @classmethod
    def start(
        cls, folder: Path, task: Task, checkpoint: Mapping[str, Any], record: dict[str, Any], predictions: Any
    ) -> "DeferredEvaluation":
        """Write the file and start to score.

        Args:
            checkpoint: the content of best.pt, without the numbers, in case the score is the best so far.
            predictions: plain values, which become JSON.
        """
        path = folder / f"pending-{record['epoch']}.pt"
        save_checkpoint(path, {**checkpoint, "record": record, "results": json.dumps(list(predictions))})
        return cls(path, task, record, task.start_scoring(predictions))

    @classmethod
    def resume(cls, folder: Path, epoch: int, task: Task) -> "DeferredEvaluation | None":
        """Score the evaluation after `epoch` again; None if its file does not exist.

        Raises:
            UserError: the file is damaged.
        """
        path = folder / f"pending-{epoch}.pt"
        if not path.exists():
            return None
        content = read_checkpoint(path, task.format)
        record = section(content, "record", path)
        with section_errors(path, "record"):
            numbers = [record[key] for key in ("step", "seconds")]
            if record["epoch"] != epoch or not all(isinstance(number, int | float) for number in numbers):
                raise ValueError(f"it is not of epoch {epoch}, or has no step or seconds")
        with section_errors(path, "results"):
            predictions = json.loads(section(content, "results", path))
        task.check_predictions(predictions, str(path))
        return cls(path, task, record, task.start_scoring(predictions))

    def save_best(self, numbers: Mapping[str, Any]) -> None:
        """Write best.pt and best_predictions.json of the weights that were evaluated."""
        content = read_checkpoint(self.path, self.task.format)
        self.task.save_predictions(json.loads(content.pop("results")), self.path.parent, best=True)
        del content["record"]
        save_checkpoint(self.path.with_name("best.pt"), {**content, "numbers": dict(numbers)})


def remove_deferred_evaluations(folder: Path, keep: int | None = None) -> None:
    """Remove the files of deferred evaluations but that after epoch `keep`.

    last.pt has the scores of the removed ones, or the training repeats these evaluations.
    """
    for path in folder.glob(PATTERN):
        if path.name != f"pending-{keep}.pt":
            path.unlink(missing_ok=True)
