"""An evaluation whose detections are made and whose score is not known yet (eval.background).

It lies in the run's folder as a whole – weights, detections, the begun line of metrics.jsonl – so that a run that is
killed meanwhile loses nothing: resumed, it scores the same detections again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detection.checkpoint import read_checkpoint, save_checkpoint, section
from detection.core.files import write_atomically
from detection.data.annotations import Annotations
from detection.engine.restore import section_errors
from detection.evaluation.background_scoring import BackgroundScoring
from detection.evaluation.coco_evaluator import Evaluation, Result, check_results

PATTERN = "pending-*.pt"


@dataclass
class Pending:
    """One such evaluation, being scored.

    Attributes:
        path: its file, pending-EPOCH.pt. It stays until a last.pt that knows the score is written.
        record: what metrics.jsonl will say, without the numbers.
    """

    path: Path
    record: dict[str, Any]
    scoring: BackgroundScoring

    @classmethod
    def begin(
        cls,
        folder: Path,
        checkpoint: Mapping[str, Any],
        record: dict[str, Any],
        results: Sequence[Result],
        index: Annotations,
        backend: str,
    ) -> "Pending":
        """Write it down, and start to score.

        Args:
            checkpoint: what best.pt will hold, should it be the best, without the numbers.
        """
        path = folder / f"pending-{record['epoch']}.pt"
        save_checkpoint(path, {**checkpoint, "record": record, "results": json.dumps(list(results))})
        return cls(path, record, BackgroundScoring(index, results, backend))

    @classmethod
    def resume(cls, folder: Path, epoch: int, index: Annotations, backend: str) -> "Pending | None":
        """Score the evaluation after `epoch` once more; None where its file is not there any more."""
        path = folder / f"pending-{epoch}.pt"
        if not path.exists():
            return None
        content = read_checkpoint(path)
        record = section(content, "record", path)
        with section_errors(path, "record"):
            numbers = [record[key] for key in ("step", "seconds")]
            if record["epoch"] != epoch or not all(isinstance(number, int | float) for number in numbers):
                raise ValueError(f"it is not of epoch {epoch}, or has no step or seconds")
        with section_errors(path, "results"):
            results = json.loads(section(content, "results", path))
        check_results(index, results, str(path))
        return cls(path, record, BackgroundScoring(index, results, backend))

    def wait(self) -> Evaluation:
        return self.scoring.wait()

    def save_best(self, numbers: Mapping[str, Any]) -> None:
        """Write best.pt and best_predictions.json of the weights that were evaluated."""
        content = read_checkpoint(self.path)
        results = content.pop("results")
        del content["record"]
        write_atomically(self.path.with_name("best_predictions.json"), lambda file: file.write(results.encode()))
        save_checkpoint(self.path.with_name("best.pt"), {**content, "numbers": dict(numbers)})


def remove_pending(folder: Path, but: int | None = None) -> None:
    """Remove all but the evaluation after epoch `but`, whose scores last.pt knows, or which will be made anew."""
    for path in folder.glob(PATTERN):
        if path.name != f"pending-{but}.pt":
            path.unlink(missing_ok=True)
