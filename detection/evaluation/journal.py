"""Saves the detections of an evaluation batch by batch, so that an interrupted one can continue."""

import json
from pathlib import Path
from typing import Any

from detection.config import DetectionConfig
from detection.core import distributed
from detection.core.errors import UserError
from detection.core.outputs import begin_output
from detection.data.annotations import Annotations
from detection.evaluation.coco_evaluator import Result
from detection.runtime.adapter import find_adapter


def journal_key(
    detector: str | Path, adapter: str | Path | None, config: DetectionConfig, annotations: Annotations
) -> dict[str, Any]:
    """What the detections on a data set depend on."""
    file, found = Path(detector), find_adapter(detector, adapter)
    return {
        "checkpoint": [str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns],
        "annotations": annotations.fingerprint(),
        "images": str(Path(annotations.images).resolve()),
        "config": config.model_dump(mode="json"),
        "adapter": found and found.model_dump(mode="json"),
        "processes": distributed.world_size(),
    }


class Journal:
    """A file with one line for each batch of one process. It is removed when the evaluation is complete.

    Args:
        path: `PREDICTIONS.partN`.
        key: what the results depend on (see `journal_key`); a journal with another key is discarded.
        resume: whether to continue an existing journal.

    Attributes:
        images: ids of the images that are done.
        results: their detections.
    """

    def __init__(self, path: Path, key: dict[str, Any], resume: bool) -> None:
        self.path = path
        self.images: set[int] = set()
        self.results: list[Result] = []
        lines = []
        if resume and path.is_file():
            # The last line of a process that was killed may be cut off.
            lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        if lines and _record(lines[0]) == key:
            for number, line in enumerate(lines[1:], 1):
                record = _record(line)
                if record.keys() != {"images", "results"}:
                    raise UserError(f"{path}, line {number + 1} is damaged: evaluate without --resume")
                self.images.update(record["images"])
                self.results += record["results"]
        else:
            lines = [json.dumps(key) + "\n"]
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
