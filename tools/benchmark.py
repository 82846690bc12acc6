"""What networks cost: parameters, multiply-adds, activations and memory; and how fast a training is."""

import argparse
from pathlib import Path

from detection.benchmark.report import format_rows, parse_size
from detection.cli import run_tool
from detection.config import load_config
from detection.errors import UserError

EXAMPLE = """\
examples:
  python tools/benchmark.py --cost configs/retina_ghost.yaml configs/faster_rcnn_ghost.yaml
  python tools/benchmark.py --cost ghostnet@0.5 ghostnet@1.1 mobilenet_v3_large --size 320 --format markdown
  python tools/benchmark.py --cost ghostnet --layers --format csv --out layers.csv
  python tools/benchmark.py --train configs/retina_ghost_320.yaml data.batch_size=8 …
  python tools/benchmark.py --tables                     (the tables of README.md and docs/costs.md, anew)

the columns, all for one picture:
  parameters     learned numbers
  multiply-adds  of convolutions and matrix products ("FLOPs" in the papers of light networks)
  activations    numbers that convolutions and linear layers put out
  memory         what training keeps for the backward pass: each tensor that autograd saves, once, in float32,
                 without weights, gradients and optimizer; times the batch it is most of what training needs

A Faster R-CNN's second stage is counted for the boxes that it gets of one picture: 1000 in detection, and for the
memory 512 in training. RoIAlign, box decoding and NMS are not counted. The input of a detector is padded to multiples
of 32. Nothing is computed (meta device), so that it takes seconds at any size.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--cost", nargs="+", metavar="NETWORK", help="config (path of a YAML file) or backbone (NAME or NAME@WIDTH)"
    )
    what.add_argument(
        "--tables", nargs="*", metavar="FILE", help="rewrite the cost tables of FILEs (README.md and docs/costs.md)"
    )
    what.add_argument(
        "--train",
        nargs="+",
        metavar=("CONFIG", "key=value"),
        help="time training steps and loading against torchvision's",
    )
    parser.add_argument("--steps", type=int, default=20, help="of --train, each way (default: %(default)s)")
    parser.add_argument("--size", help="320 or HEIGHTxWIDTH (default: the config's sides; 224 for a backbone)")
    parser.add_argument("--num-classes", type=int, default=80, help="of the detector's head (default: %(default)s)")
    parser.add_argument("--layers", action="store_true", help="a row for every layer, too")
    parser.add_argument("--format", choices=("text", "markdown", "csv"), default="text")
    parser.add_argument("--out", metavar="FILE", help="write the table to this file instead of printing it")
    args = parser.parse_args()
    if args.num_classes < 1:
        parser.error("--num-classes must be at least 1")
    size = None if args.size is None else parse_size(args.size)

    if args.train is not None:
        config = load_config(args.train[0], args.train[1:])
        from detection.benchmark.training import compare_training

        print(compare_training(config, max(1, args.steps)))
        return 0

    if args.cost is None:
        from detection.benchmark.tables import FILES, update_tables

        print("\n".join(update_tables(args.tables or FILES)))
        return 0

    from detection.benchmark.cost import network_costs

    rows = []
    for network in args.cost:
        rows += network_costs(network, size, num_classes=args.num_classes, layers=args.layers)
    table = format_rows(rows, args.format)
    if args.out is None:
        print(table)
        return 0
    try:
        Path(args.out).write_text(table + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{args.out} cannot be written: {error.strerror}") from error
    print(f"table of {len(rows)} rows written to {args.out}")
    return 0


if __name__ == "__main__":
    run_tool(main)
