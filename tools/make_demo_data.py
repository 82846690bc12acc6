"""Write the demo detection data set, a COCO-format set of drawn Halloween scenes."""

import argparse

from detection.cli.run_tool import run_tool
from detection.core.outputs import add_force


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python tools/make_demo_data.py --out data/demo --train 300 --val 60",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", default="data/demo", help="folder to write to; made if missing")
    parser.add_argument("--train", type=int, default=300, help="number of training images")
    parser.add_argument("--val", type=int, default=60, help="number of validation images")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other images")
    add_force(parser)
    args = parser.parse_args()
    # Only now, so that --help is quick.
    from detection.data.synthetic.demo import make_demo_dataset, summarize

    paths = make_demo_dataset(args.out, train_images=args.train, val_images=args.val, seed=args.seed, force=args.force)
    print(summarize(paths["train"]))
    print(summarize(paths["val"]))
    print(f"The data set is in {args.out}")


if __name__ == "__main__":
    run_tool(main)
