"""Plots AP against latency."""

import io
from collections.abc import Sequence
from pathlib import Path

from detection.benchmark.latency_report import LatencyReport, LatencyRow
from detection.benchmark.settings import Settings, kind_of
from detection.core.errors import UserError
from detection.core.outputs import write_output

MARKERS = "osD^vPX*<>"


NO_AP = "--plot needs an AP: best.pt holds its own; give the AP of other networks as --ap NETWORK=AP"


def check_plot(path: str | Path, settings: Settings) -> None:
    """Raises UserError if the plot of a benchmark with these settings could not be drawn or written."""
    if not settings.aps and not any(kind_of(target) == "checkpoint" for target in settings.targets):
        raise UserError(NO_AP)
    path = Path(path)
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UserError(f"--plot {path}: the name must end in .png, .svg or .pdf")
    if not path.parent.is_dir():
        raise UserError(f"--plot {path}: there is no folder {path.parent}")


def plot_latency(report: LatencyReport, path: str | Path) -> None:
    """Plot a point for each row of the smallest batch with a known AP; the suffix of `path` determines the format.

    Each network has a color, each backend a marker. The latency axis is logarithmic, because ratios matter.

    Raises:
        UserError: no row has an AP, or the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    rows = plotted_rows(report.rows)
    if not rows:
        raise UserError(NO_AP)
    networks = list(dict.fromkeys(row.network for row in rows))
    backends = list(dict.fromkeys(row.backend for row in rows))
    # Not pyplot, which has global state and may open windows.
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for row in rows:
        axes.plot(
            [_milliseconds(row)],
            [_ap(row)],
            marker=MARKERS[backends.index(row.backend) % len(MARKERS)],
            color=f"C{networks.index(row.network) % 10}",
            markersize=8,
            linestyle="none",
        )
    for network in networks:
        own = sorted((row for row in rows if row.network == network), key=_milliseconds)
        color = f"C{networks.index(network) % 10}"
        axes.plot([_milliseconds(row) for row in own], [_ap(row) for row in own], color=color, alpha=0.4, zorder=0)
        # Labels of neighboring points are alternately above and below the line.
        for i, row in enumerate(own):
            axes.annotate(
                f"{row.backend}\n{_milliseconds(row):.3g} ms",
                (_milliseconds(row), row.ap),
                xytext=(0, 9 if i % 2 == 0 else -9),
                textcoords="offset points",
                ha="center",
                va="bottom" if i % 2 == 0 else "top",
                fontsize=8,
            )
        axes.plot([], [], color=color, marker="o", label=network)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.15, y=0.3)
    axes.set_xlabel(f"median latency at batch {rows[0].batch} (ms, logarithmic)")
    axes.set_ylabel("AP")
    axes.grid(True, which="both", alpha=0.25)
    # Outside the axes, so that it does not cover points.
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    hardware, threads = report.environment.get("hardware", ""), report.environment.get("threads", "")
    axes.set_title(f"{hardware}; threads: {threads}", fontsize=9)
    image = io.BytesIO()
    figure.savefig(image, format=Path(path).suffix[1:].lower())
    write_output(Path(path), lambda file: file.write(image.getvalue()))


def plotted_rows(rows: Sequence[LatencyRow]) -> list[LatencyRow]:
    """The measured rows of the smallest batch with a known AP."""
    known = [row for row in rows if row.median is not None and row.ap is not None]
    smallest = min((row.batch for row in known), default=0)
    return [row for row in known if row.batch == smallest]


def _milliseconds(row: LatencyRow) -> float:
    assert row.median is not None
    return row.median * 1e3


def _ap(row: LatencyRow) -> float:
    assert row.ap is not None
    return row.ap
