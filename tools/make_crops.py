"""Cut the objects of COCO files out into class folders, to pre-train a backbone on; train and val share no image."""

import argparse

from detection.cli.arguments import existing_path
from detection.cli.run_tool import run_tool

EXAMPLE = """\
example:
  python tools/make_crops.py ../shared/data/cards/train.json ../shared/data/coco128/train.json --out data/crops
  python tools/pretrain.py configs/pretrain/ghostnet_crops.yaml
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("annotations", nargs="+", type=existing_path, help="COCO files")
    parser.add_argument(
        "--images",
        nargs="+",
        default=[],
        metavar="DIR",
        type=existing_path,
        help="one for each file; by default images/ beside it",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="made; holds train/CLASS/*.jpg and val/CLASS/*.jpg")
    parser.add_argument("--size", type=int, default=128, help="larger crops are scaled down to it (default 128 pixels)")
    parser.add_argument("--margin", type=float, default=0.1, help="surroundings, share of the box (default 0.1)")
    parser.add_argument("--min-side", type=int, default=24, help="smaller boxes are left out (default 24 pixels)")
    parser.add_argument("--min-examples", type=int, default=12, help="rarer classes are left out (default 12)")
    parser.add_argument("--max-examples", type=int, default=400, help="of each class (default 400)")
    parser.add_argument("--val-share", type=float, default=0.2, help="share of the images (default 0.2)")
    parser.add_argument("--seed", type=int, default=0, help="another one, another split (default 0)")
    args = parser.parse_args()
    # Only now, so that --help is quick.
    from detection.data.prepare.crops import make_crops

    print(make_crops(**vars(args)))


if __name__ == "__main__":
    run_tool(main)
