"""Write a random annotation file as large as COCO's instances_train2017.json: 118 k images, 860 k boxes.

Given a folder of photographs, also write images, cut from them at random.
"""

from collections.abc import Sequence

from detection.cli.arguments import ToolParser, existing_path

EXAMPLE = """\
example:
  python tools/make_coco_like.py --out /tmp/coco_like.json           (takes a minute; 450 MB)
  mkdir /tmp/like
  python tools/make_coco_like.py --out /tmp/like/train.json --photographs photos/   (3 GB more)
  python tools/check_data.py /tmp/like/train.json
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ToolParser("make_coco_like", __doc__, EXAMPLE)
    parser.add_argument("--out", required=True, metavar="JSON", help="file to write")
    parser.add_argument("--images", type=int, default=118_287, help="number of images")
    parser.add_argument("--boxes", type=int, default=860_001, help="number of boxes")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives another file")
    parser.add_argument(
        "--photographs",
        metavar="DIR",
        type=existing_path,
        help="also write images into images/ beside --out: random crops of those in DIR",
    )
    parser.add_force()
    args = parser.parse(arguments)
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
    return 0
