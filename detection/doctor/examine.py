"""The whole examination: from the entries of one or two sets to a `Report`."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from detection.config import DetectionConfig
from detection.core.errors import UserError
from detection.data.classes import ClassSelection
from detection.doctor.box_checks import check_boxes
from detection.doctor.class_checks import check_both, check_classes, chosen_classes
from detection.doctor.duplicates import check_duplicates
from detection.doctor.entries import Entries
from detection.doctor.findings import Example, Finding, in_order, make_finding
from detection.doctor.image_checks import UNSEEN, Looks, check_images, image_files, look_at
from detection.doctor.structure import check_categories, check_structure
from detection.doctor.suitability import (
    DEFAULT,
    Suitability,
    check_suitability,
    examine_anchors,
    free_memory,
    memory_finding,
    predicted_memory,
    setting_of,
)


@dataclass(frozen=True)
class CheckedSet:
    """One split during and after the checks.

    Attributes:
        original: the entries as the file has them.
        normalized: the same rows with boxes as xywh in pixels and image sizes filled in.
        selected: `normalized` after `data.classes`; its annotation and category rows differ.
        images: the probed image files, one per image row.
    """

    original: Entries
    normalized: Entries
    selected: Entries
    images: Looks


@dataclass
class Report:
    """What was found; console, JSON and page are made of it."""

    sets: list[CheckedSet]
    findings: list[Finding] = field(default_factory=list)
    suitability: Suitability | None = None
    memory: dict[str, float] | None = None
    config_name: str | None = None
    read_images: str = "all"
    """"all" (decoded), "headers", or "none" """
    seconds: float = 0.0

    @property
    def exit_code(self) -> int:
        return int(any(found.severity == "error" for found in self.findings))

    def counts(self) -> dict[str, int]:
        return {s: sum(f.severity == s for f in self.findings) for s in ("error", "warning", "note")}


def examine(
    sets: Sequence[Entries],
    config: DetectionConfig | None = None,
    *,
    config_name: str | None = None,
    read_images: str = "all",
    workers: int = 1,
    seen: Sequence[Looks] | None = None,
) -> Report:
    """Examine one set, or train and val.

    Args:
        config: the experiment they are for; without one, anchors are those of configs/retina_ghost_320.yaml.
        config_name: of the config, for people.
        read_images: "all" decodes them, "headers" reads the files without, "none" sees only whether they are there.
        workers: processes that read.
        seen: what was found of the images, where that is known already.
    """
    start = time.perf_counter()
    memory = None
    if config is not None and len(sets[0].category_ids):
        # Before the images: a network that cannot be built should be told of now, not in minutes.
        chosen = chosen_classes(sets[0], config.data.classes)
        memory = predicted_memory(config, max(1, len(chosen.category_ids)))
    seen = seen or [_look(entries, read_images, workers) for entries in sets]
    report = Report([], config_name=config_name, read_images=read_images)
    for entries, looks in zip(sets, seen, strict=True):
        findings, checked = check_set(entries, looks, config.data.classes if config is not None else None)
        report.findings += findings
        report.sets.append(checked)
    plain = [checked.normalized for checked in report.sets]
    if all(len(entries.image_ids) for entries in sets):
        report.findings += check_duplicates(plain, seen)
    trained = [checked.selected for checked in report.sets]
    if len(trained) == 2:
        report.findings += check_both(trained[0], trained[1])
    report.findings += _unlisted(plain)
    setting = setting_of(config, config_name or "config") if config is not None else DEFAULT
    report.suitability = examine_anchors(trained[0], setting)
    if report.suitability is not None:
        # Without a config nobody has said that these anchors are to be used: the numbers are given, and no warning.
        report.findings += check_suitability(report.suitability, plain[0].split) if config is not None else []
    if config is not None and memory is not None:
        report.memory = memory
        report.findings += memory_finding(report.memory["total"], free_memory(config.device), plain[0].split)
    report.findings = in_order(report.findings)
    report.seconds = time.perf_counter() - start
    return report


def check_set(entries: Entries, seen: Looks, classes: ClassSelection | None = None) -> tuple[list[Finding], CheckedSet]:
    """All that concerns one set by itself; `classes` is `data.classes` of its config."""
    findings = check_structure(entries)
    if not len(entries.image_ids) or not len(entries.category_ids):
        return findings, CheckedSet(entries, entries, entries, seen)
    findings += check_categories(entries) + check_images(entries, seen)
    sized = with_sizes(entries, seen)
    of_boxes, plain = check_boxes(sized)
    trained = chosen_classes(plain, classes)
    return findings + of_boxes + check_classes(trained), CheckedSet(entries, plain, trained, seen)


def with_sizes(entries: Entries, seen: Looks) -> Entries:
    """The set with sizes that its file lacks taken from the images."""
    sizes = entries.sizes.copy()
    for row in np.flatnonzero((sizes < 1).any(axis=1)).tolist():
        sizes[row] = seen.upright(row)
    return entries.replace(sizes=sizes)


def _look(entries: Entries, read_images: str, workers: int) -> Looks:
    paths = [entries.path(row) for row in range(len(entries.file_names))]
    if entries.folder is not None and not entries.folder.is_dir():
        raise UserError(
            f"{entries.source}: the folder of its images, {entries.folder}, does not exist; name it with --images"
        )
    if read_images != "none":
        return look_at(paths, workers=workers, decode=read_images == "all", name=f"{entries.split} images")
    nothing = look_at([None] * len(paths), workers=1)
    there = [path is None or os.path.isfile(path) for path in paths]
    looks = [UNSEEN if found else UNSEEN._replace(status="missing") for found in there]
    return Looks(looks, nothing.thumbs, 0.0, False)


def _unlisted(sets: Sequence[Entries]) -> list[Finding]:
    """Images in a folder that no set names; where another file beside may name them, nothing is said."""
    if sets[0].format != "coco" or sets[0].split == "data":
        return []
    found = []
    for folder in dict.fromkeys(entries.folder for entries in sets if entries.folder is not None):
        own = [entries for entries in sets if entries.folder == folder]
        named = {name.replace("\\", "/") for entries in own for name in entries.file_names}
        extra = [name for name in image_files(folder) if name not in named]
        if extra:
            split = own[0].split if len(own) == 1 else "train and val"
            examples = [Example(text=str(folder / name)) for name in sorted(extra)]
            found.append(make_finding("image-unlisted", split, len(extra), examples, detail=f"in {folder}"))
    return found
