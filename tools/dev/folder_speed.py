"""Measure tools/detect.py on a folder of images against a plain loop: read, predict, draw, write."""

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import torch

from detection.cli.arguments import ToolParser, existing_file, existing_path
from detection.cli.run_tool import run_tool
from detection.core.device import pick_device
from detection.core.extras import require_for_file
from detection.data.image_io import read_image
from detection.inference.detect_sources import detect, num_streams_for
from detection.inference.draw import draw_detections
from detection.inference.predictor import Predictor
from detection.inference.results import Summary, to_json
from detection.inference.sample_images import sample_image_paths
from detection.inference.sources import Item
from detection.inference.timing import Timing, merge_sequential

EXAMPLE = """\
examples:
  python tools/dev/folder_speed.py runs/mine/best.pt photos/
  python tools/dev/folder_speed.py runs/mine/best.pt photos/ --exported runs/mine/best.onnx
"""
CHUNK = 50
"""Images that one way has before it is the other's turn."""


def compare_folder(
    checkpoint: str | Path,
    folder: str,
    *,
    exported: str | Path | None = None,
    count: int = 500,
    batch_size: int = 4,
    device: str = "auto",
) -> str:
    """Detect in the images of a folder both ways, in turns of 50 images, and tell how fast each way was.

    The plain loop reads an image, runs the PyTorch model on it, draws, and writes the image and its JSON. The other
    way is `detect`, as tools/detect.py calls it. Both write into a temporary folder that is removed.

    Args:
        checkpoint: of the plain loop's PyTorch model.
        exported: what `detect` runs; None is the same checkpoint.
        count: images at most, spread evenly over the folder.
        batch_size: of `detect`.

    Raises:
        UserError: no images, an unreadable checkpoint or export, an absent device.
    """
    place = str(pick_device(device))
    paths = sample_image_paths([folder], count)
    items = [Item("image", path, str(number)) for number, path in enumerate(paths)]
    threads = torch.get_num_threads()
    plain = Predictor(checkpoint, place)
    quick = Predictor(exported or checkpoint, place, num_streams=num_streams_for(items, torch.device(place)))
    shared = torch.get_num_threads()
    seconds = 0.0
    timings: list[Timing] = []
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        # What is done once: memory, kernels of the first shapes, threads.
        plain_loop(plain, items[:4], out)
        detect(quick, items[:8], out, batch_size=batch_size, force=True)
        for start in range(0, len(items), CHUNK):
            chunk = items[start : start + CHUNK]
            # Who goes first finds the files cold.
            for way in ("plain", "quick") if start // CHUNK % 2 == 0 else ("quick", "plain"):
                if way == "plain":
                    torch.set_num_threads(threads)
                    began = time.perf_counter()
                    plain_loop(plain, chunk, out)
                    seconds += time.perf_counter() - began
                else:
                    torch.set_num_threads(shared)
                    summary: Summary = detect(quick, chunk, out, batch_size=batch_size, force=True)
                    timings.append(summary.images)
    timing = merge_sequential(timings)
    plain_rate, quick_rate = len(items) / seconds, timing.count / timing.wall
    return (
        f"plain loop, {checkpoint}: {len(items)} images in {seconds:.2f} s: {plain_rate:.1f} images per second\n"
        f"detect, {exported or checkpoint}, batches of {batch_size}: {quick_rate / plain_rate:.2f} times as fast\n\n"
        f"{timing}"
    )


def plain_loop(predictor: Predictor, items: Sequence[Item], out: Path) -> None:
    """Read, predict, draw, write; one after the other, one by one."""
    for item in items:
        image = read_image(item.source)
        found = predictor.predict(image)
        drawn = cv2.cvtColor(draw_detections(image, found), cv2.COLOR_RGB2BGR)
        cv2.imwrite(str(out / f"{item.name}.jpg"), drawn, [cv2.IMWRITE_JPEG_QUALITY, 92])
        (out / f"{item.name}.json").write_text(json.dumps(to_json(found), indent=1))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ToolParser("dev/folder_speed", __doc__, EXAMPLE)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=existing_file, help="best.pt or last.pt of a run")
    parser.add_argument("folder", metavar="FOLDER", type=existing_path, help="of images")
    parser.add_argument(
        "--exported", metavar="FILE", type=existing_path, help="exported file that detect.py runs (default: CHECKPOINT)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    args = parser.parse(arguments)
    require_for_file(args.exported or args.checkpoint)
    print(compare_folder(args.checkpoint, args.folder, exported=args.exported, device=args.device))
    return 0


if __name__ == "__main__":
    run_tool(main)
