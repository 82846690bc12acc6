"""From what a user names – a config, a file, a folder – to the `Entries` of its sets."""

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
from detection.doctor.entries import Entries, coco_entries
from detection.doctor.findings import Example, Finding, finding

CODES = {
    "bad_class": "category-unknown",
    "bad_box": "box-not-numbers",
    "no_size": "size-missing",
    "bad_size": "size-missing",
    "not_readable": "file-broken",
    "unknown_image": "image-missing",
    "no_labels": "no-boxes",
}
"""What the kinds of `detection.data.formats.raw.Issue` are called here; others are entry-broken."""


def read_sets(
    target: str,
    *,
    images: str | None = None,
    val: str | None = None,
    val_images: str | None = None,
    overrides: Sequence[str] = (),
) -> tuple[list[Entries], DetectionConfig | None]:
    """The set or the two sets (train first) that are named, and the config where one is.

    Args:
        target: a config; a COCO file; data.yaml of YOLO; an image set of VOC; or a folder with any of them.
        images, val_images: folders of the images, where they are not where the format has them.
        val: the file or folder of the validation set, where `target` is a set by itself.
        overrides: key=value for a config.

    Raises:
        UserError: absent, of no known format, not to be read at all.
    """
    path = Path(target)
    if is_config(path):
        if val is not None or val_images is not None or images is not None:
            raise UserError(
                f"{target} is a config, which names its own sets: --images and --val are for files and folders"
            )
        config = load_config(path, overrides)
        check_source_paths(config)
        sets = []
        for split in ("train", "val"):
            source = getattr(config.data, split)
            sets.append(read_set(source.annotations, split, source.images, source.format, source.split or split))
        return with_same_names(sets), config
    if overrides:
        raise UserError(f"{overrides[0]}: overrides are for configs, and {target} is none")
    if val is not None:
        train = read_set(target, "train", images, split="train" if path.is_dir() else None)
        other = read_set(val, "val", val_images or images, split="val" if Path(val).is_dir() else None)
        return with_same_names([train, other]), None
    splits = splits_in(path)
    if len(splits) == 2:
        return with_same_names([read_set(target, split, images, split=split) for split in splits]), None
    return [read_set(target, "data", images, split=splits[0] if splits else None)], None


def with_same_names(sets: list[Entries]) -> list[Entries]:
    """VOC's files tell no list of classes; the names of both sets together are that of each (`data.classes`)."""
    if any(raw.format != "voc" for raw in sets):
        return sets
    names = sorted({name for raw in sets for name in raw.category_names})
    result = []
    for raw in sets:
        place = np.array([*(names.index(name) for name in raw.category_names), -1])
        numbers = np.arange(1, len(names) + 1)
        result.append(raw.changed(category_ids=numbers, category_names=tuple(names), categories=place[raw.categories]))
    return result


def is_config(path: Path) -> bool:
    """Whether it is a YAML file that is not YOLO's data.yaml, or none that is there."""
    if path.suffix.lower() not in (".yaml", ".yml"):
        return False
    try:
        content = yolo.read_yaml(path)
    except UserError:
        return True  # load_config says what is wrong with it
    return "names" not in content or "data" in content


def splits_in(path: Path) -> list[str]:
    """["train", "val"] where a folder or data.yaml has both; else the one it has, or none where it has no splits."""
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
    usual: list[str] = [split for split in ("train", "val") if split in found]
    return usual or found[:1]


def read_set(
    annotations: str | Path, name: str, images: str | None = None, format: str = "auto", split: str | None = None
) -> Entries:
    """One set under the name train, val or data."""
    path = Path(annotations)
    kind = detect_format(path) if format == "auto" else format
    if kind != "coco":
        return entries_of(read_raw(path, images=images, format=kind, split=split), name)
    path = coco.find_file(path, split)
    raw = coco.parse_coco(path, images)
    if not raw.problems.count:
        return entries_of(raw, name)
    # The fast reader leaves out what it cannot hold. Here each entry counts.
    return coco_entries(read_json(path), str(path), name, raw.images)


def read_json(path: Path) -> Any:
    """The whole content of a COCO file. Raises UserError."""
    try:
        with open_regular_file(path, "annotation file") as file:
            return json.loads(file.read())
    except OSError as error:
        raise UserError(f"annotation file {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"annotation file {path} is not JSON: {error}") from None


def entries_of(raw: RawAnnotations, name: str) -> Entries:
    """What a format's reader gave as `Entries`; what it could not read becomes findings."""
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
        images=_find(raw.image_ids, order, raw.box_images),
        categories=_find(categories, np.argsort(categories, kind="stable"), raw.box_categories),
        boxes=np.where(np.isfinite(raw.boxes).all(axis=1, keepdims=True), raw.boxes, np.nan),
        areas=raw.areas,
        crowd=raw.crowd == 1,
        format=raw.format,
    )
    faults = _problems(raw, name)
    if not np.isfinite(entries.boxes).all():
        faults.append(entries.box_finding("box-not-numbers", np.flatnonzero(np.isnan(entries.boxes[:, 0]))))
    if raw.format == "coco":
        for code, count in (("area-missing", np.isnan(raw.areas).sum()), ("crowd-missing", (raw.crowd < 0).sum())):
            if count:
                faults.append(finding(code, name, int(count), total=len(raw.boxes)))
    return entries.changed(faults=tuple(faults))


def _find(ids: np.ndarray, order: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The first row that has each wanted id, or -1."""
    if not len(ids):
        return np.full(len(wanted), -1, np.int64)
    places = np.minimum(np.searchsorted(ids, wanted, sorter=order), len(ids) - 1)
    rows = order[places]
    return np.where(ids[rows] == wanted, rows, -1)


def _problems(raw: RawAnnotations, name: str) -> list[Finding]:
    groups: dict[tuple[str, bool], list[Example]] = {}
    for problem in raw.problems:
        code = CODES.get(problem.kind, "entry-broken")
        example = Example(image=problem.image, text=problem.message)
        groups.setdefault((code, problem.fatal), []).append(example)
    return [
        finding(code, name, len(examples), examples, detail=examples[0].text, severity=None if fatal else "warning")
        for (code, fatal), examples in groups.items()
    ]
