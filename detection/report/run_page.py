"""The page about one run."""

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from detection.benchmark.latency_report import LatencyReport
from detection.core import html
from detection.core.html import Album, Section
from detection.evaluation.analyze import Analysis
from detection.evaluation.breakdown import KINDS
from detection.evaluation.coco_evaluator import METRICS
from detection.evaluation.curves import CALIBRATED_FROM
from detection.evaluation.groups import Group
from detection.report import image_gallery, plots
from detection.report.run_data import Source, resolved_config

CROPS = 24
IMAGES = 6
DRAWN = 0.3
"""The score from which on tools/detect.py draws."""
MEANINGS = {
    "AP": "IoU 0.50 to 0.95",
    "AP50": "IoU 0.50",
    "AP75": "IoU 0.75",
    "APs": "small, up to 32²",
    "APm": "medium",
    "APl": "large, above 96²",
    "AR1": "recall, 1 detection",
    "AR10": "recall, 10",
    "AR100": "recall, 100",
    "ARs": "recall, small",
    "ARm": "recall, medium",
    "ARl": "recall, large",
}
KIND_MEANINGS = {
    "classification": "well placed on an object of another class (IoU of at least 0.5)",
    "localisation": "on an object of its class, but badly placed (IoU 0.1 to 0.5)",
    "both": "badly placed on an object of another class",
    "duplicate": "on an object that a better detection has got",
    "background": "on nothing (IoU below 0.1 with every object)",
    "missed": "objects that no detection is on, not even a badly placed or misnamed one",
}


def run_sections(
    source: Source, environment: dict[str, str], latency: LatencyReport | None, *, max_bytes: int
) -> list[Section]:
    """All sections of the report on a run; its images take at most `max_bytes`."""
    analysis = source.analysis
    sections = [_overview(source), _errors(analysis), _classes(analysis), _curves(analysis), _groups(analysis)]
    sections.append(_calibration(analysis))
    history = plots.history_plots(source)
    if history:
        sections.insert(1, Section("Training", [html.plots(history)], _training_lead(source)))
    sections += image_sections(source, max_bytes)
    if latency is not None:
        sections.append(_latency(latency))
    sections.append(_made_with(source, environment))
    return sections


def _overview(source: Source) -> Section:
    analysis, index = source.analysis, source.index
    numbers = analysis.matches.evaluation.numbers
    blocks = [html.cards([(name, numbers[name], MEANINGS[name]) for name in METRICS])]
    blocks += [html.note(text, kind) for text, kind in remarks(analysis)]
    return Section(
        "Numbers",
        blocks,
        f"{len(index)} images, {int(analysis.matches.counted.sum())} objects of {len(index.class_names)} classes "
        f"({index.source}). Detections: {source.came_from}. These are pycocotools' numbers; a dash: there is nothing "
        "to measure it on.",
    )


def remarks(analysis: Analysis) -> list[tuple[str, str]]:
    """What these numbers say, in sentences, each with its kind of `html.note`."""
    breakdown, said = analysis.breakdown, []
    if not analysis.matches.counted.any():
        return [("There is no ground truth: nothing can be measured.", "warning")]
    if not len(analysis.matches):
        return [("There is not a single detection.", "warning")]
    largest = max(KINDS, key=lambda kind: breakdown.costs[kind])
    if breakdown.costs[largest] > 0.005:
        advice = {
            "classification": "Are the classes told apart in the data, and are there enough images of each?",
            "localisation": "Look at the box loss and the input size; are the annotated boxes tight?",
            "both": "Look at the images of wrong detections below.",
            "duplicate": "A lower eval.nms_threshold may help.",
            "background": "Look at the most confident ones below: are they objects that nobody annotated?",
            "missed": "Are the objects too small at this input size? Look at them below.",
        }[largest]
        said.append(
            (
                f"The largest part of what is lost at IoU 0.5 is {largest}: {100 * breakdown.costs[largest]:.1f} "
                f"points of AP50 ({KIND_MEANINGS[largest]}). {advice}",
                "",
            )
        )
    weak = [name for name, _, ap50, boxes in analysis.matches.evaluation.per_class if boxes and ap50 == 0]
    if weak:
        more = ", …" if len(weak) > 8 else ""
        said.append((f"Never found at all: {', '.join(weak[:8])}{more} ({len(weak)} classes).", "warning"))
    claimed, right = _drawn(analysis)
    if abs(claimed - right) > 0.1:
        what = "too low" if claimed < right else "too high"
        said.append(
            (
                f"Scores are {what}: of the detections from {DRAWN} on {100 * right:.0f} % are right, with scores of "
                f"{claimed:.2f} on average.",
                "",
            )
        )
    return said


