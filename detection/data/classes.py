"""Which classes a detector learns: all of the data's, some of them, or several taken as one (`data.classes`)."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from detection.core.errors import UserError
from detection.core.text import did_you_mean
from detection.data.annotations import Annotations

ClassSelection = Sequence[str] | Mapping[str, Sequence[str]]


def choose_classes(annotations: Annotations, chosen: ClassSelection | None, *, lenient: bool = False) -> Annotations:
    """The same images with the boxes of some classes only.

    Category ids stay those of the file, so that results can be scored against it; a merged class has the lowest of
    its classes' ids. Labels follow the ids, as always, whatever the order of `chosen`.

    Args:
        chosen: names; or new names, each with those that it stands for; None is all.
        lenient: pass over names that the data do not have, as a set to evaluate on may lack some.

    Raises:
        UserError: a name that the data do not have (with the nearest one), a name twice, none left.
    """
    if chosen is None:
        return annotations
    groups = chosen if isinstance(chosen, Mapping) else {name: [name] for name in chosen}
    if not isinstance(chosen, Mapping) and len(groups) < len(chosen):
        raise UserError(f"data.classes has a class twice: {', '.join(chosen)}")
    group_of: dict[str, str] = {}
    for new, members in groups.items():
        for name in members:
            if name in group_of:
                raise UserError(f"data.classes: {name!r} is in {group_of[name]!r} and in {new!r}; it can be in one")
            if name not in annotations.class_names and not lenient:
                hint = did_you_mean(name, annotations.class_names, cutoff=0.5)
                shown = ", ".join(annotations.class_names[:20]) + (", …" if len(annotations.class_names) > 20 else "")
                raise UserError(f"data.classes: {annotations.source} has no class {name!r}{hint}; it has {shown}")
            group_of[name] = new
    id_of: dict[str, int] = {}
    for category_id, name in zip(annotations.category_ids.tolist(), annotations.class_names, strict=True):
        if name in group_of:
            id_of.setdefault(group_of[name], category_id)
    if not id_of:
        raise UserError(
            f"{annotations.source} has none of the classes of data.classes; it has {', '.join(annotations.class_names)}"
        )
    names = list(id_of)  # in the order of the data's own
    new_label = np.array([0, *(names.index(group_of[n]) + 1 if n in group_of else 0 for n in annotations.class_names)])
    left_out = [name for name in annotations.class_names if name not in group_of]
    changed = relabelled(annotations, tuple(names), np.array(list(id_of.values()), np.int64), new_label)
    if not left_out:
        return changed
    lost = len(annotations.boxes) - len(changed.boxes)
    note = f"{lost} boxes of {len(left_out)} classes that were not chosen left out"
    return dataclasses.replace(changed, notes=(*changed.notes, note))


def with_class_names(annotations: Annotations, names: Sequence[str]) -> Annotations:
    """The same with the classes `names`, ids 1…k: for formats whose files tell names only, and each its own."""
    place = {name: i for i, name in enumerate(names, 1)}
    new_label = np.array([0, *(place[name] for name in annotations.class_names)])
    return relabelled(annotations, tuple(names), np.arange(1, len(names) + 1), new_label)


def relabelled(
    annotations: Annotations, names: tuple[str, ...], category_ids: np.ndarray, new_label: np.ndarray
) -> Annotations:
    """Args: new_label: int [k + 1], for each old label the new one, 0 for what is to be left out."""
    labels = new_label[annotations.labels]
    keep = labels > 0
    sets = annotations.sets
    if sets is not None:
        # A merged class is complete where all its members are.
        members = [new_label[1:] == label for label in range(1, len(names) + 1)]
        complete = np.stack([sets.complete[:, of_class].all(axis=1) for of_class in members], axis=1)
        sets = dataclasses.replace(sets, complete=complete)
    return dataclasses.replace(
        annotations,
        class_names=names,
        category_ids=category_ids,
        offsets=np.concatenate([[0], np.cumsum(keep)])[annotations.offsets],
        boxes=annotations.boxes[keep],
        labels=labels[keep],
        areas=annotations.areas[keep],
        crowd=annotations.crowd[keep],
        sets=sets,
    )
