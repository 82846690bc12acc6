"""Detects objects in videos, cameras and streams."""

import contextlib
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import cv2
import numpy as np

from detection.core.errors import UserError
from detection.core.files import open_regular_file
from detection.core.interrupts import interrupts_at_checks
from detection.core.outputs import begin_output, note_output
from detection.core.progress import progress_bar
from detection.inference.draw import draw_on, draw_rate
from detection.inference.predictor import Detections, Detector
from detection.inference.prefetch import AsyncWriter, LatestFrame, prefetch_map
from detection.inference.results import Summary, to_json
from detection.inference.sources import Item
from detection.inference.timing import DRAW, NETWORK, READ, RESIZE, TRACK, WAIT_READ, WAIT_WRITE, WRITE, Timing
from detection.inference.track import Tracker

# The end of the JSON of a complete video. After Ctrl-C the mark is missing, and `resume` processes the video again.
COMPLETE = b'\n], "complete": true}\n'
# Time after which a stream that does not answer is an error.
TIMEOUT_MS = 10_000


@dataclass(frozen=True)
class VideoOptions:
    """Options of `detect_video`.

    Attributes:
        batch_size: frames in a forward pass.
        max_frames: stop after this many frames.
        draw: write the annotated video.
        track: assign track ids.
        show_fps: draw the detection rate in frames per second.
    """

    batch_size: int = 1
    max_frames: int | None = None
    draw: bool = True
    track: bool = False
    show_fps: bool = False


@dataclass(frozen=True)
class Frame:
    """A BGR image, the prepared input of the network, and the time in seconds since the first frame."""

    image: np.ndarray
    prepared: Any
    seconds: float


def detect_video(predictor: Detector, item: Item, out: Path, summary: Summary, options: VideoOptions) -> None:
    """Write out/NAME.mp4 and out/NAME.json, and update `summary`.

    While the network processes a batch of frames, the next one is read and the previous one is drawn and written. On
    Ctrl-C, SIGTERM or SIGHUP all processed frames are written, and both files are closed properly.

    From a camera or a live stream the latest frame is read; a slow network drops frames in between. The written video
    repeats frames to keep the time.

    Raises:
        UserError: the source cannot be opened or has no frame, or results cannot be written.
    """
    timing = summary.video
    with contextlib.closing(VideoSource(item, timing)) as source, timing.running():
        path = out / f"{item.name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        tracker = Tracker(source.fps) if options.track else None
        expected = min(source.expected or sys.maxsize, options.max_frames or sys.maxsize)
        bar = progress_bar(None, item.name, expected if expected < sys.maxsize else None, unit="frame")
        batch_size = 1 if source.live else options.batch_size
        num_streams = 1 if source.live else predictor.num_streams
        done = 0

        def detect(frames: list[Frame]) -> list[Detections]:
            with timing.stage(NETWORK):
                return predictor.detect([frame.prepared for frame in frames])

        try:
            with (
                interrupts_at_checks() as check,
                bar,
                contextlib.closing(VideoResult(path, item, source, summary, options)) as result,
                result.open_json(),
                AsyncWriter(threads=1, depth=2 * batch_size) as writing,
                contextlib.closing(_read_frames(source, predictor, batch_size, options.max_frames, timing)) as batches,
                # With depth 0 the latest frame of a live source does not wait for the next one.
                contextlib.closing(
                    prefetch_map(detect, batches, threads=num_streams, depth=0 if source.live else num_streams)
                ) as results,
            ):
                for frames, future in results:
                    check()
                    for frame, detections in zip(frames, future.result(), strict=True):
                        if tracker is not None:
                            with timing.stage(TRACK):
                                detections = tracker.update(detections)
                        with timing.stage(WAIT_WRITE):
                            writing.submit(result.add, frame, detections)
                    done += len(frames)
                    bar.update(len(frames))
        except OSError as error:
            raise UserError(f"results of {item.shown} could not be written to {out}: {error.strerror}") from None
        if done == 0:
            path.with_suffix(".json").unlink()
            raise UserError(f"{item.kind} {item.shown} has no readable frame")
        if not source.live and done < 0.9 * expected < sys.maxsize:
            print(f"warning: {item.shown} ends after {done} of {expected} frames (truncated?)", file=sys.stderr)


class VideoSource:
    """An open video, camera or stream.

    Attributes:
        fps: frames per second; 25 if unknown.
        expected: number of frames according to the source; 0 if unknown.
        live: whether it is a camera or a stream without an end.

    Raises:
        UserError: it cannot be opened, or a stream does not answer.
    """

    def __init__(self, item: Item, timing: Timing) -> None:
        self._timing = timing
        self._capture = _open(item)
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if math.isfinite(fps) and 0 < fps <= 1000 else 25.0
        count = 0 if item.kind == "camera" else self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.expected = int(count) if math.isfinite(count) and count > 0 else 0
        self.live = item.kind == "camera" or (item.kind == "stream" and not self.expected)
        self._first: float | None = None
        self._number = itertools.count()
        self._latest = LatestFrame(self._next) if self.live else None

    def read(self) -> tuple[np.ndarray, float] | None:
        """The next frame (the latest one of a live source), BGR, and its time in seconds; None at the end."""
        return self._next() if self._latest is None else self._latest.get()

    def close(self) -> None:
        if self._latest is not None:
            self._latest.close()
        self._capture.release()

    def _next(self) -> tuple[np.ndarray, float] | None:
        with self._timing.stage(READ):
            read, image = self._capture.read()
        if not read:
            return None
        if not self.live:
            return image, next(self._number) / self.fps
        self._first = self._first or time.perf_counter()
        return image, time.perf_counter() - self._first


