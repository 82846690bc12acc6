"""Compare our GhostNet with PaddleClas's and MindCV's own, run by the frameworks themselves; see docs/weights.md.

    python tests/foreign/check.py --paddle PYTHON --mindspore PYTHON

PYTHON is the interpreter of an environment that has the framework. Exits with 1 where any output differs by more than
1e-4.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from backbones import GhostNet, build_backbone, load_weights, read_weights

TOLERANCE = 1e-4


def compare(weights: Path) -> float:
    """Print a line for each output and return the largest difference."""
    width = float(re.search(r"ghostnet_(\d\.\d)", weights.name)[1])
    expected = np.load(weights.with_suffix(".npz"))
    image = torch.from_numpy(expected["image"])
    classifier = GhostNet(width).eval()
    load_weights(classifier, *read_weights(weights, "ghostnet", width))
    backbone = build_backbone("ghostnet", width=width, weights=str(weights)).eval()
    with torch.no_grad():
        found = {"logits": classifier(image), **backbone(image)}
    worst = 0.0
    for name, value in found.items():
        difference = float(np.abs(value.numpy() - expected[name]).max())
        largest = float(np.abs(expected[name]).max())
        print(f"{weights.name:36} {name:6} largest value {largest:8.3f}   largest difference {difference:.1e}")
        worst = max(worst, difference)
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paddle", metavar="PYTHON", help="interpreter with paddlepaddle and paddleclas")
    parser.add_argument("--mindspore", metavar="PYTHON", help="interpreter with mindspore and mindcv")
    parser.add_argument("--keep", metavar="DIR", type=Path, help="keep the files here (default: a temporary folder)")
    args = parser.parse_args()
    pythons = {"paddle": args.paddle, "mindspore": args.mindspore}
    if not any(pythons.values()):
        parser.error("give --paddle, --mindspore or both")
    script = Path(__file__).with_name("save_networks.py")
    worst = 0.0
    with tempfile.TemporaryDirectory() as temporary:
        for framework, python in pythons.items():
            if python is None:
                continue
            folder = (args.keep or Path(temporary)) / framework
            subprocess.run([python, str(script), framework, str(folder)], check=True, stdout=subprocess.DEVNULL)
            files = sorted(p.with_suffix("") for p in folder.glob("*.npz"))
            for stem in files:
                worst = max(worst, compare(next(p for p in folder.glob(f"{stem.name}.*") if p.suffix != ".npz")))
    print(f"{'equal' if worst <= TOLERANCE else 'NOT EQUAL'}: largest difference {worst:.1e} (allowed: {TOLERANCE:g})")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
