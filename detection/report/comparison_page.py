"""Write a page that compares two runs on the same images."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from detection.core import html
from detection.core.environment import describe_environment
from detection.core.html import Album, Section
from detection.core.text import text_table
from detection.engine.resume import flat
from detection.evaluation.bootstrap import LEVEL, Difference, check_same, compare
from detection.evaluation.breakdown import KINDS
from detection.evaluation.coco_evaluator import METRICS
from detection.report import image_gallery, plots
from detection.report.run_data import RunData
from detection.report.write_report import FORMAT, checked_page_path, footer, write_json

MAX_IMAGES = 8
"""Images in each gallery."""
MAX_TABLE_ROWS = 300
"""Rows of the table of images."""
MAX_PLOT_ROWS = 30
"""Rows of the plot of differences."""


def write_comparison(
    first: RunData, second: RunData, out: str | Path, *, resamples: int, seed: int, max_bytes: int
) -> tuple[str, Path]:
    """Write the page, and its numbers as JSON beside it; returns the differences as text and the JSON path.

    Raises:
        UserError: the runs were not evaluated on the same images and objects, or a file cannot be written.
    """
    out = checked_page_path(out)
    check_same(first.analysis.matches, second.analysis.matches)
    names = _names(first, second)
    rows = compare(first.analysis.matches, second.analysis.matches, resamples=resamples, seed=seed)
    change = second.analysis.images.f1 - first.analysis.images.f1
    sections = [
        _differences(rows, names, resamples),
        _all_metrics(first, second, names),
        *_images(first, second, names, change, max_bytes),
        _configs(first, second, names),
    ]
    environment = describe_environment()
    title = f"{names[0]} against {names[1]}"
    annotations = first.annotations
    subtitle = f"{len(annotations)} images of {annotations.source}"
    html.write_page(out, title, sections, subtitle=subtitle, footer=footer(environment))
    file_names = annotations.file_names.tolist()
    content = {
        "format": FORMAT,
        "runs": list(names),
        "data": annotations.source,
        "resamples": resamples,
        "seed": seed,
        "level": LEVEL,
        "differences": [asdict(row) | {"difference": row.value, "clear": row.clear} for row in rows],
        "errors": [run.analysis.breakdown.costs for run in (first, second)],
        "images": {name: {"F1": value} for name, value in zip(file_names, change.tolist(), strict=True) if value},
        "environment": environment,
    }
    return _format_differences(rows, names), write_json(out, content)


def _names(first: RunData, second: RunData) -> tuple[str, str]:
    """Names of the runs, or their paths if the names are equal."""
    if first.name != second.name:
        return first.name, second.name
    return str(first.folder or first.detections_source), str(second.folder or second.detections_source)


def _format_differences(rows: list[Difference], names: tuple[str, str]) -> str:
    """The differences as an aligned text table."""
    cells = []
    for row in rows:
        values = [html.format_number(row.first), html.format_number(row.second), f"{row.value:+.3f}"]
        cells.append([row.name, *values, f"[{row.low:+.3f}, {row.high:+.3f}]", "*" if row.clear else ""])
    table = text_table(("", *names, "difference", f"{LEVEL:.0%} interval", ""), cells, left=1)
    return f"{table}\n* the interval does not contain zero"


def _differences(rows: list[Difference], names: tuple[str, str], resamples: int) -> Section:
    def interval(row: Difference) -> str:
        return html.MISSING if np.isnan(row.low) else f"{row.low:+.3f} to {row.high:+.3f}"

    def significance(row: Difference) -> Markup | str:
        if not row.clear:
            return html.colored("no clear difference", "faint")
        return html.colored("better", "good") if row.value > 0 else html.colored("worse", "error")

    cells = [
        [
            row.name,
            row.first,
            row.second,
            "–" if np.isnan(row.value) else f"{row.value:+.3f}",
            interval(row),
            significance(row),
        ]
        for row in rows
    ]
    header = ["", names[0], names[1], "difference", f"{LEVEL:.0%} interval", ""]
    shown = [row for row in rows if not np.isnan(row.value)][:MAX_PLOT_ROWS]
    clear = sum(row.clear for row in rows)
    return Section(
        "Differences",
        [html.row([html.table(header, cells), plots.difference_plot(shown, names)])],
        f"{names[1]} minus {names[0]}. The intervals are from {resamples} bootstrap resamples of the images. A "
        "difference is clear if its interval does not contain zero. The intervals do not cover the variation between "
        f"training seeds. {clear} of {len(rows)} differences are clear; one in {round(1 / (1 - LEVEL))} is clear by "
        "chance.",
    )


def _all_metrics(first: RunData, second: RunData, names: tuple[str, str]) -> Section:
    numbers = [run.analysis.matches.evaluation.numbers for run in (first, second)]
    rows: list[list[Any]] = [[name, numbers[0][name], numbers[1][name], _signed(numbers, name)] for name in METRICS]
    breakdowns = [run.analysis.breakdown for run in (first, second)]
    kinds = [(kind, kind.replace("_", " ")) for kind in (*KINDS, "false_positives", "false_negatives")]
    costs = [
        [name, *(f"{100 * b.costs[kind]:.1f}" for b in breakdowns), *(b.counts[kind] for b in breakdowns)]
        for kind, name in kinds
    ]
    thresholds = [
        [name, first.analysis.thresholds[k], second.analysis.thresholds[k]]
        for k, name in enumerate(first.annotations.class_names)
    ]
    return Section(
        "All metrics",
        [
            html.row(
                [
                    html.table(["", *names, "difference"], rows),
                    html.table(
                        ["AP50 points lost to", *names, *(f"count, {name}" for name in names)],
                        costs,
                    ),
                    html.table(["recommended threshold", *names], thresholds),
                ]
            )
        ],
    )


def _signed(numbers: list[dict[str, float]], name: str) -> str:
    value = numbers[1][name] - numbers[0][name]
    return html.MISSING if np.isnan(value) else f"{value:+.3f}"


def _images(
    first: RunData, second: RunData, names: tuple[str, str], change: np.ndarray, max_bytes: int
) -> list[Section]:
    """Galleries of the images whose F1 at the recommended thresholds increased and decreased most."""
    folder = second.images or first.images
    order = np.argsort(change, kind="stable")
    gained = [int(i) for i in order[::-1][:MAX_IMAGES] if change[i] > 0]
    lost = [int(i) for i in order[:MAX_IMAGES] if change[i] < 0]
    read = image_gallery.ImageReader(first.analysis, folder)
    lead = (
        f"From left to right: ground truth, {names[0]}, {names[1]}. Objects: green if {names[1]} found them, orange if "
        "it missed them. Detections: green if correct, red if wrong. Sorted by the change of the image's F1 at "
        "IoU 0.5; each run uses its own recommended thresholds."
    )
    sections = []
    for title, images in (
        (f"Largest improvements of {names[1]}", gained),
        (f"Largest deteriorations of {names[1]}", lost),
    ):
        album = Album(max_bytes // 2)
        for i in images:
            image = read(i)
            if image is None:
                continue
            panels = [
                image_gallery.draw_ground_truth(image, second.analysis, i),
                image_gallery.draw_detections(image, first.analysis, i),
                image_gallery.draw_detections(image, second.analysis, i),
            ]
            f1 = first.analysis.images.f1[i], second.analysis.images.f1[i]
            caption = f"{first.annotations.file_names[i]}: F1 {f1[0]:.2f} to {f1[1]:.2f}"
            if not album.add(image_gallery.side_by_side(panels), caption, max_side=1300):
                break
        block = album.gallery(620)
        if not images:
            block = html.note("None.")
        elif folder is None:
            block = html.note("The images were not found: set their folder with --images.")
        sections.append(Section(title, [block], lead if images else ""))
    sections.append(_image_table(first, second, names, change))
    return sections


def _image_table(first: RunData, second: RunData, names: tuple[str, str], change: np.ndarray) -> Section:
    """Table of all images whose F1 changed, largest change first."""
    order = np.argsort(-np.abs(change), kind="stable")
    order = order[change[order] != 0]
    scores = first.analysis.images, second.analysis.images
    rows = [
        [
            str(first.annotations.file_names[i]),
            f"{change[i]:+.3f}",
            *(value for run in scores for value in (float(run.f1[i]), run.right[i], run.wrong[i], run.missed[i])),
        ]
        for i in order[:MAX_TABLE_ROWS].tolist()
    ]
    header = [
        "image",
        "change of F1",
        *(f"{metric}, {n}" for n in names for metric in ("F1", "correct", "wrong", "missed")),
    ]
    more = f"; the table shows {MAX_TABLE_ROWS} of them, the JSON file all" if len(order) > MAX_TABLE_ROWS else ""
    return Section(
        "Changes per image",
        [html.details("table", html.table(header, rows)) if rows else html.note("None.")],
        f"The F1 of {len(order)} of {len(change)} images changed{more}.",
    )


def _configs(first: RunData, second: RunData, names: tuple[str, str]) -> Section:
    """Table of the config keys that differ, or of the prediction files if a run has no config."""
    if first.config is None or second.config is None:
        rows = [[name, run.detections_source] for name, run in zip(names, (first, second), strict=True)]
        return Section("Detections", [html.table(["", "detections"], rows, left=2)])
    one, two = flat(first.config.model_dump()), flat(second.config.model_dump())
    rows = [[key, str(one.get(key)), str(two.get(key))] for key in sorted({*one, *two}) if one.get(key) != two.get(key)]
    block = html.table(["key", *names], rows, left=3) if rows else html.note("The configs are the same.")
    return Section("Configs", [block], "Keys with different values.")
