"""Rewrite the cost tables of docs/costs.md: this toolkit's networks beside the numbers of the papers.

They stand between `<!-- table:NAME -->` and `<!-- /table -->`, and what stands there is replaced (`make tables`).
"""

import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
import torchvision
from torch import nn

from backbones import GhostNet
from backbones.cost import measure_cost
from backbones.ghost_resnet import ghost_resnet50, ghost_resnet56
from backbones.ghost_vgg import ghost_vgg16
from detection.benchmark.detector_cost import network_costs
from detection.cli.arguments import ToolParser, existing_file
from detection.cli.run_tool import run_tool
from detection.core.errors import UserError
from detection.core.files import read_file, write_atomically
from detection.core.text import markdown_table

EXAMPLE = """\
example:
  python tools/dev/cost_tables.py
"""
FILES = ("docs/costs.md",)
CONFIGS = (
    "configs/demo.yaml",
    "configs/ghostdet_nano.yaml",
    "configs/ghostdet_small.yaml",
    "configs/ghostdet_medium.yaml",
    "configs/retina_ghost_320.yaml",
    "configs/retina_ghost.yaml",
    "configs/retina_mobilenet_v3_large.yaml",
    "configs/retina_mobilenet_v2.yaml",
    "configs/faster_rcnn_ghost.yaml",
    "configs/faster_rcnn_mobilenet_v3_large.yaml",
    "configs/faster_rcnn_mobilenet_v2.yaml",
)
BLOCK = re.compile(r"(<!-- table:(\S+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)

# A network, the side of its image, and the paper's parameters and multiply-adds, both in millions ("" for unknown).
Comparison = tuple[str, Callable[[], nn.Module], int, str, str]


def ghostnet_table() -> str:
    """GhostNet at every published width and its rivals, classifiers included.

    The parameters of the MobileNets are of their own papers, arXiv 1801.04381 and 1905.02244.
    """
    rows: list[Comparison] = [
        ("GhostNet 0.5", lambda: GhostNet(0.5), 224, "2.6", "42"),
        ("GhostNet 1.0", lambda: GhostNet(1.0), 224, "5.2", "141"),
        ("GhostNet 1.1", lambda: GhostNet(1.1), 224, "", "164"),
        ("GhostNet 1.3", lambda: GhostNet(1.3), 224, "7.3", "226"),
        ("MobileNetV3-Large 1.0", torchvision.models.mobilenet_v3_large, 224, "5.4", "219"),
        ("MobileNetV2 1.0", torchvision.models.mobilenet_v2, 224, "3.4", "300"),
    ]
    return _comparison(rows)


def classics_table() -> str:
    """VGG-16 and ResNet-56 on CIFAR-10, ResNet-50 on ImageNet, and their ghosts (arXiv 1911.11907)."""
    rows: list[Comparison] = [
        ("VGG-16", lambda: ghost_vgg16(ratio=1), 32, "15", "313"),
        ("Ghost-VGG-16, s=2, d=1", lambda: ghost_vgg16(kernel_size=1), 32, "7.6", "157"),
        ("Ghost-VGG-16, s=2, d=3", lambda: ghost_vgg16(), 32, "7.7", "158"),
        ("Ghost-VGG-16, s=2, d=5", lambda: ghost_vgg16(kernel_size=5), 32, "7.7", "160"),
        ("Ghost-VGG-16, s=2, d=7", lambda: ghost_vgg16(kernel_size=7), 32, "7.7", "163"),
        ("Ghost-VGG-16, s=3, d=3", lambda: ghost_vgg16(ratio=3), 32, "5.2", "107"),
        ("Ghost-VGG-16, s=4, d=3", lambda: ghost_vgg16(ratio=4), 32, "4.0", "80"),
        ("Ghost-VGG-16, s=5, d=3", lambda: ghost_vgg16(ratio=5), 32, "3.3", "65"),
        ("ResNet-56", lambda: ghost_resnet56(ratio=1), 32, "0.85", "125"),
        ("Ghost-ResNet-56, s=2, d=1", lambda: ghost_resnet56(kernel_size=1), 32, "0.43", "63"),
        ("Ghost-ResNet-56, s=2, d=3", lambda: ghost_resnet56(), 32, "0.43", "63"),
        ("ResNet-50", lambda: ghost_resnet50(ratio=1), 224, "25.6", "4100"),
        ("Ghost-ResNet-50, s=2, d=3", lambda: ghost_resnet50(), 224, "13.0", "2200"),
        ("– with a ghost classifier", lambda: ghost_resnet50(ghost_classifier=True), 224, "13.0", "2200"),
        ("Ghost-ResNet-50, s=4, d=3", lambda: ghost_resnet50(ratio=4), 224, "6.5", "1200"),
        ("– with a ghost classifier", lambda: ghost_resnet50(ratio=4, ghost_classifier=True), 224, "6.5", "1200"),
    ]
    return _comparison(rows)


def detectors_table() -> str:
    """Multiply-adds of every shipped config's backbone, neck and head at two sizes of image, for 80 classes."""
    return _detectors(CONFIGS)


TABLES: dict[str, Callable[[], str]] = {
    "ghostnet": ghostnet_table,
    "classics": classics_table,
    "detectors": detectors_table,
}


def update_tables(files: Sequence[str] = FILES) -> list[str]:
    """Rewrite what lies between the markers of these files; returns "FILE: table NAME updated/unchanged" lines.

    Raises:
        UserError: a file that is absent, or a marker that names no table or is not closed.
    """
    made: dict[str, str] = {}
    lines = []
    for file in files:
        path = Path(file)
        try:
            text = read_file(path, largest=1 << 26).decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
        names = table_names(text, file)
        for name in names:
            made.setdefault(name, TABLES[name]())
        new = BLOCK.sub(lambda found: f"{found[1]}{made[found[2]]}\n{found[4]}", text)
        if new != text:
            write_atomically(path, lambda file, new=new: file.write(new.encode()))
        state = "unchanged" if new == text else "updated"
        lines += [f"{file}: table {name} {state}" for name in names] or [f"{file}: no tables"]
    return lines


def table_names(text: str, file: str) -> list[str]:
    """Names of the tables in a file, in order. Raises UserError for an unknown or unclosed one."""
    names = [found[1] for found in BLOCK.findall(text)]
    if len(names) != text.count("<!-- table:"):
        raise UserError(f"{file}: a line <!-- table:NAME --> is not closed by a line <!-- /table -->")
    for name in names:
        if name not in TABLES:
            raise UserError(f"{file}: there is no table {name!r}; known: {', '.join(TABLES)}")
    return names


def _detectors(configs: Sequence[str]) -> str:
    cells = [_detector(config, size) for size in ((320, 320), (800, 1333)) for config in configs]
    header = ("input", "config", "parameters (M)", "backbone (GMAC)", "neck", "head", "total")
    return markdown_table((*header, "backbone's share", "memory (MB)"), cells, left=2)


@cache
def _detector(config: str, size: tuple[int, int]) -> tuple[str, ...]:
    rows = {row.part: row for row in network_costs(config, size)}
    total = rows["total"]
    return (
        f"{size[0]}x{size[1]}",
        f"`{Path(config).name}`",
        f"{total.parameters / 1e6:.2f}",
        *(f"{rows[part].macs / 1e9:.2f}" for part in ("backbone", "neck", "head", "total")),
        f"{rows['backbone'].macs / total.macs * 100:.1f} %",
        f"{total.memory / 1e6:.0f}",
    )


def _comparison(rows: Sequence[Comparison]) -> str:
    header = ("network", "input", "parameters (M)", "paper", "difference", "multiply-adds (M)", "paper", "difference")
    return markdown_table(header, [_compare(*row) for row in rows], left=1)


def _compare(name: str, build: Callable[[], nn.Module], side: int, parameters: str, macs: str) -> tuple[str, ...]:
    with torch.device("meta"):
        total = measure_cost(build().eval(), torch.zeros(1, 3, side, side))[""]
    found = total.parameters / 1e6, total.macs / 1e6
    return (
        name,
        str(side),
        *(f"{found[0]:.3f}", parameters or "–", _difference(found[0], parameters)),
        *(f"{found[1]:.1f}", macs or "–", _difference(found[1], macs)),
    )


def _difference(found: float, paper: str) -> str:
    return f"{(found / float(paper) - 1) * 100:+.1f} %" if paper else "–"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ToolParser("dev/cost_tables", __doc__, EXAMPLE)
    parser.add_argument(
        "files", nargs="*", default=[], metavar="FILE", type=existing_file, help=f"default: {' and '.join(FILES)}"
    )
    print("\n".join(update_tables(parser.parse(arguments).files or FILES)))
    return 0


if __name__ == "__main__":
    run_tool(main)
