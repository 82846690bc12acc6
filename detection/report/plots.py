"""The plots of a report, as HTML blocks."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from detection.core import html
from detection.evaluation.analyze import Analysis
from detection.evaluation.breakdown import KINDS
from detection.evaluation.curves import BINS
from detection.evaluation.matches import RECALLS
from detection.report.run_data import RunData

SIZE = (4.3, 2.9)
MAX_LINES = 10
"""Classes in a line plot."""
MAX_CONFUSION_CLASSES = 20


def history_plots(source: RunData) -> list[Markup]:
    """AP, losses and learning rate during training; [] if there is no history."""
    history, curves = source.history, source.curves
    steps = [record.get("step", record["epoch"]) for record in history]
    blocks = []
    if any(_values(history, "AP")):
        lines = {name: (steps, _values(history, name)) for name in ("AP", "AP50", "AP75")}
        blocks.append(_lines(lines, "AP on val", "optimizer step", marker="o", bottom=0))
    per_class: dict[str, tuple[Any, Any]] = {}
    for name in source.annotations.class_names if len(source.annotations.class_names) <= MAX_LINES else ():
        aps = [((record.get("per_class") or {}).get(name) or {}).get("AP") for record in history]
        if any(ap is not None for ap in aps):
            per_class[name] = (steps, [math.nan if ap is None else ap for ap in aps])
    if len(per_class) > 1:
        blocks.append(_lines(per_class, "AP of each class", "optimizer step", marker="o", bottom=0))
    losses = {
        tag.removeprefix("train/"): _steps_and_values(curve) for tag, curve in curves.items() if tag != "train/lr"
    }
    if not losses and any(_values(history, "loss")):
        losses = {"epoch mean": (steps, _values(history, "loss"))}
    if losses:
        blocks.append(_lines(losses, "training loss", "optimizer step", log=True))
    if "train/lr" in curves:
        blocks.append(
            _lines({"lr": _steps_and_values(curves["train/lr"])}, "learning rate", "optimizer step", bottom=0)
        )
    return blocks


def precision_plots(analysis: Analysis) -> list[Markup]:
    """Precision-recall curves at IoU 0.5, F1 over the score threshold, and AP over the IoU threshold."""
    matches = analysis.matches
    names = matches.annotations.class_names
    shown = _largest_classes(analysis)
    precision = matches.precision[0]
    known = precision[0] > -1
    lines: dict[str, tuple[Any, Any]] = {names[k]: (RECALLS, precision[:, k]) for k in shown if known[k]}
    if known.sum() > 1:
        lines["mean of all classes"] = (RECALLS, precision[:, known].mean(axis=1))
    blocks = [_lines(lines, "precision over recall, IoU 0.5", "recall", bottom=0, top=1.02, last_is_bold=True)]
    with html.plotting() as Figure:
        figure = Figure(SIZE)
        axes = figure.subplots()
        for k in shown:
            curve = analysis.curves[k]
            if curve.best is None:
                continue
            (line,) = axes.plot(curve.threshold, curve.f1, label=names[k])
            axes.plot([curve.best], [curve.f1.max()], "o", color=line.get_color(), markersize=5)
        _label_axes(axes, "F1 over score threshold, IoU 0.5 (dots: recommended)", "score threshold", 0, 1.02)
        axes.set_xlim(0, 1)
        blocks.append(html.figure(figure))
    by_iou = {"AP": (matches.thresholds, analysis.by_threshold())}
    blocks.append(_lines(by_iou, "AP over IoU threshold", "IoU threshold", marker="o", bottom=0))
    return blocks


def confusion_plot(analysis: Analysis) -> Markup:
    """The confusion matrix, colored by the share of the row; of more than 20 classes, the most confused ones."""
    matrix, names = analysis.confusion, [*analysis.matches.annotations.class_names, "background"]
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    if len(names) - 1 > MAX_CONFUSION_CLASSES:
        off = matrix[:-1, :-1] - np.diag(np.diag(matrix[:-1, :-1]))
        chosen = np.sort(np.argsort(-(off.sum(axis=0) + off.sum(axis=1)), kind="stable")[:MAX_CONFUSION_CLASSES])
        rows = [*chosen.tolist(), len(names) - 1]
        matrix, share, names = matrix[np.ix_(rows, rows)], share[np.ix_(rows, rows)], [names[i] for i in rows]
    side = 1.6 + 0.42 * len(names)
    with html.plotting() as Figure:
        figure = Figure((side + 0.6, side))
        axes = figure.subplots()
        axes.grid(False)
        axes.pcolormesh(share, cmap=_transparent_colormap(), vmin=0, vmax=1)
        centers = np.arange(len(names)) + 0.5
        axes.set_xticks(centers, [*map(_shorten, names[:-1]), "missed"], rotation=60, ha="right")
        axes.set_yticks(centers, [*map(_shorten, names)])
        axes.invert_yaxis()
        axes.set_xlabel("predicted")
        axes.set_ylabel("ground truth")
        for (i, j), count in np.ndenumerate(matrix):
            if count:
                axes.text(j + 0.5, i + 0.5, str(count), ha="center", va="center", fontsize=8)
        return html.figure(figure)


def error_plot(analysis: Analysis) -> Markup:
    """AP50 lost to each type of error (`detection.evaluation.breakdown`)."""
    costs = [100 * analysis.breakdown.costs[kind] for kind in KINDS]
    with html.plotting() as Figure:
        figure = Figure((5.2, 2.3))
        axes = figure.subplots()
        axes.barh(KINDS, costs, color=html.PALETTE[: len(KINDS)])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        for i, cost in enumerate(costs):
            axes.annotate(f"{cost:.1f}", (max(cost, 0), i), (4, 0), textcoords="offset points", va="center")
        axes.set_xlabel("AP50 points lost")
        axes.set_xlim(0, max(1.0, 1.15 * max(costs)))
        return html.figure(figure)


def calibration_plot(analysis: Analysis) -> Markup:
    """Precision over the score, and the number of detections."""
    calibration = analysis.calibration
    known = calibration.count > 0
    with html.plotting() as Figure:
        figure = Figure((4.3, 3.6))
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        bin_centers = (np.arange(BINS) + 0.5) / BINS
        upper.bar(
            bin_centers[known],
            calibration.precision[known],
            width=0.9 / BINS,
            color=html.PALETTE[0],
            label="precision (IoU 0.5)",
        )
        upper.plot([0, 1], [0, 1], linestyle="--", color=html.TEXT_COLOR, linewidth=1, label="perfectly calibrated")
        upper.set_ylim(0, 1)
        upper.set_ylabel("precision")
        upper.legend()
        lower.bar(bin_centers[known], calibration.count[known], width=0.9 / BINS, color=html.PALETTE[-2])
        _log_scale(lower)
        lower.set_ylabel("detections")
        lower.set_xlabel("score")
        lower.set_xlim(0, 1)
        return html.figure(figure)


def difference_plot(rows: Sequence[Any], names: tuple[str, str]) -> Markup:
    """Differences (`bootstrap.Difference`) with their intervals, in points."""
    with html.plotting() as Figure:
        figure = Figure((5.6, 0.9 + 0.27 * len(rows)))
        axes = figure.subplots()
        for i, row in enumerate(rows):
            color = html.PALETTE[8] if not row.clear else html.PALETTE[2] if row.value > 0 else html.PALETTE[6]
            axes.plot([100 * row.low, 100 * row.high], [i, i], color=color, linewidth=2.5)
            axes.plot([100 * row.value], [i], "o", color=color, markersize=5)
        axes.axvline(0, color=html.TEXT_COLOR, linewidth=0.8)
        axes.set_yticks(range(len(rows)), [_shorten(row.name, 28) for row in rows])
        axes.invert_yaxis()
        axes.set_xlabel(f"points; positive: {_shorten(names[1], 24)} is better")
        return html.figure(figure)


def _lines(
    lines: dict[str, tuple[Any, Any]],
    title: str,
    xlabel: str,
    *,
    marker: str = "",
    log: bool = False,
    bottom: float | None = None,
    top: float | None = None,
    last_is_bold: bool = False,
) -> Markup:
    """A plot of lines (name -> x, y)."""
    with html.plotting() as Figure:
        figure = Figure(SIZE)
        axes = figure.subplots()
        for i, (name, (x, y)) in enumerate(lines.items()):
            bold = last_is_bold and len(lines) > 1 and i == len(lines) - 1
            style: dict[str, Any] = {"color": html.TEXT_COLOR, "linewidth": 2.2} if bold else {}
            axes.plot(x, y, label=_shorten(name, 24), marker=marker, markersize=3, **style)
        if log:
            _log_scale(axes)
        _label_axes(axes, title, xlabel, bottom, top)
        return html.figure(figure)


def _log_scale(axes: Any) -> None:
    """Set a logarithmic y axis with plain numbers; the default labels are formulas, which are not parsed here."""
    # matplotlib takes a second to import.
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _label_axes(axes: Any, title: str, xlabel: str, bottom: float | None, top: float | None) -> None:
    axes.set_title(title, loc="left")
    axes.set_xlabel(xlabel)
    axes.set_ylim(bottom=bottom, top=top)
    if len(axes.lines) > 1:
        axes.legend()


def _largest_classes(analysis: Analysis) -> list[int]:
    """Indices of the at most `MAX_LINES` classes with the most objects, ascending."""
    boxes = [boxes for *_, boxes in analysis.matches.evaluation.per_class]
    chosen = np.argsort([-count for count in boxes], kind="stable")[:MAX_LINES]
    return sorted(i for i in chosen.tolist() if boxes[i])


def _transparent_colormap() -> Any:
    """Colormap from transparent to the first color of the palette, for white and black backgrounds."""
    # matplotlib takes a second to import.
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    return LinearSegmentedColormap.from_list(
        "transparent", [(*to_rgb(html.PALETTE[0]), 0.0), (*to_rgb(html.PALETTE[0]), 0.75)]
    )


def _values(history: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [math.nan if record.get(key) is None else float(record[key]) for record in history]


def _steps_and_values(curve: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in curve], [value for _, value in curve]


def _shorten(name: str, length: int = 18) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
