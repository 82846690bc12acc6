"""Look for what is wrong with a data set, before a training does: files, images, boxes, classes, splits, anchors."""

from pathlib import Path

from detection.cli.arguments import ToolParser, existing_path
from detection.cli.run_tool import run_tool
from detection.core.outputs import add_force

EXAMPLE = """\
examples:
  python tools/check_data.py configs/retina_ghost_320.yaml --html report.html     (train and val of a config)
  python tools/check_data.py mine/train.json --val mine/val.json                  (COCO; images in mine/images)
  python tools/check_data.py mine/                                                (a folder: COCO, VOC or YOLO)
  python tools/check_data.py mine/train.json --fix mended.json                    (a mended copy, and what was changed)

exit code: 0 where there are no errors (warnings and notes are allowed), 1 where there are, 2 for what cannot be read at
all and for a mistaken command. docs/doctor.md explains each finding.
"""


def main() -> int:
    parser = ToolParser(__doc__, EXAMPLE)
    parser.add_argument("target", metavar="CONFIG|JSON|DIR", help="config, annotation file, data.yaml, or folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", default=[], help="override a key of a config")
    parser.add_argument(
        "--images", metavar="DIR", type=existing_path, help="the images (default: images/ beside a JSON)"
    )
    parser.add_argument(
        "--val",
        metavar="JSON|DIR",
        type=existing_path,
        help="the validation set that goes with it, to look for leaks",
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
        "--fix", metavar="OUT.json", help="write a mended copy, and OUT.changes.json; val: OUT_val.json"
    )
    parser.add_argument("--no-decode", action="store_true", help="read images' headers and bytes, decode nothing")
    parser.add_argument("--no-images", action="store_true", help="open no image: see only whether it is there")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that read (default: one for each core)")
    add_force(parser)
    args = parser.parse()
    if args.workers is not None and args.workers < 1:
        parser.error("--workers must be at least 1")
    if args.val_images is not None and args.val is None:
        parser.error("--val-images needs --val")
    # A config's absence is told with the nearest name.
    target = args.target if Path(args.target).suffix in (".yaml", ".yml") else existing_path(args.target)

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


if __name__ == "__main__":
    run_tool(main)
