"""Run a Predictor over sources and write annotated pictures and videos, with a JSON beside each."""

import contextlib
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import cv2
import numpy as np
from tqdm import tqdm

from detection import distributed
from detection.data.transforms import read_image
from detection.device import progress_interval
from detection.errors import UserError
from detection.files import make_folder, write_atomically
from detection.inference.draw import draw_detections
from detection.inference.predict import Detections, Predictor
from detection.inference.sources import Item

# The end of a video's JSON when all of it was read; stopped by Ctrl-C, it lacks the mark, and `resume` does it again.
COMPLETE = b'\n], "complete": true}\n'


@dataclass
class Summary:
    """What was done: counts, and the sources that failed with their reason."""

    images: int = 0
    frames: int = 0
    objects: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    passed_over: int = 0
    """Items whose results were there."""
    interrupted: bool = False

    def __str__(self) -> str:
        done = [f"{self.images} pictures"] if self.images else []
        done += [f"{self.frames} video frames"] if self.frames else []
        found = ", ".join(f"{count} {name}" for name, count in self.objects.most_common(8)) or "nothing"
        text = f"{' and '.join(done) or 'nothing'} done; found {found}"
        if self.passed_over:
            text += f"; {self.passed_over} were done before"
        return text + ("; stopped by Ctrl-C, what was done is kept" if self.interrupted else "")


def detect(
    predictor: Predictor,
    items: Sequence[Item],
    out: str | Path,
    *,
    batch_size: int = 1,
    max_frames: int | None = None,
    resume: bool = False,
) -> Summary:
    """Write out/NAME.jpg (or .mp4) and out/NAME.json for each item.

    Under torchrun each process takes its share of the items, and the summary is of all of them.

    A picture that cannot be read is reported in the summary and the rest goes on. On Ctrl-C the video under way
    is closed properly, so that it plays up to there.

    Args:
        max_frames: stop a video or camera after this many.
        resume: pass over items whose results are there, of an earlier call that was cut off.

    Raises:
        UserError: the folder cannot be written to, or a result would overwrite its own source.
    """
    out = Path(out)
    _check_out(items, out)
    summary = Summary()
    items = items[distributed.rank() :: distributed.world_size()]
    if resume:
        left = [item for item in items if not _is_done(item, out)]
        summary.passed_over, items = len(items) - len(left), left
    images = [item for item in items if item.kind == "image"]
    try:
        _detect_images(predictor, images, out, batch_size, summary)
        for item in items:
            if item.kind != "image":
                try:
                    _detect_video(predictor, item, out, batch_size, max_frames, summary)
                except UserError as error:
                    summary.failed.append(str(error))
    except KeyboardInterrupt:
        summary.interrupted = True
    return _added(distributed.gather(summary))


def _is_done(item: Item, out: Path) -> bool:
    """Pictures are written first, then their JSON; a video's JSON has its last line when all of it is done."""
    record = out / f"{item.name}.json"
    if item.kind == "image":
        return record.is_file() and (out / f"{item.name}.jpg").is_file()
    return item.kind == "video" and record.is_file() and record.read_bytes().endswith(COMPLETE)


def _added(summaries: Sequence[Summary]) -> Summary:
    """Of all processes together."""
    return Summary(
        images=sum(s.images for s in summaries),
        frames=sum(s.frames for s in summaries),
        objects=sum((s.objects for s in summaries), Counter()),
        failed=[reason for s in summaries for reason in s.failed],
        passed_over=sum(s.passed_over for s in summaries),
        interrupted=any(s.interrupted for s in summaries),
    )


def to_json(detections: Detections) -> list[dict[str, Any]]:
    """Detections as plain values: box [x1, y1, x2, y2] in pixels, label, name, score."""
    columns = (
        detections["boxes"].tolist(),
        detections["labels"].tolist(),
        detections["names"],
        detections["scores"].tolist(),
    )
    return [
        {"box": box, "label": label, "name": name, "score": score}
        for box, label, name, score in zip(*columns, strict=True)
    ]


def _check_out(items: Sequence[Item], out: Path) -> None:
    make_folder(out, "output folder")
    sources = {Path(item.source).resolve() for item in items if item.kind != "camera"}
    for item in items:
        suffix = ".jpg" if item.kind == "image" else ".mp4"
        if (out / f"{item.name}{suffix}").resolve() in sources:
            raise UserError(f"--out {out} would overwrite the source {item.source}; choose another folder")


