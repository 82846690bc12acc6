"""The annotations that a config names: read, with its classes, and checked against the images' folder."""

import os
from pathlib import Path

from detection.config import DataConfig, SourceConfig
from detection.core.errors import UserError
from detection.core.files import file_fault, shown
from detection.core.text import did_you_mean
from detection.data.annotations import Annotations
from detection.data.classes import choose_classes, with_class_names
from detection.data.combine import combine
from detection.data.formats.detect_format import read_annotations
from detection.data.image_io import regular_files


def read_split(
    data: DataConfig, split: str, *, alone: bool = False, images: bool = True, number: int = 0
) -> Annotations:
    """Read the annotations of `data.train` or `data.val`, select `data.classes`, and check that the images exist.

    Several sets of `data.train` become one, see `combine`.

    Args:
        split: "train" or "val".
        number: which one of several sets of `data.val`.
        alone: the other split need not be there. Classes of VOC, whose files tell no list of them, are then those
            of this split only, and what is absent of `data.classes` is passed over.
        images: whether it is checked that they are there.

    Raises:
        UserError: the annotations or the image folder are missing or invalid.
    """
    sources = data.sources(split)
    if split == "val":
        key = list(sources)[number]
        sources = {key: sources[key]}
    parts = {key: _read(source, split) for key, source in sources.items()}
    if images:
        for key, part in parts.items():
            check_images(part, part.images, key)
    several = data.has_lists
    annotations = next(iter(parts.values()))
    if annotations.format == "voc" and not alone and not several:
        other = "val" if split == "train" else "train"
        (source,) = data.sources(other).values()
        annotations = with_class_names(
            annotations, sorted({*annotations.class_names, *_read(source, other).class_names})
        )
    if split == "train":
        train = data.train_sources()
        if several or train[0].complete_classes is not None or train[0].weight != 1:
            annotations = combine([annotations, *list(parts.values())[1:]], train)
    return choose_classes(annotations, data.classes, lenient=alone or (several and split == "val"))


def _read(source: SourceConfig, split: str) -> Annotations:
    return read_annotations(source.annotations, images=source.images, format=source.format, split=source.split or split)


def check_images(annotations: Annotations, images: str | Path, key: str = "images") -> None:
    """Raises UserError, naming the first few, where images are absent, before the training starts."""
    folder = Path(images)
    if not folder.is_dir():
        raise UserError(f"{key}.images: folder {folder} does not exist")
    names = annotations.file_names.tolist()
    present = set(regular_files(folder))
    absent = [name for name in names if name not in present and ("/" not in name or file_fault(folder / name))]
    if absent:
        # For names that exist, the message gives the reason: a named pipe, a broken link.
        reasons = {name: file_fault(folder / name) for name in absent[:5] if os.path.lexists(folder / name)}
        named = [f"{shown(name)} ({reasons[name]})" if name in reasons else shown(name) for name in absent[:5]]
        listed = ", ".join(named) + (", …" if len(absent) > 5 else "")
        raise UserError(
            f"{len(absent)} of {len(annotations)} images named in {annotations.source} are not in {folder}: {listed}"
        )


def check_known_classes(train: Annotations, val: Annotations) -> None:
    """Each class of val must be one of train, by name. Raises UserError naming those that are not."""
    unknown = [name for name in val.class_names if name not in train.class_names]
    if unknown:
        hint = did_you_mean(unknown[0], train.class_names, cutoff=0.5)
        raise UserError(
            f"{val.source} has classes that no set of data.train has: {', '.join(unknown[:5])}"
            f"{', …' if len(unknown) > 5 else ''}{hint}; select classes of all sets with data.classes"
        )


def check_same_classes(train: Annotations, val: Annotations) -> None:
    """Labels must mean the same in both. Raises UserError naming the first difference."""
    pairs = [
        dict(zip(annotations.category_ids.tolist(), annotations.class_names, strict=True))
        for annotations in (train, val)
    ]
    for category_id in sorted(set(pairs[0]) | set(pairs[1])):
        names = [pair.get(category_id, "nothing") for pair in pairs]
        if names[0] != names[1]:
            raise UserError(
                f"{train.source} and {val.source} have different categories: id {category_id} is "
                f"{names[0]!r} in the first, {names[1]!r} in the second"
            )
