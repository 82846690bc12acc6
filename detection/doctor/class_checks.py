"""Checks of the number of boxes per class and per image, and comparison of the classes of train and val."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from detection.config import DataConfig
from detection.data.classes import ClassSelection
from detection.data.combine import complete_mask
from detection.doctor.entries import Entries
from detection.doctor.findings import Example, Finding, make_finding

FEW_BOXES = 20
"""Number of training boxes below which a class hardly learns."""
IMBALANCE_RATIO = 50
"""Ratio of boxes between the most frequent and the rarest class."""


def select_classes(entries: Entries, chosen: ClassSelection | None) -> Entries:
    """Apply `data.classes`: drop the boxes of other classes, merge grouped classes.

    Class names that the dataset does not have are ignored; `detection.data.classes.choose_classes` rejects them.
    """
    if chosen is None:
        return entries
    groups = chosen if isinstance(chosen, Mapping) else {name: [name] for name in chosen}
    group_of = {member: new for new, members in groups.items() for member in members}
    first: dict[str, int] = {}
    for row in np.argsort(entries.category_ids, kind="stable").tolist():
        if entries.category_names[row] in group_of:
            first.setdefault(group_of[entries.category_names[row]], row)
    names = list(first)
    # The last element maps category row -1 to itself.
    new_rows = np.array([*(names.index(group_of[n]) if n in group_of else -1 for n in entries.category_names), -1])
    categories = new_rows[entries.category_rows]
    keep = categories >= 0
    return entries.replace(
        category_ids=entries.category_ids[list(first.values())],
        category_names=tuple(names),
        category_rows=categories[keep],
        annotation_ids=entries.annotation_ids[keep],
        image_rows=entries.image_rows[keep],
        boxes=entries.boxes[keep],
        areas=entries.areas[keep],
        crowd=entries.crowd[keep],
    )


def class_counts(entries: Entries) -> tuple[np.ndarray, np.ndarray]:
    """int [k], int [k]: number of boxes of each category (without crowd regions), and of images that contain one."""
    rows = np.flatnonzero(entries.valid & (entries.category_rows >= 0))
    boxes = np.bincount(entries.category_rows[rows], minlength=len(entries.category_ids))
    pairs = np.unique(np.stack([entries.category_rows[rows], entries.image_rows[rows]], axis=1), axis=0)
    return boxes, np.bincount(pairs[:, 0], minlength=len(entries.category_ids))


def boxes_per_image(entries: Entries) -> np.ndarray:
    """int [n]: number of boxes in each image, without crowd regions."""
    return np.bincount(entries.image_rows[entries.valid], minlength=len(entries.image_ids))


def check_classes(entries: Entries) -> list[Finding]:
    """Check the classes of one split."""
    if not (entries.valid & (entries.category_rows >= 0)).any():
        return [make_finding("no-boxes", entries.split, 0)]
    findings = []
    boxes, images = class_counts(entries)
    names = entries.category_names
    unused = np.flatnonzero(boxes == 0)
    if len(unused):
        findings.append(
            make_finding(
                "class-unused", entries.split, len(unused), detail=_join_names(names, unused), total=len(names)
            )
        )
    few = np.flatnonzero((boxes > 0) & (boxes < FEW_BOXES))
    if len(few) and entries.role != "val":
        few = few[np.argsort(boxes[few], kind="stable")]
        examples = [Example(text=f"{names[row]}: {boxes[row]} boxes in {images[row]} images") for row in few.tolist()]
        detail = ", ".join(f"{names[row]} ({boxes[row]})" for row in few[:6].tolist()) + (", …" if len(few) > 6 else "")
        findings.append(make_finding("class-few", entries.split, len(few), examples, detail=detail, total=len(names)))
    used = np.flatnonzero(boxes)
    rarest, most_frequent = used[np.argmin(boxes[used])], used[np.argmax(boxes[used])]
    if boxes[most_frequent] >= IMBALANCE_RATIO * boxes[rarest]:
        detail = f"{names[most_frequent]} {boxes[most_frequent]}, {names[rarest]} {boxes[rarest]}"
        findings.append(
            make_finding("class-imbalance", entries.split, round(boxes[most_frequent] / boxes[rarest]), detail=detail)
        )
    empty = np.flatnonzero(boxes_per_image(entries) == 0)
    if len(empty):
        findings.append(entries.image_finding("image-without-boxes", empty, total=len(entries.image_ids)))
    return findings


def check_sets(train: Sequence[Entries], val: Sequence[Entries], complete: Mapping[str, np.ndarray]) -> list[Finding]:
    """Compare the classes of several sets of train and val, which belong together by name.

    Args:
        complete: see `complete_classes`.
    """
    findings: list[Finding] = []
    known = {name for entries in train for name in entries.category_names}
    unknown = [(entries, name) for entries in val for name in entries.category_names if name not in known]
    if unknown:
        examples = [Example(text=f"{name!r} in {entries.split}, in no set of train") for entries, name in unknown]
        detail = examples[0].text
        findings.append(make_finding("classes-differ", "train and val", len(unknown), examples, detail=detail))
    nowhere = [name for name, sets in complete.items() if not sets.any()]
    if nowhere:
        detail, total = _join_names(nowhere, np.arange(len(nowhere))), len(complete)
        findings.append(make_finding("class-complete-nowhere", "train", len(nowhere), detail=detail, total=total))
    return findings + _check_only_one([_counts_by_name(train), _counts_by_name(val)])


def complete_classes(train: Sequence[Entries], data: DataConfig) -> dict[str, np.ndarray]:
    """For each class after `data.classes` whether the sets of train are complete for it: bool [s]."""
    names = tuple(dict.fromkeys(name for entries in train for name in entries.category_names))
    masks = [
        complete_mask(entries.category_names, source, names)
        for entries, source in zip(train, data.train_sources(), strict=True)
    ]
    of_name = dict(zip(names, np.stack(masks, axis=1), strict=True))
    if data.classes is None:
        return of_name
    groups = data.classes if isinstance(data.classes, Mapping) else {name: [name] for name in data.classes}
    known = {new: [of_name[name] for name in members if name in of_name] for new, members in groups.items()}
    return {new: np.all(members, axis=0) for new, members in known.items() if members}


def check_train_and_val(train: Entries, val: Entries) -> list[Finding]:
    """Compare the categories of train and val."""
    pairs = [dict(zip(entries.category_ids.tolist(), entries.category_names, strict=True)) for entries in (train, val)]
    differ = [i for i in sorted(set(pairs[0]) | set(pairs[1])) if pairs[0].get(i) != pairs[1].get(i)]
    if differ:
        examples = [
            Example(text=f"id {i}: {pairs[0].get(i, 'nothing')!r} in train, {pairs[1].get(i, 'nothing')!r} in val")
            for i in differ
        ]
        return [make_finding("classes-differ", "train and val", len(differ), examples, detail=examples[0].text)]
    return _check_only_one([_counts_by_name([train]), _counts_by_name([val])])


def _counts_by_name(sets: Sequence[Entries]) -> Counter[str]:
    """Boxes of each class, also 0."""
    counts: Counter[str] = Counter()
    for entries in sets:
        counts.update(dict(zip(entries.category_names, class_counts(entries)[0].tolist(), strict=True)))
    return counts


def _check_only_one(counts: Sequence[Mapping[str, int]]) -> list[Finding]:
    """Findings on classes that have boxes in only one of train and val, whose `counts` are given."""
    findings = []
    for code, here, there in (("class-only-val", 1, 0), ("class-only-train", 0, 1)):
        only_here = [name for name, count in counts[here].items() if count and not counts[there].get(name)]
        if only_here:
            examples = [Example(text=f"{name}: {counts[here][name]} boxes") for name in only_here]
            detail = _join_names(only_here, np.arange(len(only_here)))
            findings.append(
                make_finding(code, "train and val", len(only_here), examples, detail=detail, total=len(counts[here]))
            )
    return findings


def _join_names(names: tuple[str, ...] | list[str], rows: np.ndarray) -> str:
    return ", ".join(names[row] for row in rows[:8].tolist()) + (", …" if len(rows) > 8 else "")