def _drawn(analysis: Analysis) -> tuple[float, float]:
    """Mean score, and share that is right (IoU 0.5), of the detections that are usually drawn."""
    matches = analysis.matches
    chosen = (matches.score >= DRAWN) & ~matches.ignored[0]
    if not chosen.any():
        return 0.0, 0.0
    return float(matches.score[chosen].mean()), float(matches.right(0)[chosen].mean())


def _errors(analysis: Analysis) -> Section:
    breakdown = analysis.breakdown
    meanings = KIND_MEANINGS | {
        "false_positives": "all of them, with any score",
        "false_negatives": "objects that no detection was matched with",
    }
    rows = [
        [kind.replace("_", " "), meaning, f"{100 * breakdown.costs[kind]:.1f}", breakdown.counts[kind]]
        for kind, meaning in meanings.items()
    ]
    table = html.table(["kind", "what", "AP50 points", "how many"], rows, left=2)
    return Section(
        "What the mistakes cost",
        [html.plots([plots.error_plot(analysis), table])],
        "After TIDE (arXiv 2008.08115): by how much AP50 would rise if one kind of mistake were mended and all others "
        "stayed. The parts do not add up to what is lost.",
    )


def _classes(analysis: Analysis) -> Section:
    rows = []
    for (name, ap, ap50, boxes), curve in zip(analysis.matches.evaluation.per_class, analysis.curves, strict=True):
        precision, recall, f1 = curve.at_best() or (None, None, None)
        rows.append([name, boxes, ap, ap50, curve.best, precision, recall, f1])
    header = ["class", "objects", "AP", "AP50", "threshold", "precision", "recall", "F1"]
    return Section(
        "Classes",
        [html.table(header, rows), html.heading("Taken for what"), plots.confusion_plot(analysis)],
        "The recommended threshold is where F1 at IoU 0.5 is largest on these very images: with few objects it is "
        "uncertain. Precision, recall, F1 and the matrix are at these thresholds. In the matrix the last row are "
        "detections of nothing, the last column missed objects; the shade is the share of the row.",
    )


def _curves(analysis: Analysis) -> Section:
    return Section("Curves", [html.plots(plots.precision_plots(analysis))])


def _groups(analysis: Analysis) -> Section:
    blocks: list[Markup] = []
    for title, groups in (
        ("Size, in pixels of area", analysis.by_size),
        ("Shape, width to height", analysis.by_shape),
        ("Objects in the image", analysis.by_crowdedness),
    ):
        blocks.append(_group_table(title, groups))
    return Section(
        "Kinds of objects",
        [html.plots(blocks)],
        "AP of a part of the objects; all others are ignored, as with pycocotools' own sizes. Recall: the share that "
        "is found at IoU 0.5 with any score.",
    )


def _group_table(title: str, groups: Sequence[Group]) -> Markup:
    rows = [[group.name, group.objects, group.ap, group.ap50, group.recall] for group in groups]
    return html.table([title, "objects", "AP", "AP50", "recall"], rows)


def _calibration(analysis: Analysis) -> Section:
    found = analysis.calibration
    rows = [
        [f"{i / 10:.1f} to {(i + 1) / 10:.1f}", int(count), score, precision]
        for i, (count, score, precision) in enumerate(zip(found.count, found.score, found.precision, strict=True))
        if count
    ]
    blocks = [plots.calibration_plot(analysis), html.table(["score", "detections", "mean score", "right"], rows)]
    return Section(
        "Calibration",
        [html.plots(blocks)],
        f"Is a score of 0.7 right seven times in ten? Detections from {CALIBRATED_FROM} on; expected calibration error "
        f"{html.number(found.error)} (0 is perfect).",
    )


