"""Write the demo dataset: drawn Halloween scenes in COCO format."""

from collections.abc import Sequence

from detection.cli.arguments import ToolParser

EXAMPLE = "example: python tools/make_demo_data.py --out data/demo --train 300 --val 60"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ToolParser("make_demo_data", __doc__, EXAMPLE)
    parser.add_argument("--out", default="data/demo", help="output folder")
    parser.add_argument("--train", type=int, default=300, help="number of training images")
    parser.add_argument("--val", type=int, default=60, help="number of validation images")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other images")
    parser.add_force()
    args = parser.parse(arguments)
    # Only now, so that --help is quick.
    from detection.data.synthetic.demo import make_demo_dataset, summarize

    paths = make_demo_dataset(args.out, train_images=args.train, val_images=args.val, seed=args.seed, force=args.force)
    print(summarize(paths["train"]))
    print(summarize(paths["val"]))
    print(f"The dataset is in {args.out}")
    return 0
