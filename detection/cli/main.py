"""The command `ghostdet`: `ghostdet train …` does what `python tools/train.py …` does, from any folder."""

import importlib
import importlib.metadata
import sys
from collections.abc import Sequence

from detection.cli.run_tool import run_tool
from detection.core.errors import UserError
from detection.core.files import shown
from detection.core.text import closest_match

COMMANDS = {
    "train": "train a detector from a config",
    "evaluate": "measure the AP of a checkpoint, an exported file or a results file",
    "detect": "detect objects in images, videos, cameras or streams",
    "label": "label images with a detector, or add the classes that a dataset lacks",
    "export": "export a checkpoint to ONNX, OpenVINO, TorchScript or torch.export",
    "quantize": "write smaller files of a detector (fp16, int8)",
    "benchmark": "time detectors side by side, or count parameters and multiply-adds",
    "models": "list the detectors that come with the toolkit",
    "report": "write an HTML report about a run, or about two",
    "check_data": "check a dataset before training",
    "convert_data": "convert a dataset between COCO, Pascal VOC and YOLO, or split it",
    "browse": "show training batches after augmentation",
    "pretrain": "pre-train a backbone by classification",
    "convert_weights": "identify, check or convert a file of GhostNet weights",
    "ghostify": "replace a network's convolutions with ghost modules",
    "redundancy": "find redundant feature maps of a layer",
    "make_demo_data": "write the demo dataset",
    "make_coco_like": "write a random dataset of COCO's size",
    "make_crops": "cut objects out of COCO datasets for pre-training",
}
"""Each is a module of this package."""
HELP = f"""\
usage: ghostdet COMMAND [ARGUMENT …]

commands:
{"".join(f"  {name:<17}{text}" + chr(10) for name, text in COMMANDS.items())}
options:
  --help           show this help, or with a COMMAND its own
  --version        show the version

example:
  ghostdet make_demo_data --out data/demo
  ghostdet train demo train.minutes=2
  ghostdet detect runs/demo/best.pt data/demo/images --out found
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names with the arguments behind it; returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments:
        print(HELP, end="", file=sys.stderr)
        return 2
    name, *others = arguments
    if name in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if name == "--version":
        print(f"ghostdet {version()}")
        return 0
    command = name.replace("-", "_")
    if command not in COMMANDS:
        close = closest_match(command, COMMANDS)
        hint = f"did you mean {close}?" if close else f"known: {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {shown(name)} ({hint})")
    return importlib.import_module(f"detection.cli.{command}").main(others)


def version() -> str:
    try:
        return importlib.metadata.version("ghostnet-detection")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def run() -> None:
    """Run `main` as a process does, with its exit statuses and signals; see `run_tool`."""
    run_tool(main)