def image_sections(source: Source, max_bytes: int) -> list[Section]:
    """The most confident mistakes, missed objects, worst and best images."""
    analysis = source.analysis
    if source.images is None:
        return [Section("Images", [html.note("The images were not to be found: name their folder with --images.")])]
    read = image_gallery.ImageReader(analysis, source.images)
    sections = []
    # A quarter of the room each, so that the first gallery does not take it all.
    albums = [Album(max_bytes // 4) for _ in range(4)]
    image_gallery.add_false_positives(albums[0], analysis, read, CROPS)
    sections.append(
        Section(
            "Most confident false positives",
            [albums[0].gallery(190)],
            "Red: the detection; green: annotated objects. Where there is clearly an object, the annotation is amiss.",
        )
    )
    image_gallery.add_missed(albums[1], analysis, read, CROPS)
    sections.append(
        Section(
            "Missed objects",
            [albums[1].gallery(190)],
            "Orange: objects that are not found at the recommended thresholds, the largest first; red: the detection "
            "that came near.",
        )
    )
    order = worst_first(analysis)
    for album, title, images in (
        (albums[2], "Worst images", order[:IMAGES]),
        (albums[3], "Best images", order[::-1][:IMAGES]),
    ):
        image_gallery.add_images(album, analysis, read, images)
        sections.append(
            Section(
                title,
                [album.gallery(440)],
                "Left the truth (green found, orange missed, grey crowd), right the detections (green right, red "
                "wrong), at the recommended thresholds; by F1 at IoU 0.5.",
            )
        )
    if read.unreadable:
        named = ", ".join(sorted(read.unreadable)[:5])
        note = f"{len(read.unreadable)} images could not be read and are not shown: {named}"
        sections[0] = Section(sections[0].title, [html.note(note, "warning"), *sections[0].blocks], sections[0].lead)
    return sections


def worst_first(analysis: Analysis) -> list[int]:
    """Images by F1, among equals those with the most mistakes (at the good end: the most right ones) first."""
    scores = analysis.images
    return np.lexsort((scores.right, -(scores.wrong + scores.missed), scores.f1)).tolist()


def _latency(report: LatencyReport) -> Section:
    header = ["backend", "input", "median ms", "p95 ms", "images/s", "parameters (M)", "multiply-adds (G)", "file (MB)"]
    rows = []
    for row in report.rows:
        size = "–" if row.size is None else f"{row.size[0]}×{row.size[1]}"
        values = [
            _scaled(row.median, 1e-3, 1),
            _scaled(row.p95, 1e-3, 1),
            _scaled(row.throughput, 1, 1),
            _scaled(row.parameters, 1e6, 2),
            _scaled(row.macs, 1e9, 2),
            _scaled(row.file_bytes, 1e6, 1),
        ]
        rows.append([row.backend, size, *values])
    about = [html.paragraph(f"{name}: {value}") for name, value in report.environment.items()]
    return Section(
        "Cost and speed",
        [html.table(header, rows, left=2), html.details("How it was measured", *about)],
        "One image, from uint8 pixels to boxes, NMS included. tools/benchmark.py measures more backends and longer.",
    )


def _scaled(value: float | None, unit: float, decimals: int) -> str:
    return html.UNKNOWN if value is None else f"{value / unit:.{decimals}f}"


def _made_with(source: Source, environment: dict[str, str]) -> Section:
    entries = [("Trained with", entry) for entry in source.trained_with] + [("This report", environment)]
    blocks = [html.table([title, ""], list(entry.items()), left=2) for title, entry in entries]
    if source.config is not None:
        blocks.append(html.details("Config, resolved", html.code(resolved_config(source.config))))
    return Section("Made with", blocks)


def _training_lead(source: Source) -> str:
    history = source.history
    if not history:
        return ""
    last = history[-1]
    best = max((r for r in history if r.get("AP") is not None), key=lambda r: r["AP"], default=None)
    told = f"{last['epoch']} epochs, {last.get('step', '?')} steps, {last.get('seconds', 0) / 60:.1f} minutes"
    return told + (f"; best AP {best['AP']:.3f} after epoch {best['epoch']}." if best else ".")
