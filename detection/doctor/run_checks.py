"""Run all checks on one split, or on train and val, and collect the results in a `Report`."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from detection.config import DetectionConfig
from detection.core.errors import UserError
from detection.data.classes import ClassSelection
from detection.doctor.anchor_checks import (
    DEFAULT_ANCHOR_CONFIG,
    FINEST_STRIDE,
    AnchorCoverage,
    anchor_config_of,
    check_anchor_coverage,
    measure_anchor_coverage,
)
from detection.doctor.box_checks import check_boxes
from detection.doctor.class_checks import (
    check_classes,
    check_sets,
    check_train_and_val,
    complete_classes,
    select_classes,
)
from detection.doctor.duplicate_checks import check_duplicates
from detection.doctor.entries import Entries
from detection.doctor.findings import Example, Finding, make_finding, sort_findings
from detection.doctor.image_checks import UNPROBED, ProbedImages, check_images, list_image_files, probe_images
from detection.doctor.memory_checks import check_memory, free_memory, predict_training_memory
from detection.doctor.structure_checks import check_categories, check_structure


@dataclass(frozen=True)
class CheckedDataset:
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
    images: ProbedImages


@dataclass
class Report:
    """The result of all checks; the text, JSON and HTML reports are made from it."""

    sets: list[CheckedDataset]
    """one, or train and val, of which each may be several"""
    complete: dict[str, np.ndarray] = field(default_factory=dict)
    """Of a config with a list of training sets, see `complete_classes`."""
    findings: list[Finding] = field(default_factory=list)
    anchor_coverage: AnchorCoverage | None = None
    """None without boxes, and for detectors without anchors"""
    memory: dict[str, float] | None = None
    """see `predict_training_memory`"""
    config_name: str | None = None
    read_images: str = "all"
    """see `run_checks`"""
    seconds: float = 0.0

    @property
    def exit_code(self) -> int:
        """1 if any finding is an error, else 0."""
        return int(any(found.severity == "error" for found in self.findings))

    def counts(self) -> dict[str, int]:
        """Number of findings of each severity."""
        return {s: sum(f.severity == s for f in self.findings) for s in ("error", "warning", "note")}


def run_checks(
    sets: Sequence[Entries],
    config: DetectionConfig | None = None,
    *,
    config_name: str | None = None,
    read_images: str = "all",
    workers: int = 1,
    images: Sequence[ProbedImages] | None = None,
) -> Report:
    """Check one split, or train and val.

    Args:
        config: the experiment that will use the data. Without it, the anchors are those of
            configs/retina_ghost_320.yaml, and they cause no findings.
        config_name: name of the config in the report.
        read_images: "all" reads and decodes the images, "headers" reads the files without decoding them, "none" only
            checks that the files exist.
        workers: number of processes that read images.
        images: the probed images of each split, to skip reading them.

    Raises:
        UserError: an image folder does not exist, or the model of the config cannot be built.
    """
    start = time.perf_counter()
    memory, complete = None, {}
    if config is not None and len(sets[0].category_ids):
        # Before the images are read, which may take minutes: a model that cannot be built raises here.
        complete = complete_classes([entries for entries in sets if entries.role == "train"], config.data)
        memory = predict_training_memory(config, max(1, len(complete)))
    images = images or [_probe_set(entries, read_images, workers) for entries in sets]
    report = Report([], config_name=config_name, read_images=read_images)
    for entries, probed in zip(sets, images, strict=True):
        findings, checked = check_set(entries, probed, config.data.classes if config is not None else None)
        report.findings += findings
        report.sets.append(checked)
    normalized = [checked.normalized for checked in report.sets]
    if all(len(entries.image_ids) for entries in sets):
        report.findings += check_duplicates(normalized, images)
    selections = [checked.selected for checked in report.sets]
    if config is not None and config.data.has_lists:
        roles = [[entries for entries in selections if entries.role == role] for role in ("train", "val")]
        report.complete = complete
        report.findings += check_sets(roles[0], roles[1], complete)
    elif len(selections) == 2:
        report.findings += check_train_and_val(selections[0], selections[1])
    report.findings += _check_unlisted_images(normalized)
    # Of several training sets the one with the most boxes speaks for all.
    largest = max((entries for entries in selections if entries.role != "val"), key=lambda entries: entries.valid.sum())
    anchor_config = anchor_config_of(config, config_name or "config") if config is not None else DEFAULT_ANCHOR_CONFIG
    if anchor_config.detector in FINEST_STRIDE:  # ghostdet has no anchors
        report.anchor_coverage = measure_anchor_coverage(largest, anchor_config)
    if report.anchor_coverage is not None and config is not None:
        report.findings += check_anchor_coverage(report.anchor_coverage, largest.split)
    if config is not None and memory is not None:
        report.memory = memory
        report.findings += check_memory(memory["total"], free_memory(config.device), normalized[0].split)
    report.findings = sort_findings(report.findings)
    report.seconds = time.perf_counter() - start
    return report


def check_set(
    entries: Entries, images: ProbedImages, classes: ClassSelection | None = None
) -> tuple[list[Finding], CheckedDataset]:
    """Run the checks that need one split only; `classes` is `data.classes` of the config."""
    findings = check_structure(entries)
    if not len(entries.image_ids) or not len(entries.category_ids):
        return findings, CheckedDataset(entries, entries, entries, images)
    findings += check_categories(entries) + check_images(entries, images)
    box_findings, normalized = check_boxes(with_sizes(entries, images))
    selected = select_classes(normalized, classes)
    return findings + box_findings + check_classes(selected), CheckedDataset(entries, normalized, selected, images)


def with_sizes(entries: Entries, images: ProbedImages) -> Entries:
    """Fill in missing image sizes from the image files."""
    sizes = entries.sizes.copy()
    for row in np.flatnonzero((sizes < 1).any(axis=1)).tolist():
        sizes[row] = images.upright_size(row)
    return entries.replace(sizes=sizes)


def _probe_set(entries: Entries, read_images: str, workers: int) -> ProbedImages:
    paths = [entries.path(row) for row in range(len(entries.file_names))]
    if entries.folder is not None and not entries.folder.is_dir():
        raise UserError(f"{entries.source}: the image folder {entries.folder} does not exist; set it with --images")
    if read_images != "none":
        return probe_images(paths, workers=workers, decode=read_images == "all", name=f"{entries.split} images")
    unprobed = probe_images([None] * len(paths), workers=1)
    exists = [path is None or os.path.isfile(path) for path in paths]
    probes = [UNPROBED if found else UNPROBED._replace(status="missing") for found in exists]
    return ProbedImages(probes, unprobed.thumbnails, 0.0, False)


def _check_unlisted_images(sets: Sequence[Entries]) -> list[Finding]:
    """Images in a folder that no annotation file lists.

    Only if train and val are both known: another file may list the images of a single dataset.
    """
    if sets[0].format != "coco" or sets[0].split == "data":
        return []
    findings = []
    for folder in dict.fromkeys(entries.folder for entries in sets if entries.folder is not None):
        in_folder = [entries for entries in sets if entries.folder == folder]
        listed = {name.replace("\\", "/") for entries in in_folder for name in entries.file_names}
        unlisted = [name for name in list_image_files(folder) if name not in listed]
        if unlisted:
            split = in_folder[0].split if len(in_folder) == 1 else "train and val"
            examples = [Example(text=str(folder / name)) for name in sorted(unlisted)]
            findings.append(make_finding("image-unlisted", split, len(unlisted), examples, detail=f"in {folder}"))
    return findings
