"""Ids that do not fit together, and what a file leaves out."""

import numpy as np

from detection.doctor.entries import Entries
from detection.doctor.findings import Example, Finding, make_finding


def check_structure(entries: Entries) -> list[Finding]:
    """Faults of the file, without a look at images, boxes and classes; those found in reading are among them."""
    if not len(entries.image_ids):
        return [*entries.parse_findings, make_finding("no-images", entries.split, 0)]
    if not len(entries.category_ids):
        return [*entries.parse_findings, make_finding("no-categories", entries.split, 0)]
    found = list(entries.parse_findings)
    twice = again(entries.image_ids)
    if len(twice):
        found.append(entries.image_finding("image-id-twice", twice, lambda row: f"image id {entries.image_ids[row]}"))
    # An entry that is there as a whole twice has been told of as an id.
    listed = np.setdiff1d(again(entries.file_names), twice)
    if len(listed):
        found.append(
            entries.image_finding("image-listed-twice", listed, lambda row: f"image id {entries.image_ids[row]}")
        )
    if entries.rows_outside_folder:
        found.append(entries.image_finding("image-outside", np.array(sorted(entries.rows_outside_folder))))
    unknown = lost_annotations(entries, entries.image_rows)
    if len(unknown):
        found.append(entries.box_finding("image-unknown", unknown))
    unknown = lost_annotations(entries, entries.category_rows)
    if len(unknown):
        found.append(entries.box_finding("category-unknown", unknown))
    numbered = np.where(entries.unreadable, -np.arange(len(entries.unreadable)) - 1, entries.annotation_ids)
    bad_ids = np.setdiff1d(
        np.union1d(np.flatnonzero(numbered < 1), again(numbered)), np.flatnonzero(entries.unreadable)
    )
    if len(bad_ids) and entries.format == "coco":
        found.append(
            entries.box_finding(
                "annotation-ids", bad_ids, lambda row: f"id {entries.annotation_ids[row]}", total=len(entries.boxes)
            )
        )
    sizeless = np.flatnonzero((entries.sizes < 1).any(axis=1) & (entries.file_names != ""))
    if len(sizeless):
        found.append(entries.image_finding("size-missing", sizeless))
    return found


def check_categories(entries: Entries) -> list[Finding]:
    """Ids and names of the classes."""
    found = []
    names = np.array(entries.category_names, object)
    ids = entries.category_ids
    twice = again(ids)
    if len(twice):
        examples = [Example(text=f"id {ids[row]}: {_quoted(names[ids == ids[row]])}") for row in twice.tolist()]
        found.append(make_finding("category-id-twice", entries.split, len(twice), examples))
    same = np.setdiff1d(again(names), twice)
    if len(same):
        examples = [Example(text=f"{names[row]!r}: ids {_listed(ids[names == names[row]])}") for row in same.tolist()]
        found.append(make_finding("class-name-twice", entries.split, len(same), examples))
    plain = np.array(["".join(c for c in name.casefold() if c.isalnum()) for name in names], object)
    alike = []
    for row in again(plain).tolist():
        group = sorted(set(names[plain == plain[row]]))
        # Names of signs alone, like + and -, differ in what was left out.
        if len(group) > 1 and plain[row]:
            alike.append(Example(text=_quoted(group)))
    if alike:
        found.append(make_finding("class-names-alike", entries.split, len(alike), alike))
    known = ids[ids >= 0]
    if len(known) and len(set(known.tolist())) == len(known) and known.max() - known.min() + 1 > len(known):
        missing = np.setdiff1d(np.arange(known.min(), min(known.max(), known.min() + 100_000)), known)
        gaps = int(known.max() - known.min() + 1 - len(known))
        more = ", …" if gaps > 8 else ""
        found.append(make_finding("class-id-gaps", entries.split, gaps, detail=", ".join(map(str, missing[:8])) + more))
    return found


def again(values: np.ndarray) -> np.ndarray:
    """Rows of values that were there before; what stands for nothing (below 0, "") does not count."""
    _, first, inverse = np.unique(values.astype(str) if values.dtype == object else values, True, True)
    rows = np.flatnonzero(first[inverse.reshape(-1)] != np.arange(len(values)))
    nothing = [not values[row] if values.dtype == object else values[row] < 0 for row in rows]
    return rows[~np.array(nothing, bool)]


def lost_annotations(entries: Entries, rows: np.ndarray) -> np.ndarray:
    """Annotations whose image or category (`rows` of either) is not there, those that name none at all left out."""
    return np.flatnonzero((rows < 0) & ~entries.unreadable)


def _quoted(names: np.ndarray | list[str]) -> str:
    return ", ".join(repr(str(name)) for name in names)


def _listed(values: np.ndarray) -> str:
    return ", ".join(map(str, values.tolist()))