def _open(item: Item) -> cv2.VideoCapture:
    if item.kind == "camera":
        capture = cv2.VideoCapture(int(item.source))
    elif item.kind == "video":
        open_regular_file(item.source, "video").close()  # OpenCV would block on a pipe
        capture = cv2.VideoCapture(item.source)
    else:
        limits = (cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, cv2.CAP_PROP_READ_TIMEOUT_MSEC)
        parameters = [value for limit in limits for value in (limit, TIMEOUT_MS)]
        capture = cv2.VideoCapture(item.source, cv2.CAP_FFMPEG, parameters)
    if not capture.isOpened():
        reason = {
            "camera": "no camera with this index, in use by another program, or no permission",
            "stream": "unknown address, timeout, wrong password, or unknown codec",
        }
        raise UserError(
            f"{item.kind} {item.shown} cannot be opened ({reason.get(item.kind, 'missing, corrupt, or unknown codec')})"
        )
    return capture


def _read_frames(
    source: VideoSource, predictor: Detector, batch_size: int, limit: int | None, timing: Timing
) -> Generator[list[Frame], None, None]:
    """Lists of `batch_size` frames (the last may be shorter); another thread reads and resizes the next list."""

    def read(count: int) -> list[Frame]:
        frames: list[Frame] = []
        while len(frames) < count and (found := source.read()) is not None:
            image, seconds = found
            with timing.stage(RESIZE):
                prepared = predictor.prepare(image, bgr=True)
            frames.append(Frame(image, prepared, seconds))
        return frames

    sizes = itertools.repeat(batch_size) if limit is None else _batch_sizes(limit, batch_size)
    with contextlib.closing(prefetch_map(read, sizes, threads=1, depth=1)) as batches:
        for _, future in batches:
            with timing.stage(WAIT_READ):
                frames = future.result()
            if not frames:
                break
            yield frames


def _batch_sizes(total: int, size: int) -> Iterator[int]:
    """_batch_sizes(7, 3): 3, 3, 1."""
    return (min(size, total - start) for start in range(0, total, size))


class VideoResult:
    """Writes the annotated video and the JSON of one source frame by frame. `add` is not thread-safe."""

    def __init__(self, path: Path, item: Item, source: VideoSource, summary: Summary, options: VideoOptions) -> None:
        self._path, self._item, self._source, self._summary, self._options = path, item, source, summary, options
        self._writer: cv2.VideoWriter | None = None
        self._add_json: Callable[[dict[str, Any]], None]
        self._last: np.ndarray
        self._done = self._written = 0
        self._rate = FrameRate()

    @contextlib.contextmanager
    def open_json(self) -> Iterator[None]:
        """Open the JSON file for the duration of the block."""
        record = self._path.with_suffix(".json")
        try:
            with record.open("w", encoding="utf-8") as file:
                begin_output(record)
                with _json_list(file, {"video": self._item.shown, "fps": self._source.fps}) as self._add_json:
                    yield
        finally:
            note_output(record)

    def add(self, frame: Frame, detections: Detections) -> None:
        """Draw, encode and write one frame, and add its line to the JSON."""
        timing = self._summary.video
        if self._options.draw:
            with timing.stage(DRAW):
                draw_on(frame.image, detections, bgr=True)
                if self._options.show_fps:
                    draw_rate(frame.image, self._rate.update())
            with timing.stage(WRITE):
                self._write_frame(frame)
        with timing.stage(WRITE):
            self._add_json({"frame": self._done, "seconds": frame.seconds, "detections": to_json(detections)})
        self._done += 1
        self._summary.add(timing, detections)

    def close(self) -> None:
        """Finish the video; without its end it cannot be played."""
        if self._writer is not None:
            with self._summary.video.stage(WRITE):
                self._writer.release()
            note_output(self._path)

    def _write_frame(self, frame: Frame) -> None:
        if self._writer is None:
            self._writer = _open_writer(self._path, self._source.fps, frame.image)
            begin_output(self._path)
        # Repeat the previous frame of a live source until the time of this one.
        repeats = round(frame.seconds * self._source.fps) - self._written if self._source.live else 0
        for image in (*([self._last] * repeats if repeats > 0 else []), frame.image):
            self._writer.write(image)
            self._written += 1
        self._last = frame.image


class FrameRate:
    """Frames per second, averaged over about the last second."""

    def __init__(self) -> None:
        self._last: float | None = None
        self._gap = 0.0

    def update(self) -> float:
        """Count a frame and return the current rate."""
        now = time.perf_counter()
        if self._last is not None:
            gap = now - self._last
            weight = 1.0 if self._gap == 0 else min(1.0, gap)
            self._gap += weight * (gap - self._gap)
        self._last = now
        return 1 / self._gap if self._gap else 0.0


@contextlib.contextmanager
def _json_list(file: TextIO, head: dict[str, Any]) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Write a JSON object with a list of frames line by line; the object is completed also after Ctrl-C."""
    file.write(f'{json.dumps(head)[:-1]}, "frames": [')
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
    # mp4v is the only mp4 encoder in every build of OpenCV.
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, (frame.shape[1], frame.shape[0]))
    if not writer.isOpened():
        raise UserError(f"video {path} cannot be written (folder not writable, or OpenCV without an mp4 encoder)")
    return writer
