"""A `Report` as text for a terminal, and as JSON."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from detection.core.outputs import write_output
from detection.doctor.examine import CheckedSet, Report
from detection.doctor.findings import Example
from detection.doctor.rules import SEVERITIES
from detection.doctor.stats import statistics
from detection.doctor.suitability import Suitability

SHOWN = 4
"""Examples of a finding on the terminal."""
VERSION = 1
DECODED = {
    "all": "every file read whole and decoded (JPEG: luminance at 1/8 of the size or more)",
    "headers": "files read whole, nothing decoded: damage inside and look-alikes are not seen",
    "none": "not opened: only whether they are there",
}


def console(report: Report) -> str:
    """The summary: sets, findings with remedies, what the network can make of the boxes, and the verdict."""
    # Half a character, of a file name that is not UTF-8, cannot be printed.
    return "\n".join(_lines(report)).encode("utf-8", "replace").decode()


def _lines(report: Report) -> Iterator[str]:
    for checked in report.sets:
        yield _describe(checked)
    seconds = sum(checked.images.seconds for checked in report.sets)
    images = sum(len(checked.original.image_ids) for checked in report.sets)
    rate = f", {images / seconds:.0f} images/s" if seconds else ""
    yield f"images: {DECODED[report.read_images]}{rate}"
    for severity in SEVERITIES:
        own = [found for found in report.findings if found.severity == severity]
        if own:
            yield f"\n{severity}s"
        for found in own:
            yield f"  [{found.split}] {found.message}  ({found.code})"
            for example in found.examples[:SHOWN]:
                yield f"      {describe_example(example)}"
            if found.count > SHOWN and len(found.examples) >= SHOWN:
                yield "      …"
            yield f"      -> {found.remedy}"
    if report.suitability is not None:
        yield ""
        yield from suitability_lines(report.suitability)
    if report.memory is not None:
        yield memory_line(report.memory)
    counts = report.counts()
    yield (
        f"\n{counts['error']} errors, {counts['warning']} warnings, {counts['note']} notes in {report.seconds:.1f} s: "
        + ("mend the errors before training" if counts["error"] else "clean" if not counts["warning"] else "no errors")
    )


def _describe(checked: CheckedSet) -> str:
    numbers = statistics(checked.selected)
    crowd = f" and {numbers['crowd']} crowd regions" if numbers["crowd"] else ""
    return (
        f"{numbers['source']} ({checked.original.split}, {numbers['format'].upper()}): {numbers['images']} images, "
        f"{numbers['boxes']} boxes{crowd}, {len(numbers['classes'])} classes; "
        f"{numbers['small']:.0%} small, {numbers['medium']:.0%} medium, {numbers['large']:.0%} large"
    )


def describe_example(example: Example) -> str:
    """As in "dog.jpg, annotation 7 [1, 2, 3, 4]: two words"."""
    parts = []
    if example.image:
        parts.append(example.image)
    if example.annotation:
        parts.append(f"annotation {example.annotation}")
    box = f" [{', '.join(f'{value:.5g}' for value in example.box)}]" if example.box else ""
    place = ", ".join(parts) + box
    return f"{place}: {example.text}" if place and example.text else place or example.text


def suitability_lines(found: Suitability) -> Iterator[str]:
    setting = found.setting
    yield (
        f"anchors of {setting.name} ({setting.detector}, sizes {', '.join(map(str, setting.anchor_sizes))}, "
        f"input {setting.short_side}x{setting.long_side}): "
        f"{found.matched:.1%} of {found.boxes} boxes have one with IoU >= 0.5"
    )
    levels = ", ".join(f"stride {stride} {share:.0%}" for stride, _, share, _ in found.by_level)
    yield f"  by level: {levels}; {found.small:.1%} have a side under 8 pixels at the input"
    if found.better_anchors:
        sizes = ",".join(map(str, found.better_anchors))
        yield f"  model.anchor_sizes=[{sizes}] would match {found.better_matched:.1%}"
    if found.better_input:
        short, long = found.better_input
        yield f"  data.short_side={short} data.long_side={long} would leave fewer small ones; the page has a table"


def memory_line(memory: dict[str, float]) -> str:
    return (
        f"memory of a training step, predicted: {memory['total'] / 1e9:.2f} GB ({memory['weights'] / 1e9:.2f} weights, "
        f"gradients and optimizer, {memory['images'] / 1e9:.2f} images); the process itself comes on top"
    )


def as_json(report: Report) -> dict[str, Any]:
    """All of it, as plain values."""
    found = report.suitability
    return {
        "version": VERSION,
        "clean": not report.exit_code,
        "counts": report.counts(),
        "pictures": report.read_images,
        "seconds": round(report.seconds, 2),
        "sets": {checked.original.split: statistics(checked.selected) for checked in report.sets},
        "findings": [finding.as_json() for finding in report.findings],
        "suitability": None
        if found is None
        else {
            "setting": vars(found.setting),
            "boxes": found.boxes,
            "matched": found.matched,
            "small": found.small,
            "levels": [
                {"stride": stride, "anchor_size": size, "matched": matched, "best": best}
                for stride, size, matched, best in found.by_level
            ],
            "better_anchor_sizes": found.better_anchors,
            "better_matched": found.better_matched,
            "inputs": [
                dict(zip(("short_side", "long_side", "matched", "small", "cost"), entry, strict=True))
                for entry in found.inputs
            ],
            "better_input": found.better_input,
        },
        "memory_bytes": report.memory,
    }


def write_json(report: Report, path: Path) -> None:
    """Raises UserError where it cannot be written."""
    # Half a character, of a file name that is not UTF-8, has an escape.
    text = json.dumps(as_json(report), indent=1, ensure_ascii=True)
    write_output(path, lambda file: file.write(text.encode()))
