"""Detect objects in pictures, folders, videos or a camera; write annotated copies and a JSON beside each."""

import argparse
import sys

from detection.cli import run_tool

EXAMPLE = """\
examples:
  python tools/detect.py runs/demo/best.pt photo.jpg holiday/ 'more/*.png' --out found
  python tools/detect.py runs/demo/best.pt traffic.mp4 --classes car bus --threshold 0.4
  torchrun --nproc-per-node 4 tools/detect.py runs/demo/best.pt archive/ --resume    (shared by four processes)
  python tools/detect.py runs/demo/best.pt 0 --out camera        (camera 0, until Ctrl-C)
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="best.pt or last.pt of a run")
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="picture, folder, glob, video or camera index")
    parser.add_argument("--out", default="detections", help="folder for the results (default: %(default)s)")
    parser.add_argument("--threshold", type=float, default=0.3, help="lowest score shown (default: %(default)s)")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="only these classes")
    parser.add_argument("--batch-size", type=int, default=4, help="pictures per pass (default: %(default)s)")
    parser.add_argument("--max-frames", type=int, help="stop a video or camera after this many frames")
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:N (default: cuda where there is one)")
    parser.add_argument("--resume", action="store_true", help="pass over what an earlier call has done already")
    args = parser.parse_args()
    if not 0 <= args.threshold <= 1:
        parser.error("--threshold must be between 0 and 1")
    if args.batch_size < 1 or (args.max_frames is not None and args.max_frames < 1):
        parser.error("--batch-size and --max-frames must be at least 1")

    from detection import distributed
    from detection.inference.detect import detect
    from detection.inference.predict import Predictor
    from detection.inference.sources import find_items

    items = find_items(args.sources)
    with distributed.session(args.device or "auto") as device:
        predictor = Predictor(args.checkpoint, str(device), score_threshold=args.threshold, classes=args.classes)
        options = {"batch_size": args.batch_size, "max_frames": args.max_frames, "resume": args.resume}
        summary = detect(predictor, items, args.out, **options)
        if distributed.is_main():
            for reason in summary.failed:
                print(f"error: {reason}", file=sys.stderr)
            print(f"{summary}\nresults in {args.out}")
    if summary.interrupted:
        return 130
    return 2 if summary.failed else 0


if __name__ == "__main__":
    run_tool(main)
