"""Runs a predictor on sources and writes annotated images and videos, each with a JSON file."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from detection.core import distributed
from detection.core.errors import UserError
from detection.core.files import make_folder
from detection.core.outputs import check_outputs
from detection.inference.images import detect_images
from detection.inference.predictor import Detector
from detection.inference.results import Summary, merge_summaries
from detection.inference.sources import Item
from detection.inference.track import load_norfair
from detection.inference.video import COMPLETE, VideoOptions, detect_video


def detect(
    predictor: Detector,
    items: Sequence[Item],
    out: str | Path,
    *,
    batch_size: int = 1,
    max_frames: int | None = None,
    resume: bool = False,
    draw: bool = True,
    track: bool = False,
    show_fps: bool = False,
    force: bool = False,
) -> Summary:
    """Write out/NAME.jpg (or .mp4) and out/NAME.json for each item.

    Under torchrun each process handles its share of the items; the summary covers all of them.

    An image that cannot be read is reported in the summary, and the other items continue. On Ctrl-C the current video
    is closed properly, so that it can be played up to there.

    Args:
        batch_size: images or frames in a forward pass (live sources: one).
        max_frames: stop a video, camera or stream after this many frames.
        resume: skip items with results of an earlier, interrupted call.
        draw: write annotated copies; otherwise only the JSON files, which is faster.
        track: assign track ids in videos, see `detection.inference.track`.
        show_fps: draw the detection rate in frames per second on videos.
        force: overwrite files that this toolkit did not write; sources are never overwritten.

    Raises:
        UserError: the folder cannot be written to, a result would overwrite a source or a file that this toolkit did
            not write, or the tracking library is not installed.
    """
    out = Path(out)
    if track:
        load_norfair()
    summary = Summary()
    sources = [item.source for item in items if item.kind in ("image", "video") and "://" not in item.source]
    items = items[distributed.rank() :: distributed.world_size()]
    if resume:
        remaining = [item for item in items if not _is_done(item, out, draw)]
        summary.skipped, items = len(items) - len(remaining), remaining
    make_folder(out, "output folder")
    check_outputs([path for item in items for path in results_of(item, out, draw)], sources, force=force)
    images = [item for item in items if item.kind == "image"]
    options = VideoOptions(batch_size, max_frames, draw, track, show_fps)
    try:
        detect_images(predictor, images, out, summary, batch_size=batch_size, draw=draw)
        for item in items:
            if item.kind != "image":
                try:
                    detect_video(predictor, item, out, summary, options)
                except UserError as error:
                    summary.failed.append(str(error))
    except KeyboardInterrupt:
        summary.interrupted = True
    return merge_summaries(distributed.gather(summary))


def num_streams_for(items: Sequence[Item], device: torch.device) -> int:
    """A good `num_streams` of `Predictor` for these items.

    On a CPU: the number of threads, at most four; one for few images and live sources, because it has a lower latency.
    One stream keeps a GPU busy.
    """
    live = any(item.kind in ("camera", "stream") for item in items)
    few = len(items) < 8 and all(item.kind == "image" for item in items)
    return 1 if live or few or device.type != "cpu" else min(4, torch.get_num_threads())


def _is_done(item: Item, out: Path, images: bool) -> bool:
    """Whether all results of an item exist. JSON files are written last; that of a complete video ends with a mark."""
    files = results_of(item, out, images)
    if not all(map(os.path.isfile, files)):
        return False
    return item.kind == "image" or (item.kind == "video" and Path(files[-1]).read_bytes().endswith(COMPLETE))


def results_of(item: Item, out: Path, images: bool = True) -> list[str]:
    """The result files of an item, in the order of writing: with `images` the annotated copy, then its JSON."""
    stem = os.path.join(out, item.name)
    drawn = [f"{stem}{'.jpg' if item.kind == 'image' else '.mp4'}"] if images else []
    return [*drawn, f"{stem}.json"]
