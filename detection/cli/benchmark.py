"""Measure how fast detectors are, side by side, or count the parameters and multiply-adds of networks."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from detection.benchmark.cost_report import format_rows, parse_size
from detection.benchmark.latency_report import LatencyReport, parse_aps
from detection.benchmark.settings import BACKENDS, Settings
from detection.cli.arguments import ToolParser, existing_file, positive
from detection.cli.find_config import SUFFIXES, existing_or_shipped
from detection.config_io import load_config
from detection.core.errors import UserError
from detection.core.extras import WRITERS, require, require_for_file
from detection.core.outputs import check_outputs, write_output
from detection.zoo.names import detector_names, find_detector

NEEDED = {"onnxruntime": WRITERS["onnx"], "openvino": WRITERS["openvino"]}
"""Backend -> the packages that make its files and run them."""
EXAMPLE = """\
examples:
  python tools/benchmark.py runs/mine/best.pt --peers --threads 2
  python tools/benchmark.py configs/retina_ghost_320.yaml mine.onnx theirs.onnx --batch 1 8 --image photo.jpg
  python tools/benchmark.py runs/mine/best.pt --backends eager onnxruntime --plot speed.png --out speed.csv --format csv
  python tools/benchmark.py --cost configs/retina_ghost.yaml ghostnet@1.1 --size 800x1333
  python tools/benchmark.py --cost ghostnet --layers --format csv --out layers.csv

