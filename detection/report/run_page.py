"""The sections of the report of one run."""

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from detection.benchmark.latency_report import LatencyReport
from detection.core import html
from detection.core.commands import command
from detection.core.html import Album, Section
from detection.evaluation.analyze import Analysis
from detection.evaluation.breakdown import KINDS
from detection.evaluation.coco_evaluator import METRICS
from detection.evaluation.curves import CALIBRATED_FROM
from detection.evaluation.groups import Group
from detection.report import image_gallery, plots
from detection.report.run_data import RunData, config_to_yaml

MAX_CROPS = 24
MAX_IMAGES = 6
DRAW_THRESHOLD = 0.3
"""Default score threshold of tools/detect.py."""
METRIC_DESCRIPTIONS = {
    "AP": "mean over IoU 0.50 to 0.95",
    "AP50": "IoU 0.50",
    "AP75": "IoU 0.75",
    "APs": "small, area up to 32²",
    "APm": "medium, area up to 96²",
    "APl": "large, area above 96²",
    "AR1": "recall, 1 detection per image",
    "AR10": "recall, 10 per image",
    "AR100": "recall, 100 per image",
    "ARs": "recall, small objects",
    "ARm": "recall, medium objects",
    "ARl": "recall, large objects",
}
ERROR_DESCRIPTIONS = {
    "classification": "IoU of at least 0.5 with an object of another class",
    "localisation": "IoU of 0.1 to 0.5 with an object of the same class",
    "both": "IoU of 0.1 to 0.5 with an object of another class",
    "duplicate": "another detection with a higher score matches the object",
    "background": "IoU below 0.1 with all objects",
    "missed": "objects without a match, and without a localisation or classification error about them",
}


def run_sections(
    source: RunData, environment: dict[str, str], latency: LatencyReport | None, *, max_bytes: int
) -> list[Section]:
    """All sections of the report; its images take at most `max_bytes`."""
    analysis = source.analysis
    sections = [_overview(source), _errors(analysis), _classes(analysis), _curves(analysis), _groups(analysis)]
    sections.append(_calibration(analysis))
    history = plots.history_plots(source)
    if history:
        sections.insert(1, Section("Training", [html.row(history)], _training_lead(source)))
    sections += image_sections(source, max_bytes)
    if latency is not None:
        sections.append(_latency(latency))
    sections.append(_environment(source, environment))
    return sections


def _overview(source: RunData) -> Section:
    analysis, annotations = source.analysis, source.annotations
    numbers = analysis.matches.evaluation.numbers
    blocks = [html.cards([(name, numbers[name], METRIC_DESCRIPTIONS[name]) for name in METRICS])]
    blocks += [html.note(text, kind) for text, kind in summary_notes(analysis)]
    return Section(
        "Metrics",
        blocks,
        f"{len(annotations)} images, {int(analysis.matches.counted.sum())} objects of {len(annotations.class_names)} "
        f"classes ({annotations.source}). Detections: {source.detections_source}. "
        "The metrics are those of pycocotools; a dash means that no object has this size.",
    )


def summary_notes(analysis: Analysis) -> list[tuple[str, str]]:
    """Conclusions from the metrics: pairs of text and kind of `html.note`."""
    breakdown, notes = analysis.breakdown, []
    if not analysis.matches.counted.any():
        return [("There is no ground truth, so nothing can be measured.", "warning")]
    if not len(analysis.matches):
        return [("There are no detections.", "warning")]
    largest = max(KINDS, key=lambda kind: breakdown.costs[kind])
    if breakdown.costs[largest] > 0.005:
        advice = {
            "classification": "Check that the annotations of the classes are consistent, and add images of rare ones.",
            "localisation": "Check the box loss, the input size, and that the annotated boxes are tight.",
            "both": "See the false positives below.",
            "duplicate": "A lower eval.nms_threshold may help.",
            "background": "See the most confident false positives below: they may be objects without annotations.",
            "missed": "See the missed objects below: they may be too small at this input size.",
        }[largest]
        notes.append(
            (
                f"The most important type of error is {largest} ({ERROR_DESCRIPTIONS[largest]}): it accounts for "
                f"{100 * breakdown.costs[largest]:.1f} points of AP50. {advice}",
                "",
            )
        )
    weak = [name for name, _, ap50, boxes in analysis.matches.evaluation.per_class if boxes and ap50 == 0]
    if weak:
        more = ", …" if len(weak) > 8 else ""
        notes.append((f"{len(weak)} classes have an AP50 of 0: {', '.join(weak[:8])}{more}.", "warning"))
    mean_score, precision = _mean_score_and_precision(analysis)
    if abs(mean_score - precision) > 0.1:
        bias = "too low" if mean_score < precision else "too high"
        notes.append(
            (
                f"The scores are {bias}: {100 * precision:.0f} % of the detections with a score of at least "
                f"{DRAW_THRESHOLD} are correct, but their mean score is {mean_score:.2f}.",
                "",
            )
        )
    return notes


