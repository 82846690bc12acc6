"""Write a `Report` as one HTML page."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup

from detection.core import html
from detection.core.commands import command
from detection.doctor.anchor_checks import MIN_SIDE, input_size_rows
from detection.doctor.class_checks import boxes_per_image
from detection.doctor.dataset_statistics import box_centers, box_sides, box_sides_at_input, dataset_statistics
from detection.doctor.example_images import add_finding_images, add_sample_images
from detection.doctor.findings import Finding
from detection.doctor.rules import RULES
from detection.doctor.run_checks import Report
from detection.doctor.text_report import READ_MODES, describe_example, memory_line

COLORS = {"error": "error", "warning": "warning", "note": "faint"}
MAX_PLOTTED_CLASSES = 30
"""Classes in the bar plot; the table has all of them."""


def write_doctor_page(report: Report, path: Path) -> None:
    """Write the page. Raises UserError if it cannot be written."""
    findings = _findings(report, html.Album(max_bytes=7_000_000))
    sections = [
        html.Section("Summary", _summary(report)),
        html.Section("Findings", findings or [html.note("No findings.", "good")]),
        html.Section(
            "Images", _images(report), "Evenly spaced samples of each dataset, with the boxes that training uses."
        ),
        html.Section("Classes", _classes(report)),
        html.Section("Boxes", _boxes(report)),
        *([html.Section("Anchors and input size", _anchors(report))] if report.anchor_coverage is not None else []),
    ]
    sources = ", ".join(checked.original.source for checked in report.sets)
    html.write_page(path, "Dataset report", sections, subtitle=sources, footer=command("check_data"))


def _summary(report: Report) -> list[Markup]:
    counts = report.counts()
    result = (
        html.note(f"{counts['error']} errors: fix them before training.", "error")
        if counts["error"]
        else html.note("No errors.", "good")
    )
    blocks = [result]
    for checked in report.sets:
        numbers = dataset_statistics(checked.selected)
        per_image = numbers["boxes_per_image"]
        blocks.append(html.heading(f"{checked.original.split}: {numbers['source']}"))
        blocks.append(
            html.cards(
                [
                    ("images", numbers["images"], f"{numbers['images_without_boxes']} without boxes"),
                    ("boxes", numbers["boxes"], f"and {numbers['crowd']} crowd regions" if numbers["crowd"] else ""),
                    ("classes", len(numbers["classes"])),
                    ("boxes per image", f"{per_image['mean']:.1f}", f"at most {per_image['most']}"),
                    ("small", f"{numbers['small']:.0%}", "area under 32² pixels"),
                    ("medium", f"{numbers['medium']:.0%}", "area under 96² pixels"),
                    ("large", f"{numbers['large']:.0%}", "area of 96² pixels or more"),
                ]
            )
        )
    blocks.append(html.paragraph(f"Images: {READ_MODES[report.read_images]}."))
    if report.findings:
        rows = [
            [html.colored(f.severity, COLORS[f.severity]), f.split, f.code, f"{f.count or 'no'} {_title(f)}"]
            for f in report.findings
        ]
        blocks.append(html.table(["severity", "dataset", "code", "finding"], rows, left=4))
    return blocks


def _title(found: Finding) -> str:
    return f"{RULES[found.code].title}{f': {found.detail}' if found.detail else ''}"


def _findings(report: Report, album: html.Album) -> list[Markup]:
    blocks = []
    for found in report.findings:
        blocks.append(html.heading(f"{found.code} ({found.split})"))
        blocks.append(html.note(f"{found.severity}: {found.message}", {"note": ""}.get(found.severity, found.severity)))
        blocks.append(html.paragraph(f"What to do: {found.remedy}."))
        # Images of all notes would hide those of the errors.
        if (
            found.severity != "note" or found.code in ("image-alike", "box-two-classes", "box-aspect")
        ) and add_finding_images(report, found, album):
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
        add_sample_images(checked, album)
        blocks += [html.heading(checked.original.split), album.gallery()]
    return blocks


def _classes(report: Report) -> list[Markup]:
    names: dict[str, list[int]] = {}
    for i, checked in enumerate(report.sets):
        for entry in dataset_statistics(checked.selected)["classes"]:
            row = names.setdefault(entry["name"], [0] * 2 * len(report.sets))
            row[2 * i] += entry["boxes"]
            row[2 * i + 1] += entry["images"]
    order = sorted(names, key=lambda name: -names[name][0])
    shown = order[:MAX_PLOTTED_CLASSES]
    blocks = []
    if shown:
        with html.plotting() as Figure:
            figure = Figure((9, max(1.6, 0.5 + 0.17 * len(shown) * len(report.sets))))
            axes = figure.subplots()
            height = 0.8 / len(report.sets)
            for i, checked in enumerate(report.sets):
                places = np.arange(len(shown)) + i * height
                counts = [names[name][2 * i] for name in shown]
                axes.barh(places, counts, height, label=checked.original.split)
            axes.set_yticks(np.arange(len(shown)) + 0.4 - height / 2, [_shorten(name) for name in shown])
            axes.set_ylim(len(shown) - 0.1, -0.5)
            axes.grid(False, axis="y")
            largest = max(names[name][0] for name in shown)
            if largest > 50 * max(1, min(names[name][0] for name in shown)):
                axes.set_xscale("symlog", linthresh=10)
            axes.set_xlabel("boxes")
            axes.legend()
            blocks.append(html.figure(figure))
    header = ["class"]
    for checked in report.sets:
        header += [f"boxes, {checked.original.split}", f"images, {checked.original.split}"]
    table = html.table(header, [[name, *names[name]] for name in order])
    blocks.append(table if len(order) <= 12 else html.details(f"table of all {len(order)} classes", table))
    return blocks


def _shorten(name: str) -> str:
    return name if len(name) <= 28 else f"{name[:27]}…"


def _boxes(report: Report) -> list[Markup]:
    sets = [(checked.original.split, checked.selected) for checked in report.sets]
    sides = [(split, box_sides(entries)) for split, entries in sets]
    if not any(len(values) for _, values in sides):
        return [html.note("The dataset has no boxes.", "error")]
    mean_sides = [(split, np.sqrt(values.prod(axis=1))) for split, values in sides]
    aspect_ratios = [(split, values[:, 0] / values[:, 1]) for split, values in sides]
    most = max(int(boxes_per_image(entries).max(initial=0)) for _, entries in sets)
    edges = np.arange(min(most, 60) + 2) - 0.5
    per_image = [(split, np.minimum(boxes_per_image(entries), 60)) for split, entries in sets]
    image_sizes = [
        (split, np.sqrt(entries.sizes[(entries.sizes > 0).all(axis=1)].astype(float).prod(axis=1)))
        for split, entries in sets
    ]
    plots = [
        _histogram(mean_sides, "box size: square root of the area (pixels of the original image)", log=2),
        _histogram(aspect_ratios, "box width / height", log=2),
        _histogram(per_image, "boxes per image" + (" (60 means 60 or more)" if most > 60 else ""), edges=edges),
        _histogram(image_sizes, "image size: square root of the area (pixels)"),
    ]
    plots += [_center_heatmap(split, box_centers(entries)) for split, entries in sets if entries.valid.any()]
    return [html.row(plots)]


def _histogram(
    values: Sequence[tuple[str, np.ndarray]], label: str, *, log: int | None = None, edges: np.ndarray | None = None
) -> Markup:
    """Relative frequencies of each dataset's values in common bins; `log`: base of a logarithmic axis."""
    all_values = np.concatenate([numbers for _, numbers in values])
    if edges is None:
        low, high = float(all_values.min()), float(all_values.max())
        if log:
            low, high = np.floor(np.log2(low) * 2) / 2, np.ceil(np.log2(high) * 2) / 2
            edges = 2 ** np.arange(low, max(high, low + 0.5) + 0.01, 0.25)
        else:
            edges = np.linspace(low, max(high, low + 1), 30)
    with html.plotting() as Figure:
        figure = Figure((4.3, 2.5))
        axes = figure.subplots()
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
        return html.figure(figure)


