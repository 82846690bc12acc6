"""Checks of the structure of an annotation file: ids, references between its lists, and missing values."""

import numpy as np

from detection.doctor.entries import Entries
from detection.doctor.findings import Example, Finding, make_finding


def check_structure(entries: Entries) -> list[Finding]:
    """Check ids, references and image sizes; includes the findings from parsing."""
    if not len(entries.image_ids):
        return [*entries.parse_findings, make_finding("no-images", entries.split, 0)]
    if not len(entries.category_ids):
        return [*entries.parse_findings, make_finding("no-categories", entries.split, 0)]
    findings = list(entries.parse_findings)

    def image_id(row: int) -> str:
        return f"image id {entries.image_ids[row]}"

    twice = repeated_rows(entries.image_ids)
    if len(twice):
        findings.append(entries.image_finding("image-id-twice", twice, image_id))
    # Repeated entries with the same id are already reported as image-id-twice.
    listed = np.setdiff1d(repeated_rows(entries.file_names), twice)
    if len(listed):
        findings.append(entries.image_finding("image-listed-twice", listed, image_id))
    if entries.rows_outside_folder:
        findings.append(entries.image_finding("image-outside", np.array(sorted(entries.rows_outside_folder))))
    unknown = dangling_annotations(entries, entries.image_rows)
    if len(unknown):
        findings.append(entries.box_finding("image-unknown", unknown))
    unknown = dangling_annotations(entries, entries.category_rows)
    if len(unknown):
        findings.append(entries.box_finding("category-unknown", unknown))
    numbered = np.where(entries.unreadable, -np.arange(len(entries.unreadable)) - 1, entries.annotation_ids)
    bad_ids = np.setdiff1d(
        np.union1d(np.flatnonzero(numbered < 1), repeated_rows(numbered)), np.flatnonzero(entries.unreadable)
    )
    if len(bad_ids) and entries.format == "coco":
        findings.append(
            entries.box_finding(
                "annotation-ids", bad_ids, lambda row: f"id {entries.annotation_ids[row]}", total=len(entries.boxes)
            )
        )
    sizeless = np.flatnonzero((entries.sizes < 1).any(axis=1) & (entries.file_names != ""))
    if len(sizeless):
        findings.append(entries.image_finding("size-missing", sizeless))
    return findings


def check_categories(entries: Entries) -> list[Finding]:
    """Check the ids and names of the classes."""
    findings = []
    names = np.array(entries.category_names, object)
    ids = entries.category_ids
    twice = repeated_rows(ids)
    if len(twice):
        examples = [Example(text=f"id {ids[row]}: {_quoted(names[ids == ids[row]])}") for row in twice.tolist()]
        findings.append(make_finding("category-id-twice", entries.split, len(twice), examples))
    same = np.setdiff1d(repeated_rows(names), twice)
    if len(same):
        examples = [Example(text=f"{names[row]!r}: ids {_join(ids[names == names[row]])}") for row in same.tolist()]
        findings.append(make_finding("class-name-twice", entries.split, len(same), examples))
    normalized = np.array(["".join(c for c in name.casefold() if c.isalnum()) for name in names], object)
    similar = []
    for row in repeated_rows(normalized).tolist():
        group = sorted(set(names[normalized == normalized[row]]))
        # Names without letters and digits, like + and -, have an empty normalized name.
        if len(group) > 1 and normalized[row]:
            similar.append(Example(text=_quoted(group)))
    if similar:
        findings.append(make_finding("class-names-alike", entries.split, len(similar), similar))
    known = ids[ids >= 0]
    if len(known) and len(set(known.tolist())) == len(known) and known.max() - known.min() + 1 > len(known):
        missing = np.setdiff1d(np.arange(known.min(), min(known.max(), known.min() + 100_000)), known)
        gaps = int(known.max() - known.min() + 1 - len(known))
        more = ", …" if gaps > 8 else ""
        findings.append(
            make_finding("class-id-gaps", entries.split, gaps, detail=", ".join(map(str, missing[:8])) + more)
        )
    return findings


def repeated_rows(values: np.ndarray) -> np.ndarray:
    """Rows whose value occurs in an earlier row. Negative numbers and "" are missing values and do not count."""
    _, first, inverse = np.unique(values.astype(str) if values.dtype == object else values, True, True)
    rows = np.flatnonzero(first[inverse.reshape(-1)] != np.arange(len(values)))
    missing = [not values[row] if values.dtype == object else values[row] < 0 for row in rows]
    return rows[~np.array(missing, bool)]


def dangling_annotations(entries: Entries, rows: np.ndarray) -> np.ndarray:
    """Annotations whose image or category is not listed; `rows` is `image_rows` or `category_rows`."""
    return np.flatnonzero((rows < 0) & ~entries.unreadable)


def _quoted(names: np.ndarray | list[str]) -> str:
    return ", ".join(repr(str(name)) for name in names)


def _join(values: np.ndarray) -> str:
    return ", ".join(map(str, values.tolist()))
