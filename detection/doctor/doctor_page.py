"""A `Report` as one HTML page."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup

from detection.core import html
from detection.doctor.class_checks import boxes_per_image
from detection.doctor.contact_sheets import example_sheet, offender_sheet
from detection.doctor.examine import Report
from detection.doctor.findings import Finding
from detection.doctor.rules import KINDS
from detection.doctor.stats import box_sides, centres, sides_at_input, statistics
from detection.doctor.suitability import SMALL, table_of_inputs
from detection.doctor.text_report import DECODED, describe_example, memory_line

COLORS = {"error": "error", "warning": "warning", "note": "faint"}
MOST_CLASSES = 30
"""Bars of a plot; a table has them all."""


def write_doctor_page(report: Report, path: Path) -> None:
    """Write it. Raises UserError where it cannot be written."""
    # Offenders first: of two sets with many findings, examples of good images are what can be done without.
    offenders = html.Album(max_bytes=7_000_000)
    findings = _findings(report, offenders)
    sections = [
        html.Section("Summary", _summary(report)),
        html.Section("Findings", findings or [html.note("Nothing was found.", "good")]),
        html.Section("Images", _images(report), "From all over each set, with the boxes that training sees."),
        html.Section("Classes", _classes(report)),
        html.Section("Boxes", _boxes(report)),
        *([html.Section("Anchors and input size", _anchors(report))] if report.suitability is not None else []),
    ]
    sources = ", ".join(checked.original.source for checked in report.sets)
    html.write_page(path, "The data, examined", sections, subtitle=sources, footer="tools/check_data.py")


def _summary(report: Report) -> list[Markup]:
    counts = report.counts()
    verdict = (
        html.note(f"{counts['error']} kinds of errors: mend them before training.", "error")
        if counts["error"]
        else html.note("No errors.", "good")
    )
    blocks = [verdict]
    for checked in report.sets:
        numbers = statistics(checked.selected)
        each = numbers["boxes_per_image"]
        blocks.append(html.heading(f"{checked.original.split}: {numbers['source']}"))
        blocks.append(
            html.cards(
                [
                    ("images", numbers["images"], f"{numbers['images_without_boxes']} without boxes"),
                    ("boxes", numbers["boxes"], f"and {numbers['crowd']} crowd regions" if numbers["crowd"] else ""),
                    ("classes", len(numbers["classes"])),
                    ("boxes an image", f"{each['mean']:.1f}", f"at most {each['most']}"),
                    ("small", f"{numbers['small']:.0%}", "under 32² pixels"),
                    ("medium", f"{numbers['medium']:.0%}", "under 96²"),
                    ("large", f"{numbers['large']:.0%}", "96² and above"),
                ]
            )
        )
    blocks.append(html.paragraph(f"Images: {DECODED[report.read_images]}."))
    if report.findings:
        rows = [
            [html.marked(f.severity, COLORS[f.severity]), f.split, f.code, f"{f.count or 'no'} {_title(f)}"]
            for f in report.findings
        ]
        blocks.append(html.table(["severity", "set", "code", "what"], rows, left=4))
    return blocks


def _title(found: Finding) -> str:
    return f"{KINDS[found.code].title}{f': {found.detail}' if found.detail else ''}"


def _findings(report: Report, album: html.Album) -> list[Markup]:
    blocks = []
    for found in report.findings:
        blocks.append(html.heading(f"{found.code} ({found.split})"))
        blocks.append(html.note(f"{found.severity}: {found.message}", {"note": ""}.get(found.severity, found.severity)))
        blocks.append(html.paragraph(f"What to do: {found.remedy}."))
        # A sheet of each note would bury those of the errors.
        if (
            found.severity != "note" or found.code in ("image-alike", "box-two-classes", "box-aspect")
        ) and offender_sheet(report, found, album):
            blocks.append(album.gallery())
        if found.examples:
            lines = "\n".join(describe_example(example) for example in found.examples)
            more = f" of {found.count}" if found.count > len(found.examples) else ""
            blocks.append(html.details(f"{len(found.examples)} examples{more}", html.code(lines)))
    return blocks


def _images(report: Report) -> list[Markup]:
    blocks = []
    for checked in report.sets:
        album = html.Album(max_bytes=1_500_000)
        example_sheet(checked, album)
        blocks += [html.heading(checked.original.split), album.gallery()]
    return blocks


def _classes(report: Report) -> list[Markup]:
    names: dict[str, list[int]] = {}
    for i, checked in enumerate(report.sets):
        for entry in statistics(checked.selected)["classes"]:
            row = names.setdefault(entry["name"], [0] * 2 * len(report.sets))
            row[2 * i] += entry["boxes"]
            row[2 * i + 1] += entry["images"]
    order = sorted(names, key=lambda name: -names[name][0])
    shown = order[:MOST_CLASSES]
    blocks = []
    if shown:
        with html.plotting() as Figure:
            drawn = Figure((9, max(1.6, 0.5 + 0.17 * len(shown) * len(report.sets))))
            axes = drawn.subplots()
            height = 0.8 / len(report.sets)
            for i, checked in enumerate(report.sets):
                places = np.arange(len(shown)) + i * height
                counts = [names[name][2 * i] for name in shown]
                axes.barh(places, counts, height, label=checked.original.split)
            axes.set_yticks(np.arange(len(shown)) + 0.4 - height / 2, [_cut(name) for name in shown])
            axes.set_ylim(len(shown) - 0.1, -0.5)
            axes.grid(False, axis="y")
            largest = max(names[name][0] for name in shown)
            if largest > 50 * max(1, min(names[name][0] for name in shown)):
                axes.set_xscale("symlog", linthresh=10)
            axes.set_xlabel("boxes")
            axes.legend()
            blocks.append(html.figure(drawn))
    header = ["class"]
    for checked in report.sets:
        header += [f"boxes, {checked.original.split}", f"images, {checked.original.split}"]
    table = html.table(header, [[name, *names[name]] for name in order])
    blocks.append(table if len(order) <= 12 else html.details(f"all {len(order)} classes as a table", table))
    return blocks


def _cut(name: str) -> str:
    return name if len(name) <= 28 else f"{name[:27]}…"


def _boxes(report: Report) -> list[Markup]:
    sets = [(checked.original.split, checked.selected) for checked in report.sets]
    sides = [(split, box_sides(entries)) for split, entries in sets]
    if not any(len(values) for _, values in sides):
        return [html.note("There is no box to draw.", "error")]
    root = [(split, np.sqrt(values.prod(axis=1))) for split, values in sides]
    aspect = [(split, values[:, 0] / values[:, 1]) for split, values in sides]
    most = max(int(boxes_per_image(entries).max(initial=0)) for _, entries in sets)
    edges = np.arange(min(most, 60) + 2) - 0.5
    each = [(split, np.minimum(boxes_per_image(entries), 60)) for split, entries in sets]
    widths = [
        (split, np.sqrt(entries.sizes[(entries.sizes > 0).all(axis=1)].astype(float).prod(axis=1)))
        for split, entries in sets
    ]
    plots = [
        _histogram(root, "side of a box: root of its area (pixels of the image)", log=2),
        _histogram(aspect, "width / height of a box", log=2),
        _histogram(each, "boxes in an image" + (" (60: and more)" if most > 60 else ""), edges=edges),
        _histogram(widths, "side of an image: root of its area (pixels)"),
    ]
    plots += [_places(split, centres(entries)) for split, entries in sets if entries.valid.any()]
    return [html.plots(plots)]


def _histogram(
    values: Sequence[tuple[str, np.ndarray]], label: str, *, log: int | None = None, edges: np.ndarray | None = None
) -> Markup:
    """Shares of each set in the same bins."""
    together = np.concatenate([numbers for _, numbers in values])
    if edges is None:
        low, high = float(together.min()), float(together.max())
        if log:
            low, high = np.floor(np.log2(low) * 2) / 2, np.ceil(np.log2(high) * 2) / 2
            edges = 2 ** np.arange(low, max(high, low + 0.5) + 0.01, 0.25)
        else:
            edges = np.linspace(low, max(high, low + 1), 30)
    with html.plotting() as Figure:
        drawn = Figure((4.3, 2.5))
        axes = drawn.subplots()
        for i, (split, numbers) in enumerate(values):
            share = np.histogram(numbers, edges)[0] / max(1, len(numbers))
            axes.stairs(share, edges, fill=len(values) == 1, alpha=0.85, label=split, color=html.PALETTE[i])
        if log:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_ylim(bottom=0)
        axes.set_xlabel(label)
        if len(values) > 1:
            axes.legend()
        return html.figure(drawn)


def _places(split: str, points: np.ndarray) -> Markup:
    """Where in the image boxes have their centres."""
    density = np.histogram2d(points[:, 1], points[:, 0], bins=24, range=[[0, 1], [0, 1]])[0]
    with html.plotting() as Figure:
        drawn = Figure((2.9, 2.5))
        axes = drawn.subplots()
        axes.imshow(density, cmap="Blues", extent=(0, 1, 1, 0), aspect="auto", interpolation="nearest")
        axes.grid(False)
        axes.set_xticks([0, 0.5, 1])
        axes.set_yticks([0, 0.5, 1])
        axes.set_xlabel(f"centres of boxes in the image, {split}")
        return html.figure(drawn)


def _anchors(report: Report) -> list[Markup]:
    found = report.suitability
    assert found is not None
    setting = found.setting
    text = (
        f"{setting.detector} with anchor sizes {', '.join(map(str, setting.anchor_sizes))} and images of "
        f"{setting.short_side}x{setting.long_side} pixels (short and long side), from {setting.name}. An anchor "
        f"learns a box from IoU 0.5 on; a box that none reaches is given the best one, and is learnt badly."
    )
    cards = [
        ("matched", f"{found.matched:.1%}", f"of {found.boxes} boxes"),
        ("small", f"{found.small:.1%}", f"a side under {SMALL:g} pixels at the input"),
    ]
    if found.better_anchors:
        cards.append(
            ("better anchors", f"{found.better_matched:.1%}", f"sizes {', '.join(map(str, found.better_anchors))}")
        )
    if report.memory is not None:
        cards.append(("memory of a step", f"{report.memory['total'] / 1e9:.2f} GB", "predicted"))
    levels = [[stride, size, f"{matched:.1%}", f"{best:.1%}"] for stride, size, matched, best in found.by_level]
    blocks = [
        html.paragraph(text),
        html.cards(cards),
        html.table(["stride", "anchor size", "matches of the boxes", "is the best level of"], levels, left=0),
        html.heading("Other input sizes"),
        html.table(["input", "matched", "small", "cost"], [list(row) for row in table_of_inputs(found)]),
    ]
    if report.memory is not None:
        blocks.append(html.paragraph(memory_line(report.memory) + "."))
    sides = [(checked.original.split, sides_at_input(checked.normalized, setting)) for checked in report.sets]
    roots = [(split, np.sqrt(values.prod(axis=1))) for split, values in sides if len(values)]
    blocks.append(_histogram(roots, "side of a box as the network sees it (pixels)", log=2))
    return blocks
