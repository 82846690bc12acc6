"""Format a `Report` as text for the terminal and as JSON."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from detection.core.outputs import write_output
from detection.doctor.anchor_checks import AnchorCoverage
from detection.doctor.dataset_statistics import dataset_statistics
from detection.doctor.findings import Example
from detection.doctor.rules import SEVERITIES
from detection.doctor.run_checks import CheckedDataset, Report

MAX_EXAMPLES = 4
"""Examples of each finding in the text."""
VERSION = 1
READ_MODES = {
    "all": "all files read and decoded (JPEG: luminance at 1/8 scale or more)",
    "headers": "all files read but not decoded: corrupt data and near-duplicates are not detected",
    "none": "not opened: only checked for existence",
}


def format_report(report: Report) -> str:
    """The summary as text: datasets, findings with remedies, anchor coverage, memory and counts."""
    # Lone surrogates, from file names that are not UTF-8, cannot be printed.
    return "\n".join(_lines(report)).encode("utf-8", "replace").decode()


def _lines(report: Report) -> Iterator[str]:
    for checked in report.sets:
        yield _describe(checked)
    yield from complete_lines(report)
    seconds = sum(checked.images.seconds for checked in report.sets)
    images = sum(len(checked.original.image_ids) for checked in report.sets)
    rate = f", {images / seconds:.0f} images/s" if seconds else ""
    yield f"images: {READ_MODES[report.read_images]}{rate}"
    for severity in SEVERITIES:
        of_severity = [found for found in report.findings if found.severity == severity]
        if of_severity:
            yield f"\n{severity}s"
        for found in of_severity:
            yield f"  [{found.split}] {found.message}  ({found.code})"
            for example in found.examples[:MAX_EXAMPLES]:
                yield f"      {describe_example(example)}"
            if found.count > MAX_EXAMPLES and len(found.examples) >= MAX_EXAMPLES:
                yield "      …"
            yield f"      -> {found.remedy}"
    if report.anchor_coverage is not None:
        yield ""
        yield from anchor_coverage_lines(report.anchor_coverage)
    if report.memory is not None:
        yield memory_line(report.memory)
    counts = report.counts()
    yield (
        f"\n{counts['error']} errors, {counts['warning']} warnings, {counts['note']} notes in {report.seconds:.1f} s: "
        + ("fix the errors before training" if counts["error"] else "clean" if not counts["warning"] else "no errors")
    )


def _describe(checked: CheckedDataset) -> str:
    numbers = dataset_statistics(checked.selected)
    crowd = f" and {numbers['crowd']} crowd regions" if numbers["crowd"] else ""
    return (
        f"{numbers['source']} ({checked.original.split}, {numbers['format'].upper()}): {numbers['images']} images, "
        f"{numbers['boxes']} boxes{crowd}, {len(numbers['classes'])} classes; "
        f"{numbers['small']:.0%} small, {numbers['medium']:.0%} medium, {numbers['large']:.0%} large"
    )


def complete_lines(report: Report) -> Iterator[str]:
    """For each training set of a list the classes that it is complete for."""
    train = [checked.original.split for checked in report.sets if checked.original.role == "train"]
    for number, split in enumerate(train if report.complete else []):
        names = [name for name, sets in report.complete.items() if sets[number]]
        others = [name for name, sets in report.complete.items() if not sets[number]]
        missing = f"; no background for {len(others)}: {_few(others)}" if others else ""
        yield f"{split} is complete for {len(names)} of {len(report.complete)} classes: {_few(names)}{missing}"


def _few(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "none"


def describe_example(example: Example) -> str:
    """For example "dog.jpg, annotation 7 [1, 2, 3, 4]: by 14.0 pixels"."""
    parts = []
    if example.image:
        parts.append(example.image)
    if example.annotation:
        parts.append(f"annotation {example.annotation}")
    box = f" [{', '.join(f'{value:.5g}' for value in example.box)}]" if example.box else ""
    place = ", ".join(parts) + box
    return f"{place}: {example.text}" if place and example.text else place or example.text


def anchor_coverage_lines(coverage: AnchorCoverage) -> Iterator[str]:
    config = coverage.anchor_config
    yield (
        f"anchors of {config.name} ({config.detector}, sizes {', '.join(map(str, config.anchor_sizes))}, "
        f"input {config.short_side}x{config.long_side}): "
        f"{coverage.matched:.1%} of {coverage.boxes} boxes have an anchor with IoU >= 0.5"
    )
    levels = ", ".join(f"stride {stride} {share:.0%}" for stride, _, share, _ in coverage.by_level)
    yield f"  by level: {levels}; {coverage.small:.1%} have a side below 8 pixels at the input"
    if coverage.better_anchors:
        sizes = ",".join(map(str, coverage.better_anchors))
        yield f"  model.anchor_sizes=[{sizes}] would match {coverage.better_matched:.1%}"
    if coverage.better_input:
        short, long = coverage.better_input
        yield f"  data.short_side={short} data.long_side={long} would leave fewer small boxes (--html: all input sizes)"


def memory_line(memory: dict[str, float]) -> str:
    return (
        f"predicted memory of a training step: {memory['total'] / 1e9:.2f} GB ({memory['weights'] / 1e9:.2f} weights, "
        f"gradients and optimizer, {memory['images'] / 1e9:.2f} activations), in addition to the process itself"
    )


def to_json(report: Report) -> dict[str, Any]:
    """The whole report as plain values."""
    coverage = report.anchor_coverage
    return {
        "version": VERSION,
        "clean": not report.exit_code,
        "counts": report.counts(),
        "pictures": report.read_images,
        "seconds": round(report.seconds, 2),
        "sets": {checked.original.split: dataset_statistics(checked.selected) for checked in report.sets},
        "complete_classes": {name: sets.tolist() for name, sets in report.complete.items()},
        "findings": [finding.to_json() for finding in report.findings],
        "suitability": None
        if coverage is None
        else {
            "setting": vars(coverage.anchor_config),
            "boxes": coverage.boxes,
            "matched": coverage.matched,
            "small": coverage.small,
            "levels": [
                {"stride": stride, "anchor_size": size, "matched": matched, "best": best}
                for stride, size, matched, best in coverage.by_level
            ],
            "better_anchor_sizes": coverage.better_anchors,
            "better_matched": coverage.better_matched,
            "inputs": [
                dict(zip(("short_side", "long_side", "matched", "small", "cost"), entry, strict=True))
                for entry in coverage.inputs
            ],
            "better_input": coverage.better_input,
        },
        "memory_bytes": report.memory,
    }


def write_json(report: Report, path: Path) -> None:
    """Write the report as JSON. Raises UserError if the file cannot be written."""
    # ASCII escapes also represent lone surrogates, from file names that are not UTF-8.
    text = json.dumps(to_json(report), indent=1, ensure_ascii=True)
    write_output(path, lambda file: file.write(text.encode()))
