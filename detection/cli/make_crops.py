"""Cut objects out of COCO datasets into class folders for pre-training; train and val share no image."""

from collections.abc import Sequence

from detection.cli.arguments import ToolParser, existing_path

EXAMPLE = """\
example:
  python tools/make_crops.py cards/train.json street/train.json --out data/crops
  python tools/pretrain.py configs/pretrain/ghostnet_crops.yaml
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ToolParser("make_crops", __doc__, EXAMPLE)
    parser.add_argument("annotations", nargs="+", type=existing_path, help="COCO files")
    parser.add_argument(
        "--images",
        nargs="+",
        default=[],
        metavar="DIR",
        type=existing_path,
        help="folder of the images of each file (default: images/ beside it)",
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="output folder, for train/CLASS/*.jpg and val/CLASS/*.jpg"
    )
    parser.add_argument("--size", type=int, default=128, help="scale larger crops down to this side, in pixels")
    parser.add_argument("--margin", type=float, default=0.1, help="margin around the box as a share of its side")
    parser.add_argument("--min-side", type=int, default=24, help="skip smaller boxes, in pixels")
    parser.add_argument("--min-examples", type=int, default=12, help="skip classes with fewer boxes")
    parser.add_argument("--max-examples", type=int, default=400, help="crops of each class at most")
    parser.add_argument("--val-share", type=float, default=0.2, help="share of the images for val")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split")
    args = parser.parse(arguments)
    # Only now, so that --help is quick.
    from detection.data.prepare.crops import make_crops

    print(make_crops(**vars(args)))
    return 0
