"""Several data sets as one to train on: one class list by name, and which classes each set is annotated for."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detection.config import SourceConfig, TrainSourceConfig
from detection.core.errors import UserError
from detection.core.text import did_you_mean
from detection.data.annotations import Annotations, ImageSets
from detection.data.classes import relabelled


def combine(parts: Sequence[Annotations], sources: Sequence[TrainSourceConfig]) -> Annotations:
    """All images of `parts`, one set after the other.

    Classes are those of all sets by name, in the order in which they appear first; `class_ids` chooses their ids. Ids
    of images are those of the files, so that several images may have the same one. File names are absolute.

    Raises:
        UserError: `complete_classes` of a source has a name that no set has.
    """
    names = tuple(dict.fromkeys(name for part in parts for name in part.class_names))
    place = {name: label for label, name in enumerate(names, 1)}
    complete = np.stack(
        [complete_mask(part.class_names, source, names) for part, source in zip(parts, sources, strict=True)]
    )
    ids = np.array(class_ids(names, parts), np.int64)
    aligned = [
        relabelled(part, names, ids, np.array([0, *(place[name] for name in part.class_names)])) for part in parts
    ]
    counts = np.concatenate([np.diff(part.offsets) for part in aligned])
    sets = ImageSets(
        names=tuple(set_names(sources)),
        of_image=np.repeat(np.arange(len(parts)), [len(part) for part in parts]),
        complete=complete,
        weights=tuple(source.weight for source in sources),
    )
    file_names: list[str] = []
    for part in parts:
        folder = os.path.abspath(part.images)
        file_names += [os.path.join(folder, name) for name in part.file_names]
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in aligned])
        for name in ("image_ids", "sizes", "boxes", "labels", "areas", "crowd")
    }
    return Annotations(
        source=", ".join(part.source for part in parts),
        format=parts[0].format,
        images=parts[0].images,
        class_names=names,
        category_ids=ids,
        file_names=np.array(file_names),
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        notes=(*(note for part in parts for note in part.notes), *_describe(sets, names)),
        sets=sets,
        **columns,
    )


def class_ids(names: Iterable[str], splits: Iterable[Annotations]) -> tuple[int, ...]:
    """Category ids for classes: that of the first of `splits` with the class, unless another class has it already;
    then the next one above all others."""
    chosen: dict[str, int] = {}
    for annotations in splits:
        for name, number in zip(annotations.class_names, annotations.category_ids.tolist(), strict=True):
            if name not in chosen and number not in chosen.values():
                chosen[name] = number
    names = list(names)
    for name in names:
        if name not in chosen:
            chosen[name] = max(chosen.values(), default=0) + 1
    return tuple(chosen[name] for name in names)


def set_names(sources: Sequence[SourceConfig]) -> list[str]:
    """A short name for each set: the end of the path of its annotations that no other set has, without suffix."""
    paths = [Path(source.annotations).absolute().with_suffix("").parts[1:] for source in sources]
    splits = [f":{source.split}" if source.split else "" for source in sources]
    for length in range(1, max(map(len, paths), default=0) + 1):
        names = ["/".join(path[-length:]) + split for path, split in zip(paths, splits, strict=True)]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({number})" for number, name in enumerate(names)]


def complete_mask(own: Sequence[str], source: TrainSourceConfig, names: Sequence[str]) -> np.ndarray:
    """bool [k]: the classes `names` for which a set that has the classes `own` is complete; see `combine`."""
    listed = own if source.complete_classes is None else source.complete_classes
    if unknown := [name for name in listed if name not in names]:
        hint = did_you_mean(unknown[0], names, cutoff=0.5)
        raise UserError(
            f"complete_classes of {source.annotations}: no set has a class {unknown[0]!r}{hint}; the classes are "
            f"{', '.join(names[:20])}{', …' if len(names) > 20 else ''}"
        )
    return np.isin(np.array(names), np.array(listed, dtype=str))


def _describe(sets: ImageSets, names: Sequence[str]) -> list[str]:
    lines = []
    for number, (name, weight) in enumerate(zip(sets.names, sets.weights, strict=True)):
        known = [text for text, complete in zip(names, sets.complete[number], strict=True) if complete]
        classes = f"{', '.join(known[:5])}{', …' if len(known) > 5 else ''}" if known else "no class"
        share = "" if weight == 1 else f", weight {weight:g}"
        count = int((sets.of_image == number).sum())
        complete = f"complete for {len(known)} of {len(names)} classes ({classes})"
        lines.append(f"set {name}: {count} images, {complete}{share}")
    return lines
