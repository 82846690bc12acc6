"""Check a dataset before training: files, images, boxes, classes, splits, anchors."""

from collections.abc import Sequence
from pathlib import Path

from detection.cli.arguments import ToolParser, existing_path
from detection.cli.find_config import SUFFIXES, existing_or_shipped

EXAMPLE = """\
examples:
  python tools/check_data.py configs/retina_ghost_320.yaml --html report.html   (train and val of a config)
  python tools/check_data.py mine/train.json --val mine/val.json               (COCO; images in mine/images)
  python tools/check_data.py mine/                                             (a folder: COCO, VOC or YOLO)
  python tools/check_data.py mine/train.json --fix fixed.json                  (a corrected copy and its changes)

exit code: 0 where there are no errors (warnings and notes are allowed), 1 where there are, 2 for what cannot be read at
all and for a mistaken command. docs/doctor.md explains each finding.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ToolParser("check_data", __doc__, EXAMPLE)
    parser.add_argument("target", metavar="CONFIG|JSON|DIR", help="config, annotation file, data.yaml, or folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", default=[], help="override a key of a config")
    parser.add_argument(
        "--images", metavar="DIR", type=existing_path, help="folder of the images (default: images/ beside a JSON)"
    )
    parser.add_argument(
        "--val",
        metavar="JSON|DIR",
        type=existing_path,
        help="the validation set, to find images that both hold",
    )
    parser.add_argument(
        "--val-images",
        metavar="DIR",
        type=existing_path,
        help="its images (default: --images, or images/ beside --val)",
    )
    parser.add_argument("--json", metavar="FILE", help="write all findings and numbers to this file")
    parser.add_argument("--html", metavar="FILE", help="write a page with plots and contact sheets")
    parser.add_argument(
        "--fix", metavar="OUT.json", help="write a corrected copy and OUT.changes.json (of val: OUT_val.json)"
    )
    parser.add_argument(
        "--no-decode", action="store_true", help="read the headers and bytes of images, but do not decode them"
    )
    parser.add_argument("--no-images", action="store_true", help="do not open images, only check that they exist")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that read images (default: one for each core)"
    )
    parser.add_force()
    args = parser.parse(arguments)
    if args.workers is not None and args.workers < 1:
        parser.error("--workers must be at least 1")
    if args.val_images is not None and args.val is None:
        parser.error("--val-images needs --val")
    target = existing_or_shipped(args.target)
    if Path(target).suffix not in SUFFIXES:  # of an absent config, load_config names the nearest one
        target = existing_path(target)

    from detection.doctor.run_doctor import run_doctor

    report = run_doctor(
        target,
        overrides=args.overrides,
        images=args.images,
        val=args.val,
        val_images=args.val_images,
        json_file=args.json and Path(args.json),
        html_file=args.html and Path(args.html),
        fix_file=args.fix and Path(args.fix),
        read_images="none" if args.no_images else "headers" if args.no_decode else "all",
        workers=args.workers,
        force=args.force,
    )
    return report.exit_code
