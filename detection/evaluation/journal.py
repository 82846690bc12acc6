"""Saves the detections of an evaluation batch by batch, so that an interrupted one can continue."""

import json
from pathlib import Path
from typing import Any

from detection.core.errors import UserError
from detection.core.outputs import begin_output
from detection.evaluation.coco_evaluator import Result


class Journal:
    """A file with one line for each batch of one process. It is removed when the evaluation is complete.

    Args:
        path: `PREDICTIONS.partN`.
        made_of: what the results depend on (checkpoint, data, settings); a journal of anything else is discarded.
        resume: whether to continue an existing journal.

    Attributes:
        images: ids of the images that are done.
        results: their detections.
    """

    def __init__(self, path: Path, made_of: dict[str, Any], resume: bool) -> None:
        self.path = path
        self.images: set[int] = set()
        self.results: list[Result] = []
        lines = []
        if resume and path.is_file():
            # The last line of a process that was killed may be cut off.
            lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        if lines and _record(lines[0]) == made_of:
            for number, line in enumerate(lines[1:], 1):
                record = _record(line)
                if record.keys() != {"images", "results"}:
                    raise UserError(f"{path}, line {number + 1} is damaged: evaluate without --resume")
                self.images.update(record["images"])
                self.results += record["results"]
        else:
            lines = [json.dumps(made_of) + "\n"]
        try:
            self.file = path.open("w", encoding="utf-8")
            begin_output(path)
            self.file.write("".join(lines))
            self.file.flush()
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from error

    def add(self, images: list[int], results: list[Result]) -> None:
        self.images.update(images)
        self.results += results
        try:
            self.file.write(json.dumps({"images": images, "results": results}) + "\n")
            self.file.flush()
        except OSError as error:
            raise UserError(f"{self.path} could not be written: {error.strerror} (is the disk full?)") from error

    def remove(self) -> None:
        self.file.close()
        self.path.unlink(missing_ok=True)


def _record(line: str) -> dict[str, Any]:
    """{} for a line that holds none."""
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
