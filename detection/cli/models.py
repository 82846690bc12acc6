"""List the detectors that come with the toolkit: classes, AP, size and cost."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detection.cli.arguments import ToolParser
from detection.core.text import text_table
from detection.zoo.names import detector_names, find_detector

EXAMPLE = """\
examples:
  python tools/models.py --json                            (with the names of all classes)
  python tools/detect.py ghostdet_small photo.jpg          (a name in place of a checkpoint)
  python tools/train.py CONFIG model.weights=ghostdet_small
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ToolParser("models", __doc__, EXAMPLE)
    parser.add_argument("--json", action="store_true", help="print JSON, with the names of all classes")
    args = parser.parse(arguments)

    from detection.weights_file import read_metadata

    rows = []
    for name in detector_names():
        path = Path(find_detector(name))
        content = read_metadata(path)
        rows.append({"name": name, "file": str(path), "classes": content["classes"]["names"], **content["numbers"]})
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        print(_table(rows) if rows else "no detectors come with this version")
    return 0


def _table(rows: Sequence[dict[str, Any]]) -> str:
    datasets = list(dict.fromkeys(dataset for row in rows for dataset in row["evaluations"]))
    header = [
        "name",
        "classes",
        "pixels",
        "MB",
        "M parameters",
        "G multiply-adds",
        *(f"AP {name}" for name in datasets),
    ]
    cells = [
        [
            row["name"],
            str(len(row["classes"])),
            str(row["size"]),
            f"{os.path.getsize(row['file']) / 1e6:.1f}",
            f"{row['parameters'] / 1e6:.2f}",
            f"{row['multiply_adds'] / 1e9:.2f}",
            *(f"{row['evaluations'][name]['AP']:.3f}" if name in row["evaluations"] else "" for name in datasets),
        ]
        for row in rows
    ]
    return text_table(header, cells, 1)