def _mean_score_and_precision(analysis: Analysis) -> tuple[float, float]:
    """Mean score and precision (IoU 0.5) of the detections with a score of at least `DRAW_THRESHOLD`."""
    matches = analysis.matches
    chosen = (matches.score >= DRAW_THRESHOLD) & ~matches.ignored[0]
    if not chosen.any():
        return 0.0, 0.0
    return float(matches.score[chosen].mean()), float(matches.right(0)[chosen].mean())


def _errors(analysis: Analysis) -> Section:
    breakdown = analysis.breakdown
    descriptions = ERROR_DESCRIPTIONS | {
        "false_positives": "all false positives, at any score",
        "false_negatives": "all objects without a match",
    }
    rows = [
        [kind.replace("_", " "), description, f"{100 * breakdown.costs[kind]:.1f}", breakdown.counts[kind]]
        for kind, description in descriptions.items()
    ]
    table = html.table(["type", "definition", "AP50 points", "count"], rows, left=2)
    return Section(
        "Error types",
        [html.row([plots.error_plot(analysis), table])],
        "As in TIDE (arXiv 2008.08115): the increase of AP50 if all errors of one type were corrected. The values do "
        "not add up to 100 - AP50.",
    )


def _classes(analysis: Analysis) -> Section:
    rows = []
    for (name, ap, ap50, boxes), curve in zip(analysis.matches.evaluation.per_class, analysis.curves, strict=True):
        precision, recall, f1 = curve.at_best() or (None, None, None)
        rows.append([name, boxes, ap, ap50, curve.best, precision, recall, f1])
    header = ["class", "objects", "AP", "AP50", "threshold", "precision", "recall", "F1"]
    return Section(
        "Classes",
        [html.table(header, rows), html.heading("Confusion matrix"), plots.confusion_plot(analysis)],
        "The recommended threshold maximizes F1 at IoU 0.5 on these images; with few objects it is uncertain. "
        "Precision, recall, F1 and the confusion matrix use these thresholds. The last row of the matrix counts false "
        "positives on the background, the last column missed objects; the color is the share of the row.",
    )


def _curves(analysis: Analysis) -> Section:
    return Section("Curves", [html.row(plots.precision_plots(analysis))])


def _groups(analysis: Analysis) -> Section:
    blocks: list[Markup] = []
    for title, groups in (
        ("Object area in pixels", analysis.by_size),
        ("Object width / height", analysis.by_shape),
        ("Objects per image", analysis.by_crowdedness),
    ):
        blocks.append(_group_table(title, groups))
    return Section(
        "Object groups",
        [html.row(blocks)],
        "AP of a group of objects; all other objects are ignored, as in pycocotools for APs, APm and APl. Recall is at "
        "IoU 0.5 and any score.",
    )


def _group_table(title: str, groups: Sequence[Group]) -> Markup:
    rows = [[group.name, group.objects, group.ap, group.ap50, group.recall] for group in groups]
    return html.table([title, "objects", "AP", "AP50", "recall"], rows)


