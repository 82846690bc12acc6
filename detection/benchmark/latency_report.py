"""Formats the results of `detection.benchmark.latency` as text, Markdown and CSV. Does not import torch."""

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from detection.core.errors import UserError
from detection.core.text import markdown_table, text_table


@dataclass(frozen=True)
class LatencyRow:
    """One network in one backend at one batch size.

    Attributes:
        network: as given by the user.
        backend: eager, channels_last, compile, cuda_graph, onnxruntime, openvino, torchscript or torch_export.
        size: height and width of the network's input in pixels; None if unknown.
        seconds: of each timed call, in order; empty if it could not be measured, see `reason`.
        boxes: detections per image; None for an ONNX file of another program.
        memory: peak growth of the process in bytes, see `detection.benchmark.memory_growth`.
        file_bytes: size of the file.
        parameters, macs: number of parameters, and multiply-adds for one image; None for an ONNX file of another
            program.
        ap: COCO AP in [0, 1].
    """

    network: str
    backend: str
    size: tuple[int, int] | None
    batch: int
    seconds: tuple[float, ...] = ()
    boxes: float | None = None
    memory: int | None = None
    file_bytes: int | None = None
    parameters: int | None = None
    macs: int | None = None
    ap: float | None = None
    reason: str = ""

    @property
    def median(self) -> float | None:
        """Median seconds of a call with the whole batch."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def p95(self) -> float | None:
        """95th percentile of the seconds of a call, interpolated."""
        return float(np.percentile(self.seconds, 95)) if self.seconds else None

    @property
    def throughput(self) -> float | None:
        """Images per second, from the median."""
        return None if self.median is None else self.batch / self.median


@dataclass(frozen=True)
class LatencyReport:
    """Rows and the environment of the measurement.

    Attributes:
        environment: name -> value: hardware, threads, versions, seed, …
        remarks: sentences about how the networks were created.
    """

    rows: tuple[LatencyRow, ...]
    environment: dict[str, str]
    remarks: tuple[str, ...] = ()

    def speedups(self) -> list[float | None]:
        """The speed of each row relative to the first measured row of the same batch."""
        first: dict[int, float] = {}
        for row in self.rows:
            if row.median is not None:
                first.setdefault(row.batch, row.median)
        return [None if row.median is None else first[row.batch] / row.median for row in self.rows]

    def format(self, style: str) -> str:
        """ "text" (aligned columns) or "markdown", with environment and remarks; "csv" (plain seconds and bytes)."""
        if style == "csv":
            return self._csv()
        # Columns without any value are left out.
        lines = [_cells(row, speedup) for row, speedup in zip(self.rows, self.speedups(), strict=True)]
        shown = [i for i in range(len(HEADER)) if i < LEFT or any(line[i] != UNKNOWN for line in lines)]
        header, cells = [HEADER[i] for i in shown], [[line[i] for i in shown] for line in lines]
        reasons = {f"{row.network}, {row.backend}: not measured: {row.reason}": None for row in self.rows if row.reason}
        notes = [*self.remarks, *reasons]
        if style == "markdown":
            above = [f"* {name}: {value}" for name, value in self.environment.items()]
            below = [f"* {note}" for note in notes]
            table = markdown_table(header, cells, left=LEFT)
        else:
            width = max(map(len, self.environment), default=0)
            above = [f"{name:<{width}}  {value}" for name, value in self.environment.items()]
            below = notes
            table = text_table(header, cells, left=LEFT)
        return "\n\n".join(block for block in ("\n".join(above), table, "\n".join(below)) if block)

    def _csv(self) -> str:
        """Each line is complete by itself: it includes the environment."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow((*CSV_HEADER, *self.environment))
        for row, speedup in zip(self.rows, self.speedups(), strict=True):
            height, width = row.size or (None, None)
            values = (
                *(row.network, row.backend, height, width, row.batch, len(row.seconds), row.median, row.p95),
                *(row.throughput, speedup, row.boxes, row.memory, row.file_bytes, row.parameters, row.macs, row.ap),
                row.reason,
            )
            writer.writerow("" if value is None else value for value in (*values, *self.environment.values()))
        return text.getvalue().rstrip("\n")


HEADER = (
    *("network", "backend", "input", "batch", "median (ms)", "p95 (ms)", "images/s", "times as fast", "boxes"),
    *("memory (MB)", "file (MB)", "parameters (M)", "multiply-adds (G)", "AP"),
)
LEFT = 3
CSV_HEADER = (
    *("network", "backend", "height", "width", "batch", "runs", "median_s", "p95_s", "images_per_s", "times_as_fast"),
    *("boxes", "memory_bytes", "file_bytes", "parameters", "macs", "ap", "not_measured_because"),
)
UNKNOWN = "–"


def _cells(row: LatencyRow, speedup: float | None) -> list[str]:
    return [
        row.network,
        row.backend,
        UNKNOWN if row.size is None else f"{row.size[0]}x{row.size[1]}",
        str(row.batch),
        _milliseconds(row.median),
        _milliseconds(row.p95),
        _number(row.throughput, 1, 1),
        _number(speedup, 1, 2),
        _number(row.boxes, 1, 0),
        _number(row.memory, 1e6, 0),
        _number(row.file_bytes, 1e6, 1),
        _number(row.parameters, 1e6, 2),
        _number(row.macs, 1e9, 2),
        _number(row.ap, 1, 3),
    ]


def _milliseconds(seconds: float | None) -> str:
    return _number(seconds, 1e-3, 2 if seconds is not None and seconds < 0.01 else 1)


def _number(value: float | None, unit: float, decimals: int) -> str:
    return UNKNOWN if value is None else f"{value / unit:.{decimals}f}"


def parse_aps(texts: Sequence[str]) -> dict[str, float]:
    """['best.pt=0.5'] -> {'best.pt': 0.5}. Raises UserError if a text is not NAME=AP with AP in [0, 1]."""
    aps = {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        try:
            ap = float(value)
        except ValueError:
            ap = -1.0
        if not equals or not name or not 0 <= ap <= 1:
            raise UserError(f"--ap {text!r} is not of the form NETWORK=AP with AP from 0 to 1, like runs/x/best.pt=0.5")
        aps[name] = ap
    return aps
