"""Classes and images: how many boxes they have."""

from collections.abc import Mapping

import numpy as np

from detection.data.classes import ClassSelection
from detection.doctor.entries import Entries
from detection.doctor.findings import Example, Finding, make_finding

FEW = 20
"""Boxes of a class in the training set, under which it is hardly learnt."""
IMBALANCE = 50


def chosen_classes(entries: Entries, chosen: ClassSelection | None) -> Entries:
    """The set as `data.classes` has it trained: the others' boxes are gone, merged classes are one.

    Names that the set does not have are passed over; `detection.data.classes.choose_classes` refuses them.
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
    place = np.array([*(names.index(group_of[n]) if n in group_of else -1 for n in entries.category_names), -1])
    categories = place[entries.category_rows]
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
    """int [k], int [k]: boxes of each category (no crowd), and images with one."""
    rows = np.flatnonzero(entries.valid & (entries.category_rows >= 0))
    boxes = np.bincount(entries.category_rows[rows], minlength=len(entries.category_ids))
    pairs = np.unique(np.stack([entries.category_rows[rows], entries.image_rows[rows]], axis=1), axis=0)
    return boxes, np.bincount(pairs[:, 0], minlength=len(entries.category_ids))


def boxes_per_image(entries: Entries) -> np.ndarray:
    """int [n], no crowd."""
    return np.bincount(entries.image_rows[entries.valid], minlength=len(entries.image_ids))


def check_classes(entries: Entries) -> list[Finding]:
    """Findings about one set by itself."""
    if not (entries.valid & (entries.category_rows >= 0)).any():
        return [make_finding("no-boxes", entries.split, 0)]
    found = []
    boxes, images = class_counts(entries)
    names = entries.category_names
    unused = np.flatnonzero(boxes == 0)
    if len(unused):
        found.append(
            make_finding("class-unused", entries.split, len(unused), detail=_names(names, unused), total=len(names))
        )
    few = np.flatnonzero((boxes > 0) & (boxes < FEW))
    if len(few) and entries.split != "val":
        few = few[np.argsort(boxes[few], kind="stable")]
        examples = [Example(text=f"{names[row]}: {boxes[row]} boxes in {images[row]} images") for row in few.tolist()]
        shown = ", ".join(f"{names[row]} ({boxes[row]})" for row in few[:6].tolist()) + (", …" if len(few) > 6 else "")
        found.append(make_finding("class-few", entries.split, len(few), examples, detail=shown, total=len(names)))
    used = np.flatnonzero(boxes)
    rare, often = used[np.argmin(boxes[used])], used[np.argmax(boxes[used])]
    if boxes[often] >= IMBALANCE * boxes[rare]:
        shown = f"{names[often]} {boxes[often]}, {names[rare]} {boxes[rare]}"
        found.append(make_finding("class-imbalance", entries.split, round(boxes[often] / boxes[rare]), detail=shown))
    empty = np.flatnonzero(boxes_per_image(entries) == 0)
    if len(empty):
        found.append(entries.image_finding("image-without-boxes", empty, total=len(entries.image_ids)))
    return found


def check_both(train: Entries, val: Entries) -> list[Finding]:
    """Findings about two sets that are to be trained and evaluated on."""
    found = []
    pairs = [dict(zip(entries.category_ids.tolist(), entries.category_names, strict=True)) for entries in (train, val)]
    differ = [i for i in sorted(set(pairs[0]) | set(pairs[1])) if pairs[0].get(i) != pairs[1].get(i)]
    if differ:
        examples = [
            Example(text=f"id {i}: {pairs[0].get(i, 'nothing')!r} in train, {pairs[1].get(i, 'nothing')!r} in val")
            for i in differ
        ]
        found.append(make_finding("classes-differ", "train and val", len(differ), examples, detail=examples[0].text))
        return found
    counts = [
        dict(zip(entries.category_names, class_counts(entries)[0].tolist(), strict=True)) for entries in (train, val)
    ]
    for code, here, there in (("class-only-val", 1, 0), ("class-only-train", 0, 1)):
        alone = [name for name, count in counts[here].items() if count and not counts[there].get(name)]
        if alone:
            examples = [Example(text=f"{name}: {counts[here][name]} boxes") for name in alone]
            detail = _names(alone, np.arange(len(alone)))
            found.append(
                make_finding(code, "train and val", len(alone), examples, detail=detail, total=len(counts[here]))
            )
    return found


def _names(names: tuple[str, ...] | list[str], rows: np.ndarray) -> str:
    return ", ".join(names[row] for row in rows[:8].tolist()) + (", …" if len(rows) > 8 else "")