def _calibration(analysis: Analysis) -> Section:
    calibration = analysis.calibration
    rows = [
        [f"{i / 10:.1f} to {(i + 1) / 10:.1f}", int(count), score, precision]
        for i, (count, score, precision) in enumerate(
            zip(calibration.count, calibration.score, calibration.precision, strict=True)
        )
        if count
    ]
    blocks = [plots.calibration_plot(analysis), html.table(["score", "detections", "mean score", "precision"], rows)]
    return Section(
        "Calibration",
        [html.row(blocks)],
        "Compares scores with precision: of detections with a score of 0.7, 70 % should be correct. Detections with a "
        f"score of at least {CALIBRATED_FROM}; expected calibration error {html.format_number(calibration.error)} "
        "(0 is perfect).",
    )


def image_sections(source: RunData, max_bytes: int) -> list[Section]:
    """Galleries of false positives, missed objects, and the images with the lowest and the highest F1."""
    analysis = source.analysis
    if source.images is None:
        return [Section("Images", [html.note("The images were not found: set their folder with --images.")])]
    read = image_gallery.ImageReader(analysis, source.images)
    sections = []
    # A quarter of the limit each, so that the first gallery does not use all of it.
    albums = [Album(max_bytes // 4) for _ in range(4)]
    image_gallery.add_false_positives(albums[0], analysis, read, MAX_CROPS)
    sections.append(
        Section(
            "Most confident false positives",
            [albums[0].gallery(190)],
            "Red: the detection; green: annotated objects. If the red box shows an object, its annotation is missing.",
        )
    )
    image_gallery.add_missed(albums[1], analysis, read, MAX_CROPS)
    sections.append(
        Section(
            "Missed objects",
            [albums[1].gallery(190)],
            "Orange: objects missed at the recommended thresholds, largest first; red: the localisation or "
            "classification error about them with the highest score.",
        )
    )
    order = images_by_f1(analysis)
    for album, title, images in (
        (albums[2], "Images with the lowest F1", order[:MAX_IMAGES]),
        (albums[3], "Images with the highest F1", order[::-1][:MAX_IMAGES]),
    ):
        image_gallery.add_images(album, analysis, read, images)
        sections.append(
            Section(
                title,
                [album.gallery(440)],
                "Left: ground truth (green: found, orange: missed, gray: crowd). Right: detections (green: correct, "
                "red: wrong). F1 at IoU 0.5 and the recommended thresholds.",
            )
        )
    if read.unreadable:
        names = ", ".join(sorted(read.unreadable)[:5])
        note = f"{len(read.unreadable)} images could not be read and are not shown: {names}"
        sections[0] = Section(sections[0].title, [html.note(note, "warning"), *sections[0].blocks], sections[0].lead)
    return sections


def images_by_f1(analysis: Analysis) -> list[int]:
    """Images by ascending F1; for equal F1, the most errors first, then the fewest correct detections."""
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
        "Cost and latency",
        [html.table(header, rows, left=2), html.details("Measurement conditions", *about)],
        "Latency of one image from uint8 pixels to boxes, including NMS. "
        f"{command('benchmark')} measures more accurately, and more backends.",
    )


def _scaled(value: float | None, unit: float, decimals: int) -> str:
    return html.MISSING if value is None else f"{value / unit:.{decimals}f}"


def _environment(source: RunData, environment: dict[str, str]) -> Section:
    entries = [("Trained with", entry) for entry in source.trained_with] + [("This report", environment)]
    blocks = [html.table([title, ""], list(entry.items()), left=2) for title, entry in entries]
    if source.config is not None:
        blocks.append(html.details("Resolved config", html.code(config_to_yaml(source.config))))
    return Section("Environment", blocks)


def _training_lead(source: RunData) -> str:
    history = source.history
    if not history:
        return ""
    last = history[-1]
    best = max((r for r in history if r.get("AP") is not None), key=lambda r: r["AP"], default=None)
    text = f"{last['epoch']} epochs, {last.get('step', '?')} steps, {last.get('seconds', 0) / 60:.1f} minutes"
    return text + (f"; best AP {best['AP']:.3f} after epoch {best['epoch']}." if best else ".")
