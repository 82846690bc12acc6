"""How fast detectors are, beside others; what networks cost; and how fast trainings and evaluations are."""

import argparse
import sys
from pathlib import Path

from detection.benchmark.cost_report import format_rows, parse_size
from detection.benchmark.latency_report import LatencyReport, parse_aps
from detection.benchmark.settings import BACKENDS, Settings
from detection.cli.arguments import existing_file, existing_path
from detection.cli.run_tool import run_tool
from detection.config_io import load_config
from detection.core.errors import UserError
from detection.core.extras import BACKENDS as SCORERS
from detection.core.extras import WRITERS, require, require_for_file
from detection.core.outputs import add_force, check_outputs, write_output

NEEDED = {"onnxruntime": WRITERS["onnx"], "openvino": WRITERS["openvino"]}
"""Backend -> the packages that make its files and run them."""
EXAMPLE = """\
examples:
  python tools/benchmark.py runs/mine/best.pt --peers --threads 2
  python tools/benchmark.py configs/retina_ghost_320.yaml mine.onnx theirs.onnx --batch 1 8 --image photo.jpg
  python tools/benchmark.py runs/mine/best.pt --backends eager onnxruntime --plot speed.png --out speed.csv --format csv
  python tools/benchmark.py --cost configs/retina_ghost.yaml ghostnet@1.1 --size 800x1333
  python tools/benchmark.py --cost ghostnet --layers --format csv --out layers.csv
  python tools/benchmark.py --train configs/retina_ghost_320.yaml data.batch_size=8 …
  python tools/benchmark.py --folder runs/mine/best.pt photos/ mine.onnx     (against a plain loop over the model)
  python tools/benchmark.py --evaluation                 (eval.backend: 5000 images x 100 detections x 80 classes)
  python tools/benchmark.py --index coco_like.json       (of tools/make_coco_like.py: reading annotations)
  python tools/benchmark.py --tables                     (the tables of docs/costs.md, anew)

A NETWORK to be timed is a config (random weights), a checkpoint, or an exported file (.onnx, .xml, .torchscript,
.pt2). An ONNX file of others gets random inputs of its own kind, and its raw session time is told. All are timed by
turns, in one process, from uint8 images of the network's size in memory to boxes: normalisation, box decoding and
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


def main() -> int:
    args = parse_arguments()
    size = None if args.size is None else parse_size(args.size)
    if args.train is not None:
        config = load_config(args.train[0], args.train[1:])
        from training_speed import compare_training

        print(compare_training(config, max(1, args.steps)))
        return 0

    if args.folder is not None:
        for path in map(existing_path, args.folder):
            require_for_file(path)
        from folder_speed import compare_folder

        checkpoint, folder, *exported = args.folder
        print(compare_folder(checkpoint, folder, exported=exported[0] if exported else None, device=args.device))
        return 0

    if args.evaluation is not None:
        require("--evaluation", *(package for packages in SCORERS.values() for package in packages))
        from evaluation_speed import compare_evaluations

        print(compare_evaluations(*args.evaluation, seed=args.seed))
        return 0

    if args.index is not None:
        from annotation_speed import compare_reading

        print(compare_reading(args.index))
        return 0

    if args.tables is not None:
        from cost_tables import FILES, update_tables

        print("\n".join(update_tables(args.tables or FILES)))
        return 0

    outputs = [out for out in (args.out, args.plot) if out is not None]
    for out in outputs:
        if not Path(out).parent.is_dir():
            raise UserError(f"{out} cannot be written: there is no folder {Path(out).parent}")
    check_outputs(outputs, [*args.networks, *args.image, *(args.cost or ())], force=args.force)
    if args.cost is not None:
        for network in args.cost:
            if network.endswith((".yaml", ".yml")):
                load_config(network)
        from detection.benchmark.cost import network_costs

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


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help="to be timed, see below")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--cost", nargs="+", metavar="NETWORK", help="config (path of a YAML file) or backbone (NAME or NAME@WIDTH)"
    )
    what.add_argument(
        "--tables",
        nargs="*",
        metavar="FILE",
        type=existing_file,
        help="rewrite the cost tables of FILEs (docs/costs.md)",
    )
    what.add_argument(
        "--train",
        nargs="+",
        metavar=("CONFIG", "key=value"),
        help="time training steps and loading against torchvision's",
    )
    what.add_argument(
        "--folder",
        nargs="+",
        metavar=("CHECKPOINT", "FOLDER"),
        help="time tools/detect.py on a folder against a plain loop; a third name: what detect.py runs in its place",
    )
    what.add_argument(
        "--evaluation",
        nargs="*",
        type=count,
        metavar="N",
        help="time the backends of eval.backend on random data: IMAGES DETECTIONS CLASSES (default: 5000 100 80)",
    )
    what.add_argument(
        "--index", metavar="JSON", type=existing_file, help="time reading a large COCO file against pycocotools"
    )
    parser.add_argument("--size", help="320 or HEIGHTxWIDTH (default: the config's sides; 224 for a backbone)")
    parser.add_argument(
        "--num-classes", type=count, help="of random weights (default: those of the first checkpoint; 80)"
    )
    parser.add_argument("--format", choices=("text", "markdown", "csv"), default="text")
    parser.add_argument("--out", metavar="FILE", help="write the table to this file instead of printing it")
    timing = parser.add_argument_group("timing")
    timing.add_argument("--peers", action="store_true", help="torchvision's detectors, too (random weights)")
    timing.add_argument(
        "--backends", nargs="+", metavar="NAME", help=f"of {', '.join(BACKENDS)} (default: all that can run here)"
    )
    timing.add_argument("--batch", nargs="+", type=count, default=[1], metavar="N", help="images in a call")
    timing.add_argument("--threads", type=count, help="on the CPU (default: PyTorch's)")
    timing.add_argument("--runs", type=count, default=50, help="timed calls of each row (default: %(default)s)")
    timing.add_argument(
        "--image",
        nargs="+",
        default=[],
        metavar="FILE",
        type=existing_file,
        help="detect in these (default: a drawn one)",
    )
    timing.add_argument("--score-threshold", type=float, help="of checkpoints, in place of their own")
    timing.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    timing.add_argument("--seed", type=int, default=0)
    timing.add_argument("--no-memory", action="store_true", help="leave out the memory, which takes some seconds a row")
    timing.add_argument("--ap", nargs="+", default=[], metavar="NETWORK=AP", help="where its file does not know it")
    timing.add_argument("--plot", metavar="FILE", help="write an image of AP against latency (.png, .svg, .pdf)")
    add_force(parser)
    others = parser.add_argument_group("cost and training")
    others.add_argument("--layers", action="store_true", help="--cost: a row for every layer, too")
    others.add_argument("--steps", type=int, default=20, help="of --train, each way (default: %(default)s)")
    args = parser.parse_args()
    if args.folder is not None and len(args.folder) not in (2, 3):
        parser.error("--folder takes a checkpoint, a folder, and maybe an exported file")
    if args.evaluation is not None:
        if len(args.evaluation) not in (0, 3):
            parser.error("--evaluation takes three numbers, or none: IMAGES DETECTIONS CLASSES")
        args.evaluation = args.evaluation or [5000, 100, 80]
    modes = ("cost", "tables", "train", "folder", "evaluation", "index")
    named = [getattr(args, name) is not None for name in modes]
    if not (args.networks or args.peers) and not any(named):
        parser.error(f"name a NETWORK to be timed, or one of --peers --{' --'.join(modes)}")
    if (args.networks or args.peers) and any(named):
        parser.error(f"--{', --'.join(modes[:-1])} and --{modes[-1]} are not done together with timing")
    if args.score_threshold is not None and not 0 <= args.score_threshold <= 1:
        parser.error("--score-threshold must be between 0 and 1")
    return args


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


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
        aps=parse_aps(args.ap),
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


if __name__ == "__main__":
    run_tool(main)