def _detect_images(predictor: Predictor, items: Sequence[Item], out: Path, batch_size: int, summary: Summary) -> None:
    if not items:
        return
    # Of several processes the first one tells how far its share is; theirs are as large.
    silent = not distributed.is_main()
    with tqdm(total=len(items), desc="pictures", mininterval=progress_interval(), leave=False, disable=silent) as bar:
        for start in range(0, len(items), batch_size):
            readable: list[tuple[Item, np.ndarray]] = []
            for item in items[start : start + batch_size]:
                try:
                    readable.append((item, read_image(item.source)))
                except UserError as error:
                    summary.failed.append(str(error))
            found = predictor.predict_batch([image for _, image in readable]) if readable else []
            for (item, image), detections in zip(readable, found, strict=True):
                _write_image(out / f"{item.name}.jpg", draw_detections(image, detections))
                record = {"image": item.source, "width": image.shape[1], "height": image.shape[0]}
                _write_json(out / f"{item.name}.json", {**record, "detections": to_json(detections)})
                summary.images += 1
                summary.objects.update(detections["names"])
            bar.update(min(batch_size, len(items) - start))


def _detect_video(
    predictor: Predictor, item: Item, out: Path, batch_size: int, max_frames: int | None, summary: Summary
) -> None:
    capture = cv2.VideoCapture(int(item.source) if item.kind == "camera" else item.source)
    if not capture.isOpened():
        raise UserError(f"{item.kind} {item.source} cannot be opened (absent, corrupt, or an unknown codec)")
    fps = capture.get(cv2.CAP_PROP_FPS)
    fps = fps if math.isfinite(fps) and 0 < fps <= 1000 else 25.0
    expected = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if item.kind == "video" else 0
    if max_frames is not None:
        expected = min(expected or max_frames, max_frames)
    path = out / f"{item.name}.mp4"
    path.parent.mkdir(parents=True, exist_ok=True)
    writer: cv2.VideoWriter | None = None
    done = 0
    bar = tqdm(total=expected or None, desc=item.name, unit="frame", mininterval=progress_interval(), leave=False)
    try:
        with path.with_suffix(".json").open("w", encoding="utf-8") as file, bar, _json_list(file, item, fps) as add:
            for frames in _batches(capture, batch_size, max_frames):
                for frame, detections in zip(frames, predictor.predict_batch(frames), strict=True):
                    if writer is None:
                        writer = _open_writer(path, fps, frame)
                    writer.write(cv2.cvtColor(draw_detections(frame, detections), cv2.COLOR_RGB2BGR))
                    add({"frame": done, "seconds": done / fps, "detections": to_json(detections)})
                    done += 1
                    summary.frames += 1
                    summary.objects.update(detections["names"])
                    bar.update()
    except OSError as error:
        raise UserError(f"results of {item.source} could not be written to {out}: {error.strerror}") from None
    finally:
        capture.release()
        if writer is not None:
            writer.release()
    if done == 0:
        raise UserError(f"{item.kind} {item.source} has no readable frame")
    if item.kind == "video" and done < 0.9 * expected:
        print(f"warning: {item.source} ends after {done} of {expected} frames (truncated?)", file=sys.stderr)


def _batches(capture: cv2.VideoCapture, size: int, limit: int | None) -> Iterator[list[np.ndarray]]:
    count, frames = 0, []
    while limit is None or count < limit:
        read, frame = capture.read()
        if not read:
            break
        count += 1
        frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
        if len(frames) == size:
            yield frames
            frames = []
    if frames:
        yield frames


@contextlib.contextmanager
def _json_list(file: TextIO, item: Item, fps: float) -> Iterator[Any]:
    """A JSON object whose list of frames grows line by line, and which is closed properly also on Ctrl-C."""
    head = json.dumps({"video": item.source, "fps": fps})
    file.write(f'{head[:-1]}, "frames": [')
    first = True

    def add(record: dict[str, Any]) -> None:
        nonlocal first
        file.write(("\n" if first else ",\n") + json.dumps(record))
        first = False

    end = "\n]}\n"
    try:
        yield add
        end = COMPLETE.decode()
    finally:
        file.write(end)


def _open_writer(path: Path, fps: float, frame: np.ndarray) -> cv2.VideoWriter:
    # mp4v is the one mp4 encoder that every build of OpenCV brings.
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, (frame.shape[1], frame.shape[0]))
    if not writer.isOpened():
        raise UserError(f"video {path} cannot be written (folder not writable, or OpenCV without an mp4 encoder)")
    return writer


def _write_image(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 92])
    write_atomically(path, lambda file: file.write(data.tobytes()))


def _write_json(path: Path, content: Any) -> None:
    write_atomically(path, lambda file: file.write(json.dumps(content, indent=1).encode()))
