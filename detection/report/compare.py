"""The page about the difference between two runs on the same images."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from detection.core import html
from detection.core.environment import describe_environment
from detection.core.html import Album, Section
from detection.evaluation.bootstrap import LEVEL, Difference, check_same, compare
from detection.evaluation.breakdown import KINDS
from detection.evaluation.coco_evaluator import METRICS
from detection.report import image_gallery, plots
from detection.report.run_data import Source
from detection.report.write_report import FORMAT, footer, output_path, write_json

IMAGES = 8
ROWS = 300
"""Of the table of images."""
PLOTTED = 30
"""Rows of the plot of differences."""


def write_comparison(
    first: Source, second: Source, out: str | Path, *, resamples: int, seed: int, max_bytes: int
) -> tuple[str, Path]:
    """Write the page and, beside it, its numbers; returns the differences as text, and the path of the latter.

    Raises:
        UserError: the two are not about the same images and objects; a file cannot be written.
    """
    out = output_path(out)
    check_same(first.analysis.matches, second.analysis.matches)
    names = _names(first, second)
    rows = compare(first.analysis.matches, second.analysis.matches, resamples=resamples, seed=seed)
    change = second.analysis.images.f1 - first.analysis.images.f1
    sections = [
        _differences(rows, names, resamples),
        _others(first, second, names),
        *_images(first, second, names, change, max_bytes),
        _configs(first, second, names),
    ]
    environment = describe_environment()
    title = f"{names[0]} against {names[1]}"
    index = first.index
    subtitle = f"{len(index)} images of {index.source}"
    html.write_page(out, title, sections, subtitle=subtitle, footer=footer(environment))
    file_names = index.file_names.tolist()
    content = {
        "format": FORMAT,
        "runs": list(names),
        "data": index.source,
        "resamples": resamples,
        "seed": seed,
        "level": LEVEL,
        "differences": [asdict(row) | {"difference": row.value, "clear": row.clear} for row in rows],
        "errors": [run.analysis.breakdown.costs for run in (first, second)],
        "images": {name: {"F1": value} for name, value in zip(file_names, change.tolist(), strict=True) if value},
        "environment": environment,
    }
    return _text(rows, names), write_json(out, content)


def _names(first: Source, second: Source) -> tuple[str, str]:
    """Names that differ."""
    if first.name != second.name:
        return first.name, second.name
    return str(first.folder or first.came_from), str(second.folder or second.came_from)


def _text(rows: list[Difference], names: tuple[str, str]) -> str:
    width = max(len(row.name) for row in rows)
    lines = [f"{'':<{width}}  {names[0]}  {names[1]}  difference, {LEVEL:.0%} interval"]
    for row in rows:
        values = [f"{html.number(v):>{len(n)}}" for v, n in zip((row.first, row.second), names, strict=True)]
        interval = f"{row.value:+.3f}  [{row.low:+.3f}, {row.high:+.3f}]"
        lines.append(f"{row.name:<{width}}  {'  '.join(values)}  {interval}{'  *' if row.clear else ''}")
    return "\n".join([*lines, "* zero is outside of the interval"])


def _differences(rows: list[Difference], names: tuple[str, str], resamples: int) -> Section:
    def interval(row: Difference) -> str:
        return html.UNKNOWN if np.isnan(row.low) else f"{row.low:+.3f} to {row.high:+.3f}"

    def verdict(row: Difference) -> Markup | str:
        if not row.clear:
            return html.marked("no clear difference", "faint")
        return html.marked("better", "good") if row.value > 0 else html.marked("worse", "error")

    cells = [
        [
            row.name,
            row.first,
            row.second,
            "–" if np.isnan(row.value) else f"{row.value:+.3f}",
            interval(row),
            verdict(row),
        ]
        for row in rows
    ]
    header = ["", names[0], names[1], "difference", f"{LEVEL:.0%} interval", ""]
    shown = [row for row in rows if not np.isnan(row.value)][:PLOTTED]
    clear = sum(row.clear for row in rows)
    return Section(
        "Differences",
        [html.plots([html.table(header, cells), plots.difference_plot(shown, names)])],
        f"{names[1]} less {names[0]}. The intervals are of {resamples} bootstrap resamples of the images: where zero "
        "is within, other images of the same kind might as well have shown the opposite. Chance in the training itself "
        f"(seeds) is not in them. {clear} of {len(rows)} differences are clear; of many rows one in "
        f"{round(1 / (1 - LEVEL))} looks clear by chance.",
    )


def _others(first: Source, second: Source, names: tuple[str, str]) -> Section:
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
        for k, name in enumerate(first.index.class_names)
    ]
    return Section(
        "All numbers",
        [
            html.plots(
                [
                    html.table(["", *names, "difference"], rows),
                    html.table(
                        ["AP50 points lost by", *names, *(f"how many, {name}" for name in names)],
                        costs,
                    ),
                    html.table(["recommended threshold", *names], thresholds),
                ]
            )
        ],
    )


def _signed(numbers: list[dict[str, float]], name: str) -> str:
    value = numbers[1][name] - numbers[0][name]
    return html.UNKNOWN if np.isnan(value) else f"{value:+.3f}"


def _images(first: Source, second: Source, names: tuple[str, str], change: np.ndarray, max_bytes: int) -> list[Section]:
    """Those that gained and lost most, by F1 at each run's own thresholds."""
    folder = second.images or first.images
    order = np.argsort(change, kind="stable")
    gained = [int(i) for i in order[::-1][:IMAGES] if change[i] > 0]
    lost = [int(i) for i in order[:IMAGES] if change[i] < 0]
    read = image_gallery.ImageReader(first.analysis, folder)
    lead = (
        f"Truth, {names[0]}, {names[1]}. In the truth green: found by {names[1]}, orange: missed by it; in the others "
        "green: right, red: wrong. By the change of the image's F1 at IoU 0.5, each run at its own recommended "
        "thresholds."
    )
    sections = []
    for title, images in ((f"Images that {names[1]} gained most in", gained), ("Images that it lost most in", lost)):
        album = Album(max_bytes // 2)
        for i in images:
            image = read(i)
            if image is None:
                continue
            panels = [
                image_gallery.draw_truth(image, second.analysis, i),
                image_gallery.draw_found(image, first.analysis, i),
                image_gallery.draw_found(image, second.analysis, i),
            ]
            f1 = first.analysis.images.f1[i], second.analysis.images.f1[i]
            caption = f"{first.index.file_names[i]}: F1 {f1[0]:.2f} to {f1[1]:.2f}"
            if not album.add(image_gallery.side_by_side(panels), caption, max_side=1300):
                break
        block = album.gallery(620)
        if not images:
            block = html.note("None.")
        elif folder is None:
            block = html.note("The images were not to be found: name their folder with --images.")
        sections.append(Section(title, [block], lead if images else ""))
    sections.append(_image_table(first, second, names, change))
    return sections


def _image_table(first: Source, second: Source, names: tuple[str, str], change: np.ndarray) -> Section:
    """Image by image, those that changed most first."""
    order = np.argsort(-np.abs(change), kind="stable")
    order = order[change[order] != 0]
    scores = first.analysis.images, second.analysis.images
    rows = [
        [
            str(first.index.file_names[i]),
            f"{change[i]:+.3f}",
            *(value for run in scores for value in (float(run.f1[i]), run.right[i], run.wrong[i], run.missed[i])),
        ]
        for i in order[:ROWS].tolist()
    ]
    header = ["image", "change of F1", *(f"{what}, {n}" for n in names for what in ("F1", "right", "wrong", "missed"))]
    more = f"; the first {ROWS} are shown, the JSON file has all" if len(order) > ROWS else ""
    return Section(
        "Image by image",
        [html.details("The table", html.table(header, rows)) if rows else html.note("None.")],
        f"{len(order)} of {len(change)} images changed{more}.",
    )


def _configs(first: Source, second: Source, names: tuple[str, str]) -> Section:
    """Keys of the configs that differ."""
    if first.config is None or second.config is None:
        rows = [[name, run.came_from] for name, run in zip(names, (first, second), strict=True)]
        return Section("Made of", [html.table(["", "detections"], rows, left=2)])
    from detection.engine.resume import flat

    one, two = flat(first.config.model_dump()), flat(second.config.model_dump())
    rows = [[key, str(one.get(key)), str(two.get(key))] for key in sorted({*one, *two}) if one.get(key) != two.get(key)]
    block = html.table(["key", *names], rows, left=3) if rows else html.note("The configs are the same.")
    return Section("Configs", [block], "Keys that differ.")
