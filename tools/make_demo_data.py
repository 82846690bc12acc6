"""Write the demo detection data set, a COCO-format set of drawn Halloween scenes."""

from __future__ import annotations

import argparse
import sys

from detection.data.demo import make_demo_dataset, summarize


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python tools/make_demo_data.py --out data/demo --train 300 --val 60",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", default="data/demo", help="folder to write to; made if missing")
    parser.add_argument("--train", type=int, default=300, help="number of training pictures")
    parser.add_argument("--val", type=int, default=60, help="number of validation pictures")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other pictures")
    args = parser.parse_args()
    try:
        paths = make_demo_dataset(args.out, train_images=args.train, val_images=args.val, seed=args.seed)
    except (OSError, ValueError) as error:
        print(f"error: cannot make the data set in {args.out}: {error}", file=sys.stderr)
        return 2
    print(summarize(paths["train"]))
    print(summarize(paths["val"]))
    print(f"The data set is in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
