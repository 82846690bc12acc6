"""What `detection.benchmark.latency` measured, as text, Markdown and CSV. Imports no torch."""

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from detection.core.errors import UserError
from detection.core.text import aligned, markdown


@dataclass(frozen=True)
class LatencyRow:
    """One network in one backend at one batch.

    Attributes:
        network: as the user named it.
        backend: eager, channels_last, compile, cuda_graph, onnxruntime, openvino, torchscript or torch_export.
        size: height and width in pixels of the image that the network computes on; None where not known.
        seconds: of each timed call, in order; none where it could not be measured, see `reason`.
        boxes: that came out, an image; None of a foreign file.
        memory: bytes that the process grew by, at most, see `detection.benchmark.memory_growth`.
        file_bytes: of the file that is run.
        parameters, macs: learned numbers, and multiply-adds of an image; None of a foreign file.
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
        """Seconds of a call, all images of its batch together."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def p95(self) -> float | None:
        """Seconds that 95 % of the calls keep below, interpolated."""
        return float(np.percentile(self.seconds, 95)) if self.seconds else None

    @property
    def throughput(self) -> float | None:
        """Images a second, of the median."""
        return None if self.median is None else self.batch / self.median


@dataclass(frozen=True)
class LatencyReport:
    """Rows, and what has to be known to judge them.

    Attributes:
        environment: name -> value: hardware, threads, versions, seed, …
        remarks: sentences about how the networks of the rows were had.
    """

    rows: tuple[LatencyRow, ...]
    environment: dict[str, str]
    remarks: tuple[str, ...] = ()

    def speedups(self) -> list[float | None]:
        """How many times as fast as the first measured row of the same batch each row is."""
        first: dict[int, float] = {}
        for row in self.rows:
            if row.median is not None:
                first.setdefault(row.batch, row.median)
        return [None if row.median is None else first[row.batch] / row.median for row in self.rows]

    def format(self, style: str) -> str:
        """ "text" (aligned columns) or "markdown", with environment and remarks; "csv" (plain seconds and bytes)."""
        if style == "csv":
            return self._csv()
        # A column in which nothing is known tells nothing.
        lines = [_cells(row, speedup) for row, speedup in zip(self.rows, self.speedups(), strict=True)]
        shown = [i for i in range(len(HEADER)) if i < LEFT or any(line[i] != UNKNOWN for line in lines)]
        header, cells = [HEADER[i] for i in shown], [[line[i] for i in shown] for line in lines]
        reasons = {f"{row.network}, {row.backend}: not measured: {row.reason}": None for row in self.rows if row.reason}
        notes = [*self.remarks, *reasons]
        if style == "markdown":
            above = [f"* {name}: {value}" for name, value in self.environment.items()]
            below = [f"* {note}" for note in notes]
            table = markdown(header, cells, left=LEFT)
        else:
            width = max(map(len, self.environment), default=0)
            above = [f"{name:<{width}}  {value}" for name, value in self.environment.items()]
            below = notes
            table = aligned(header, cells, left=LEFT)
        return "\n\n".join(block for block in ("\n".join(above), table, "\n".join(below)) if block)

    def _csv(self) -> str:
        """Each line can be read alone: it carries the environment, too."""
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
    """['best.pt=0.5'] -> {'best.pt': 0.5}. Raises UserError where it is not NAME=AP with AP in [0, 1]."""
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
