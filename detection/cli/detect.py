"""Detect objects in images, folders, videos, cameras or streams; write annotated copies and JSON files."""

import glob
import sys
from collections.abc import Sequence

from detection.cli.arguments import ToolParser, existing_detector, existing_path
from detection.core.extras import require, require_for_file

EXAMPLE = """\
examples:
  python tools/detect.py runs/demo/best.pt photo.jpg holiday/ 'more/*.png' --out found
  python tools/detect.py runs/demo/best.pt traffic.mp4 --classes car bus --threshold 0.4 --track --timing
  python tools/detect.py runs/demo/best.pt aerial/ --tile 640        (small objects in large images)
  torchrun --nproc-per-node 4 tools/detect.py runs/demo/best.pt archive/ --resume    (shared by four processes)
  python tools/detect.py runs/demo/best.pt 0 --out camera --show-fps (camera 0, until Ctrl-C)
  python tools/detect.py runs/demo/best.pt rtsp://user:password@192.168.1.7/live --max-frames 1000

exit code: 0; 1 where one or more sources failed (each is named at the end, the results of the others are there); 2 for
a mistaken command; 130 when stopped. Of an image wider or higher than 65,500 pixels, which a JPEG cannot hold, the
annotated copy is smaller; boxes in the JSON are in pixels of the original.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ToolParser("detect", __doc__, EXAMPLE)
    parser.add_argument(
        "checkpoint",
        type=existing_detector,
        help="best.pt or last.pt of a run, a file from tools/export.py, or a name (tools/models.py)",
    )
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="image, folder, glob, video, camera index or URL")
    parser.add_adapter()
    parser.add_argument("--out", default="detections", help="folder for the results")
    parser.add_argument("--threshold", type=float, default=0.3, help="lowest score of a box")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="only these classes")
    parser.add_argument("--batch-size", type=int, default=4, help="images per forward pass")
    parser.add_argument("--tile", type=int, metavar="SIZE", help="also detect in tiles of SIZE x SIZE pixels")
    parser.add_argument("--overlap", type=float, default=0.2, help="share of a tile that the next one overlaps")
    parser.add_argument("--track", action="store_true", help="track the objects of a video: each keeps its number")
    parser.add_argument("--max-frames", type=int, help="stop a video or camera after this many frames")
    parser.add_argument("--show-fps", action="store_true", help="draw the frames per second on videos")
    parser.add_argument("--no-images", action="store_true", help="write the JSON files only")
    parser.add_argument("--timing", action="store_true", help="print how long each stage took")
    parser.add_argument("--device", default=None, help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument("--resume", action="store_true", help="skip what an earlier call has finished")
    parser.add_force()
    args = parser.parse(arguments)
    if not 0 <= args.threshold <= 1:
        parser.error("--threshold must be between 0 and 1")
    if args.batch_size < 1 or (args.max_frames is not None and args.max_frames < 1):
        parser.error("--batch-size and --max-frames must be at least 1")
    for source in args.sources:
        # Neither URL nor camera nor pattern.
        if "://" not in source and not source.isdigit() and not glob.has_magic(source):
            existing_path(source)
    require_for_file(args.checkpoint)
    if args.track:
        require("--track", "norfair")

    from detection.core import distributed
    from detection.engine.signals import ignore_closed_console
    from detection.inference.detect_sources import detect, num_streams_for
    from detection.inference.predictor import Predictor
    from detection.inference.sources import find_items
    from detection.inference.tiles import TiledPredictor

    items = find_items(args.sources)
    with ignore_closed_console(), distributed.session(args.device or "auto") as device:
        plain = Predictor(
            args.checkpoint,
            str(device),
            score_threshold=args.threshold,
            classes=args.classes,
            num_streams=num_streams_for(items, device),
            adapter=args.adapter,
        )
        predictor = plain if args.tile is None else TiledPredictor(plain, args.tile, args.overlap, args.batch_size)
        summary = detect(
            predictor,
            items,
            args.out,
            batch_size=args.batch_size,
            max_frames=args.max_frames,
            resume=args.resume,
            draw=not args.no_images,
            track=args.track,
            show_fps=args.show_fps,
            force=args.force,
        )
        if distributed.is_main():
            for reason in summary.failed:
                print(f"error: {reason}", file=sys.stderr)
            print(f"{summary}\nresults in {args.out}")
            if args.timing:
                print(summary.timings())
    if summary.interrupted:
        return 130
    return 1 if summary.failed else 0
