"""Write an annotation file like COCO's instances_train2017.json: 118 k images, 860 k boxes with polygons, by chance."""

import argparse

from detection.cli import run_tool

EXAMPLE = """\
example:
  python tools/make_coco_like.py --out /tmp/coco_like.json           (a minute; 450 MB)
  python tools/benchmark.py --index /tmp/coco_like.json              (read by us and by pycocotools)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, metavar="JSON")
    parser.add_argument("--images", type=int, default=118_287, help="(default: %(default)s)")
    parser.add_argument("--boxes", type=int, default=860_001, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args()
    if args.images < 1 or args.boxes < 0:
        parser.error("--images must be 1 or more, --boxes 0 or more")
    # Only now, so that --help is quick.
    from detection.benchmark.annotations import make_coco_like

    size = make_coco_like(args.out, images=args.images, boxes=args.boxes, seed=args.seed)
    print(f"{args.out}: {args.images} images, {args.boxes} boxes, {size / 1e6:.0f} MB")


if __name__ == "__main__":
    run_tool(main)
