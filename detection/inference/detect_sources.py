"""Run a predictor over sources and write annotated images and videos, with a JSON beside each."""

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
from detection.inference.results import Summary, together
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

    Under torchrun each process takes its share of the items, and the summary is of all of them.

    An image that cannot be read is reported in the summary and the rest goes on. On Ctrl-C the video under way
    is closed properly, so that it plays up to there.

    Args:
        batch_size: images or frames in a pass of the network (live sources: one).
        max_frames: stop a video, camera or stream after this many.
        resume: pass over items whose results are there, of an earlier call that was cut off.
        draw: write annotated copies; else the JSON alone, which is quicker.
        track: number the objects of videos, see `detection.inference.track`.
        show_fps: draw how many frames of a video are detected in per second.
        force: overwrite files that this toolkit did not write; never sources.

    Raises:
        UserError: the folder cannot be written to, a result would overwrite a source or a file that this toolkit did
            not write, or the library that tracks is not there.
    """
    out = Path(out)
    if track:
        load_norfair()
    summary = Summary()
    sources = [item.source for item in items if item.kind in ("image", "video") and "://" not in item.source]
    items = items[distributed.rank() :: distributed.world_size()]
    if resume:
        left = [item for item in items if not _is_done(item, out, draw)]
        summary.passed_over, items = len(items) - len(left), left
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
    return together(distributed.gather(summary))


def num_streams_for(items: Sequence[Item], device: torch.device) -> int:
    """How many passes of the network at the same time (`Predictor`'s num_streams) are best for these items.

    On a CPU as many as threads, at most four; for few images and for live sources one, which is done sooner. A GPU
    is busy with one.
    """
    live = any(item.kind in ("camera", "stream") for item in items)
    few = len(items) < 8 and all(item.kind == "image" for item in items)
    return 1 if live or few or device.type != "cpu" else min(4, torch.get_num_threads())


def _is_done(item: Item, out: Path, images: bool) -> bool:
    """Images are written first, then their JSON; a video's JSON has its last line when all of it is done."""
    files = results_of(item, out, images)
    if not all(map(os.path.isfile, files)):
        return False
    return item.kind == "image" or (item.kind == "video" and Path(files[-1]).read_bytes().endswith(COMPLETE))


def results_of(item: Item, out: Path, images: bool = True) -> list[str]:
    """The files that are written for an item: its JSON, and before it, with `images`, the annotated copy."""
    stem = os.path.join(out, item.name)
    drawn = [f"{stem}{'.jpg' if item.kind == 'image' else '.mp4'}"] if images else []
    return [*drawn, f"{stem}.json"]
