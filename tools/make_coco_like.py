"""Write an annotation file like COCO's instances_train2017.json: 118 k images, 860 k boxes with polygons, by chance.

Images, too, if photographs are given that they can be parts of.
"""

import argparse

from detection.cli.arguments import existing_path
from detection.cli.run_tool import run_tool
from detection.core.outputs import add_force

EXAMPLE = """\
example:
  python tools/make_coco_like.py --out /tmp/coco_like.json           (a minute; 450 MB)
  python tools/benchmark.py --index /tmp/coco_like.json              (read by us and by pycocotools)
  mkdir /tmp/like
  python tools/make_coco_like.py --out /tmp/like/train.json --photographs ../shared/data/person/images   (3 GB more)
  python tools/check_data.py /tmp/like/train.json
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, metavar="JSON")
    parser.add_argument("--images", type=int, default=118_287, help="(default: %(default)s)")
    parser.add_argument("--boxes", type=int, default=860_001, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument(
        "--photographs",
        metavar="DIR",
        type=existing_path,
        help="write images, too: random parts of those in DIR, in images/ beside --out",
    )
    add_force(parser)
    args = parser.parse_args()
    if args.images < 1 or args.boxes < 0:
        parser.error("--images must be 1 or more, --boxes 0 or more")
    # Only now, so that --help is quick.
    from detection.data.synthetic.coco_like import make_coco_like

    size = make_coco_like(
        args.out,
        images=args.images,
        boxes=args.boxes,
        seed=args.seed,
        photographs=args.photographs,
        force=args.force,
    )
    print(f"{args.out}: {args.images} images, {args.boxes} boxes, {size / 1e6:.0f} MB")


if __name__ == "__main__":
    run_tool(main)