def _center_heatmap(split: str, points: np.ndarray) -> Markup:
    """Heatmap of the box centers [b, 2] relative to the image."""
    density = np.histogram2d(points[:, 1], points[:, 0], bins=24, range=[[0, 1], [0, 1]])[0]
    with html.plotting() as Figure:
        figure = Figure((2.9, 2.5))
        axes = figure.subplots()
        axes.imshow(density, cmap="Blues", extent=(0, 1, 1, 0), aspect="auto", interpolation="nearest")
        axes.grid(False)
        axes.set_xticks([0, 0.5, 1])
        axes.set_yticks([0, 0.5, 1])
        axes.set_xlabel(f"box centers in the image, {split}")
        return html.figure(figure)


def _anchors(report: Report) -> list[Markup]:
    coverage = report.anchor_coverage
    assert coverage is not None
    config = coverage.anchor_config
    text = (
        f"{config.detector} with anchor sizes {', '.join(map(str, config.anchor_sizes))} and images of "
        f"{config.short_side}x{config.long_side} pixels (short and long side), from {config.name}. A box is "
        f"matched if its best anchor has an IoU of at least 0.5. Other boxes are also assigned to their best anchor, "
        f"but are detected poorly."
    )
    cards = [
        ("matched", f"{coverage.matched:.1%}", f"of {coverage.boxes} boxes"),
        (f"below {MIN_SIDE:g} pixels", f"{coverage.small:.1%}", "shorter side of the box at the network input"),
    ]
    if coverage.better_anchors:
        sizes = ", ".join(map(str, coverage.better_anchors))
        cards.append(("matched by better anchors", f"{coverage.better_matched:.1%}", f"sizes {sizes}"))
    if report.memory is not None:
        cards.append(("memory of a training step", f"{report.memory['total'] / 1e9:.2f} GB", "predicted"))
    levels = [[stride, size, f"{matched:.1%}", f"{best:.1%}"] for stride, size, matched, best in coverage.by_level]
    blocks = [
        html.paragraph(text),
        html.cards(cards),
        html.table(
            ["stride", "anchor size", "boxes matched", "boxes whose best anchor is on this level"], levels, left=0
        ),
        html.heading("Other input sizes"),
        html.table(
            ["input size", "matched", f"below {MIN_SIDE:g} pixels", "relative cost"],
            [list(row) for row in input_size_rows(coverage)],
        ),
    ]
    if report.memory is not None:
        blocks.append(html.paragraph(memory_line(report.memory) + "."))
    sides = [(checked.original.split, box_sides_at_input(checked.normalized, config)) for checked in report.sets]
    mean_sides = [(split, np.sqrt(values.prod(axis=1))) for split, values in sides if len(values)]
    blocks.append(_histogram(mean_sides, "box size at the network input (pixels)", log=2))
    return blocks
