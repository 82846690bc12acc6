"""Read the dataset that a config, a file or a folder names, as `Entries`: one split, or train and val."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detection.config import DetectionConfig
from detection.config_io import load_config
from detection.core.errors import UserError
from detection.core.files import open_regular_file
from detection.data.formats import coco, voc, yolo
from detection.data.formats.detect_format import detect_format, read_raw
from detection.data.formats.raw import RawAnnotations, printable
from detection.data.source_paths import check_source_paths
from detection.doctor.entries import Entries, entries_from_coco
from detection.doctor.findings import Example, Finding, make_finding

ISSUE_CODES = {
    "bad_class": "category-unknown",
    "bad_box": "box-not-numbers",
    "no_size": "size-missing",
    "bad_size": "size-missing",
    "not_readable": "file-broken",
    "unknown_image": "image-missing",
    "no_labels": "no-boxes",
}
"""Finding code for each `detection.data.formats.raw.Issue.kind`; all other kinds are entry-broken."""


def read_sets(
    target: str,
    *,
    images: str | None = None,
    val: str | None = None,
    val_images: str | None = None,
    overrides: Sequence[str] = (),
) -> tuple[list[Entries], DetectionConfig | None]:
    """Read the dataset, as [data] or [train, val], and the config if `target` is one.

    Of a config with lists of sets, all of them are read, those of train first.

    Args:
        target: a config, a COCO file, a YOLO data.yaml, a VOC image set file, or a folder that contains one of them.
        images, val_images: image folders, if they are not in the format's usual place.
        val: file or folder of the validation split, if `target` holds only the training split.
        overrides: key=value pairs for a config.

    Raises:
        UserError: `target` does not exist, has an unknown format, or cannot be read.
    """
    path = Path(target)
    if is_config(path):
        if val is not None or val_images is not None or images is not None:
            raise UserError(
                f"{target} is a config, which names its own datasets: --images and --val are for files and folders"
            )
        config = load_config(path, overrides)
        check_source_paths(config)
        sets = []
        for split in ("train", "val"):
            for key, source in config.data.sources(split).items():
                name = key.removeprefix("data.")
                sets.append(read_set(source.annotations, name, source.images, source.format, source.split or split))
        return (sets if config.data.has_lists else with_common_classes(sets)), config
    if overrides:
        raise UserError(f"{overrides[0]}: overrides are for configs, and {target} is not a config")
    if val is not None:
        train = read_set(target, "train", images, split="train" if path.is_dir() else None)
        other = read_set(val, "val", val_images or images, split="val" if Path(val).is_dir() else None)
        return with_common_classes([train, other]), None
    splits = splits_in(path)
    if len(splits) == 2:
        return with_common_classes([read_set(target, split, images, split=split) for split in splits]), None
    return [read_set(target, "data", images, split=splits[0] if splits else None)], None


def with_common_classes(sets: list[Entries]) -> list[Entries]:
    """Give VOC splits the same class list, the union of their class names: VOC files contain no list of classes."""
    if any(entries.format != "voc" for entries in sets):
        return sets
    names = tuple(sorted({name for entries in sets for name in entries.category_names}))
    ids = np.arange(1, len(names) + 1)
    result = []
    for entries in sets:
        # The last element maps category row -1 to itself.
        new_rows = np.array([*(names.index(name) for name in entries.category_names), -1])
        rows = new_rows[entries.category_rows]
        result.append(entries.replace(category_ids=ids, category_names=names, category_rows=rows))
    return result


def is_config(path: Path) -> bool:
    """Whether the path is a YAML file other than a YOLO data.yaml; True for a YAML file that cannot be read."""
    if path.suffix.lower() not in (".yaml", ".yml"):
        return False
    try:
        content = yolo.read_yaml(path)
    except UserError:
        return True  # load_config reports the error
    return "names" not in content or "data" in content


def splits_in(path: Path) -> list[str]:
    """["train", "val"] if a folder or data.yaml has both; otherwise its first split, or [] if it has no splits."""
    kind = detect_format(path)
    if kind == "yolo":
        found = yolo.splits_of(path)
    elif kind == "voc" and path.is_dir():
        found = voc.splits_of(path)
    elif kind == "coco" and path.is_dir():
        files = [coco.split_of(file) for file in coco.files_of(path)]
        found = [split for split in ("train", "val") if files.count(split) == 1]
    else:
        return []
    standard: list[str] = [split for split in ("train", "val") if split in found]
    return standard or found[:1]


def read_set(
    annotations: str | Path, name: str, images: str | None = None, format: str = "auto", split: str | None = None
) -> Entries:
    """Read one split; `name` ("train", "val" or "data") becomes its `Entries.split`."""
    path = Path(annotations)
    kind = detect_format(path) if format == "auto" else format
    if kind != "coco":
        return entries_from_raw(read_raw(path, images=images, format=kind, split=split), name)
    path = coco.find_file(path, split)
    raw = coco.parse_coco(path, images)
    if not raw.problems.count:
        return entries_from_raw(raw, name)
    # parse_coco drops entries that its arrays cannot hold; entries_from_coco keeps them.
    return entries_from_coco(read_json(path), str(path), name, raw.images)


def read_json(path: Path) -> Any:
    """The parsed content of a JSON file. Raises UserError if it cannot be read or is not JSON."""
    try:
        with open_regular_file(path, "annotation file") as file:
            return json.loads(file.read())
    except OSError as error:
        raise UserError(f"annotation file {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"annotation file {path} is not JSON: {error}") from None


def entries_from_raw(raw: RawAnnotations, name: str) -> Entries:
    """Convert the result of a format's reader to `Entries`; its issues become `parse_findings`."""
    order = np.argsort(raw.image_ids, kind="stable")
    categories = np.array([number for number, _ in raw.categories], np.int64)
    numbers = raw.box_numbers if raw.format == "coco" else np.arange(1, len(raw.boxes) + 1)
    entries = Entries(
        split=name,
        source=raw.source,
        folder=raw.images,
        file_names=raw.file_names.astype(object),
        image_ids=raw.image_ids,
        sizes=raw.sizes,
        category_ids=categories,
        category_names=tuple(printable(text) for _, text in raw.categories),
        annotation_ids=np.where(numbers > 0, numbers, 0),
        image_rows=_rows_of_ids(raw.image_ids, order, raw.box_images),
        category_rows=_rows_of_ids(categories, np.argsort(categories, kind="stable"), raw.box_categories),
        boxes=np.where(np.isfinite(raw.boxes).all(axis=1, keepdims=True), raw.boxes, np.nan),
        areas=raw.areas,
        crowd=raw.crowd == 1,
        format=raw.format,
    )
    findings = _issue_findings(raw, name)
    if not np.isfinite(entries.boxes).all():
        findings.append(entries.box_finding("box-not-numbers", np.flatnonzero(np.isnan(entries.boxes[:, 0]))))
    if raw.format == "coco":
        for code, count in (("area-missing", np.isnan(raw.areas).sum()), ("crowd-missing", (raw.crowd < 0).sum())):
            if count:
                findings.append(make_finding(code, name, int(count), total=len(raw.boxes)))
    return entries.replace(parse_findings=tuple(findings))


def _rows_of_ids(ids: np.ndarray, order: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The first row of each wanted id, or -1; `order` sorts `ids` stably."""
    if not len(ids):
        return np.full(len(wanted), -1, np.int64)
    places = np.minimum(np.searchsorted(ids, wanted, sorter=order), len(ids) - 1)
    rows = order[places]
    return np.where(ids[rows] == wanted, rows, -1)


def _issue_findings(raw: RawAnnotations, name: str) -> list[Finding]:
    groups: dict[tuple[str, bool], list[Example]] = {}
    for problem in raw.problems:
        code = ISSUE_CODES.get(problem.kind, "entry-broken")
        example = Example(image=problem.image, text=problem.message)
        groups.setdefault((code, problem.fatal), []).append(example)
    return [
        make_finding(
            code, name, len(examples), examples, detail=examples[0].text, severity=None if fatal else "warning"
        )
        for (code, fatal), examples in groups.items()
    ]