A NETWORK to be timed is a config (random weights), a checkpoint, or an exported file (.onnx, .xml, .torchscript,
.pt2). An ONNX file of others gets random inputs of its own kind, and its raw session time is reported. All are timed in
turn, in one process, from uint8 images of the network's size in memory to boxes: normalisation, box decoding and
NMS are inside, reading and resizing are not. Columns:
  median, p95       of the calls; images a second are batch / median
  times as fast     as the first row of the same batch
  boxes             that came out, an image
  memory            what a process of its own grew by at most while it ran (CUDA: what PyTorch's tensors took)
  file              the size of what is run: checkpoint, ONNX file, …
Networks with random weights (configs, torchvision's of --peers) do the work of trained ones: their score thresholds
let as many boxes through to NMS as that of the first checkpoint named does (see --score-threshold), or 1000.

Columns of --cost, all for one image:
  parameters     learned numbers
  multiply-adds  of convolutions and matrix products ("FLOPs" in the papers of light networks)
  activations    numbers that convolutions and linear layers put out
  memory         what training keeps for the backward pass: each tensor that autograd saves, once, in float32,
                 without weights, gradients and optimizer; times the batch it is most of what training needs

A Faster R-CNN's second stage is counted for the boxes that it gets of one image: 1000 in detection, and for the
memory 512 in training. RoIAlign, box decoding and NMS are not counted. The input of a detector is padded to multiples
of 32. Nothing is computed (meta device), so that it takes seconds at any size.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    size = None if args.size is None else parse_size(args.size)
    outputs = [out for out in (args.out, args.plot) if out is not None]
    for out in outputs:
        if not Path(out).parent.is_dir():
            raise UserError(f"{out} cannot be written: there is no folder {Path(out).parent}")
    check_outputs(outputs, [*args.networks, *args.image, *(args.cost or ())], force=args.force)
    if args.cost is not None:
        for network in args.cost:
            if network.endswith(SUFFIXES):
                load_config(network)
        from detection.benchmark.detector_cost import network_costs

        rows = []
        for network in args.cost:
            rows += network_costs(network, size, num_classes=args.num_classes or 80, layers=args.layers)
        write(format_rows(rows, args.format), args.out, len(rows))
        return 0

    report = measure(args, size)
    write(report.format(args.format), args.out, len(report.rows))
    if args.plot is not None:
        from detection.benchmark.latency_plot import plot_latency

        plot_latency(report, args.plot)
        print(f"image written to {args.plot}", file=sys.stderr)
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ToolParser("benchmark", __doc__, EXAMPLE)
    parser.add_argument(
        "networks", nargs="*", default=[], metavar="NETWORK", help="config, checkpoint or exported file to be timed"
    )
    parser.add_argument(
        "--size", help="input size, 320 or HEIGHTxWIDTH (default: that of the config; 224 for a backbone)"
    )
    parser.add_argument(
        "--num-classes",
        type=positive,
        help="classes of networks with random weights (default: those of the first checkpoint; 80)",
    )
    parser.add_argument("--format", choices=("text", "markdown", "csv"), default="text", help="format of the table")
    parser.add_argument("--out", metavar="FILE", help="write the table to this file instead of printing it")
    timing = parser.add_argument_group("timing")
    timing.add_argument("--peers", action="store_true", help="also time torchvision's detectors, with random weights")
    timing.add_argument(
        "--backends", nargs="+", metavar="NAME", help=f"some of {', '.join(BACKENDS)} (default: all that can run here)"
    )
    timing.add_argument("--batch", nargs="+", type=positive, default=[1], metavar="N", help="batch sizes")
    timing.add_argument("--threads", type=positive, help="threads of the CPU (default: PyTorch's)")
    timing.add_argument("--runs", type=positive, default=50, help="timed calls of each row")
    timing.add_argument(
        "--image",
        nargs="+",
        default=[],
        metavar="FILE",
        type=existing_file,
        help="images to detect in (default: a drawn one)",
    )
    timing.add_argument("--score-threshold", type=float, help="score threshold of checkpoints (default: their own)")
    timing.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    timing.add_argument("--seed", type=int, default=0, help="of random weights and images")
    timing.add_argument(
        "--no-memory", action="store_true", help="do not measure memory, which takes some seconds a row"
    )
    timing.add_argument(
        "--ap", nargs="+", default=[], metavar="NETWORK=AP", help="AP of a network whose file does not hold it"
    )
    timing.add_argument("--plot", metavar="FILE", help="write an image of AP against latency (.png, .svg, .pdf)")
    parser.add_force()
    cost = parser.add_argument_group("cost")
    cost.add_argument(
        "--cost", nargs="+", metavar="NETWORK", help="count, do not time: configs, or backbones as NAME or NAME@WIDTH"
    )
    cost.add_argument("--layers", action="store_true", help="also a row for each layer")
    args = parser.parse(arguments)
    args.networks = [
        find_detector(name) if name in detector_names() else existing_or_shipped(name) for name in args.networks
    ]
    if args.cost is None and not (args.networks or args.peers):
        parser.error("name a NETWORK to be timed, or one of --peers --cost")
    if args.cost is not None:
        if args.networks or args.peers:
            parser.error("--cost is not done together with timing")
        args.cost = list(map(existing_or_shipped, args.cost))
    if args.score_threshold is not None and not 0 <= args.score_threshold <= 1:
        parser.error("--score-threshold must be between 0 and 1")
    return args


def measure(args: argparse.Namespace, size: tuple[int, int] | None) -> LatencyReport:
    settings = Settings(
        targets=tuple(dict.fromkeys(args.networks)),
        peers=args.peers,
        backends=None if args.backends is None else tuple(dict.fromkeys(args.backends)),
        batches=tuple(dict.fromkeys(args.batch)),
        threads=args.threads,
        runs=args.runs,
        size=size,
        images=tuple(args.image),
        num_classes=args.num_classes,
        score_threshold=args.score_threshold,
        device=args.device,
        aps={existing_or_shipped(network): ap for network, ap in parse_aps(args.ap).items()},
        seed=args.seed,
        memory=not args.no_memory,
    )
    for network in args.networks:
        require_for_file(network)
    for backend in args.backends or ():
        require(f"--backends {backend}", *NEEDED.get(backend, ()))
    # Before minutes are spent on measuring.
    if args.plot is not None:
        from detection.benchmark.latency_plot import check_plot

        check_plot(args.plot, settings)
    from detection.benchmark.latency import measure_latency

    return measure_latency(settings)


def write(table: str, out: str | None, rows: int) -> None:
    if out is None:
        print(table)
        return
    write_output(Path(out), lambda file: file.write(f"{table}\n".encode()))
    print(f"table of {rows} rows written to {out}")
