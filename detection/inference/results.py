"""The summary of a detection run, and detections as JSON."""

import json
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from detection.inference.predictor import Detections
from detection.inference.timing import Timing, merge_parallel

# A module variable, because a Summary is pickled and a lock cannot be.
_lock = threading.Lock()


@dataclass
class Summary:
    """Counts, errors and timings of a detection run."""

    objects: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    skipped: int = 0
    """Items that already had results."""
    interrupted: bool = False
    images: Timing = field(default_factory=lambda: Timing("images"))
    video: Timing = field(default_factory=lambda: Timing("frames"))

    @property
    def num_images(self) -> int:
        """Number of processed images."""
        return self.images.count

    @property
    def num_frames(self) -> int:
        """Number of processed video frames."""
        return self.video.count

    def add(self, timing: Timing, detections: Detections) -> None:
        """Count an image or frame whose results are written. Thread-safe."""
        with _lock:
            timing.count += 1
            self.objects.update(detections["names"])

    def timings(self) -> str:
        """Tables of the time of each stage."""
        return "\n\n".join(str(timing) for timing in (self.images, self.video) if timing.count)

    def __str__(self) -> str:
        done = [f"{self.num_images} images"] if self.num_images else []
        done += [f"{self.num_frames} video frames"] if self.num_frames else []
        # By name among equal counts, whatever process or thread found them first.
        most = sorted(self.objects.items(), key=lambda item: (-item[1], item[0]))[:8]
        found = ", ".join(f"{count} {name}" for name, count in most) or "nothing"
        text = f"{' and '.join(done) or 'nothing'} done; found {found}"
        if self.skipped:
            text += f"; {self.skipped} were done before"
        return text + ("; stopped, what was done is kept" if self.interrupted else "")


def merge_summaries(summaries: Sequence[Summary]) -> Summary:
    """Merge the summaries of several processes."""
    return Summary(
        objects=sum((s.objects for s in summaries), Counter()),
        failed=[reason for s in summaries for reason in s.failed],
        skipped=sum(s.skipped for s in summaries),
        interrupted=any(s.interrupted for s in summaries),
        images=merge_parallel([s.images for s in summaries]),
        video=merge_parallel([s.video for s in summaries]),
    )


def to_json(detections: Detections) -> list[dict[str, Any]]:
    """Detections as JSON values: box [x1, y1, x2, y2] in pixels, label, name, score; with tracking id, or null."""
    columns = {
        "box": detections["boxes"].tolist(),
        "label": detections["labels"].tolist(),
        "name": detections["names"],
        "score": detections["scores"].tolist(),
    }
    if "ids" in detections:
        columns["id"] = detections["ids"]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def image_json(head: dict[str, Any], detections: Detections) -> str:
    """A JSON object of `head` and the detections, one per line. (`json`'s indentation takes ten times as long.)"""
    lines = [json.dumps(found) for found in to_json(detections)]
    body = "\n  " + ",\n  ".join(lines) + "\n" if lines else ""
    return f'{json.dumps(head)[:-1]}, "detections": [{body}]}}\n'
