"""Formats rows of costs as text, Markdown and CSV. Does not import torch, so that tools report mistakes quickly."""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

from detection.core.errors import UserError
from detection.core.text import markdown_table, text_table


@dataclass(frozen=True)
class CostRow:
    """The cost of one part of one network, for one image.

    Attributes:
        network: backbone name or config path.
        size: height and width of the network's input in pixels.
        part: backbone, neck, head, total, or the name of a layer.
        parameters: number of parameters.
        macs: multiply-adds.
        activations: output elements of convolutions and linear layers.
        memory: bytes that training keeps for the backward pass of one image, in float32.
    """

    network: str
    size: tuple[int, int]
    part: str
    parameters: int
    macs: int
    activations: int
    memory: int


HEADER = ("network", "input", "part", "parameters (M)", "multiply-adds (G)", "activations (M)", "memory (MB)")


def parse_size(text: str) -> tuple[int, int]:
    """'320' -> (320, 320); '800x1333' -> (800, 1333), height first; below 100 000. Raises UserError."""
    found = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text)
    if found is None:
        raise UserError(f"size {text!r} is not valid; expected: a side, like 320, or HEIGHTxWIDTH, like 800x1333")
    return int(found[1]), int(found[2] or found[1])


def format_rows(rows: Sequence[CostRow], style: str) -> str:
    """`rows` as "text" (aligned columns), "markdown", or "csv" (plain integers: single numbers and bytes)."""
    if style == "csv":
        return _csv(rows)
    cells = [
        (
            row.network,
            f"{row.size[0]}x{row.size[1]}",
            row.part,
            _number(row.parameters / 1e6, 3),
            _number(row.macs / 1e9, 3),
            _number(row.activations / 1e6, 2),
            _number(row.memory / 1e6, 1),
        )
        for row in rows
    ]
    return (markdown_table if style == "markdown" else text_table)(HEADER, cells, left=3)


def _number(value: float, decimals: int) -> str:
    # Three more decimals for small values, which would otherwise be shown as zero.
    return f"{value:.{decimals + 3 if 0 < value < 0.1 else decimals}f}"


def _csv(rows: Sequence[CostRow]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("network", "height", "width", "part", "parameters", "macs", "activations", "memory_bytes"))
    for row in rows:
        writer.writerow((row.network, *row.size, row.part, row.parameters, row.macs, row.activations, row.memory))
    return text.getvalue().rstrip("\n")
