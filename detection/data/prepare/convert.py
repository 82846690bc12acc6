"""Data sets from one format into another, whole or divided into a training and a validation part."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from detection.core.commands import command
from detection.core.errors import UserError
from detection.core.files import make_folder
from detection.core.text import text_table
from detection.data.annotations import Annotations
from detection.data.classes import ClassSelection, choose_classes, with_class_names
from detection.data.formats import coco, voc, yolo
from detection.data.formats.detect_format import detect_format, read_annotations
from detection.data.formats.writers import WRITERS
from detection.data.image_io import names_outside
from detection.data.load_split import check_images, check_same_classes
from detection.data.prepare.split import split_images

SPLITS = ("train", "val", "test")


def convert_data(
    sources: Sequence[str],
    to: str,
    out: str | Path,
    *,
    images: str | None = None,
    format: str = "auto",
    classes: ClassSelection | None = None,
    share: float | None = None,
    seed: int = 0,
    group_by: str | None = None,
    transfer: str = "copy",
) -> str:
    """Read `sources` and write them into the folder `out`; returns a report of what was written and what was lost.

    Args:
        sources: files or folders as `read_annotations` takes them, each a split ("train=FILE" says which, else its
            name does) or, VOC folders and data.yaml, several.
        to: "coco", "voc" or "yolo".
        images: the images' folder, where it is not the usual one; for all sources.
        share: divide the one split that there is; see `split_images`, also for `seed` and `group_by`.
        transfer: "copy", "link" (symbolic links), or "none".

    Raises:
        UserError: the sources are invalid, `out` is not empty, or the conversion is not possible.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already and not empty; give another --out, or remove it")
    if to == "yolo" and transfer == "none":
        raise UserError("YOLO finds labels by the images' places: --transfer must be copy or link")
    parts = {
        split: choose_classes(annotations, classes) for split, annotations in _read(sources, images, format).items()
    }
    splits = list(parts.values())
    if not any(annotations.class_names for annotations in splits):
        raise UserError(f"{splits[0].source} has no class at all (VOC's are those of its objects, and there are none)")
    for annotations in splits:
        check_images(annotations, annotations.images, "--images")
        if transfer == "none" and names_outside(annotations.file_names.tolist(), annotations.images):
            raise UserError(
                f"images of {annotations.source} do not all lie below {annotations.images}, as those of COCO and VOC "
                "must: --transfer must be copy or link"
            )
    for other in splits[1:]:
        check_same_classes(splits[0], other)
    notes: list[str] = []
    table = ""
    if share is not None:
        if len(parts) > 1:
            raise UserError(f"--split divides one part, and there are {', '.join(parts)} already; name one of them")
        train, notes = split_images(splits[0], share, seed=seed, group_by=group_by)
        parts = {
            "train": splits[0].part(np.flatnonzero(train)),
            "val": splits[0].part(np.flatnonzero(~train)),
        }
        table = f"\n{_table(parts)}"
    elif group_by is not None:
        raise UserError("--group-by keeps images together when a set is divided: it needs --split")
    make_folder(out, "--out")
    notes += WRITERS[to](parts, out, transfer)
    lines = [
        f"{split}: {len(annotations)} images, {len(annotations.boxes)} boxes" for split, annotations in parts.items()
    ]
    lines += [f"note: {note}" for note in dict.fromkeys([*(n for i in splits for n in i.notes), *notes])]
    return "\n".join([*lines, *([table] if table else []), *_keys(parts, to, out, transfer)])


def _read(sources: Sequence[str], images: str | None, format: str) -> dict[str, Annotations]:
    parts: dict[str, Annotations] = {}
    for source in sources:
        said, equals, rest = source.partition("=")
        named = bool(equals) and said in SPLITS and not Path(source).exists()
        path = Path(rest if named else source)
        kind = detect_format(path) if format == "auto" else format
        found = _splits(path, kind)
        if named and len(found) > 1:
            raise UserError(f"{source}: {path} has several splits: {', '.join(found)}")
        for split, (file, entry) in found.items():
            name = said if named else split
            if name in parts:
                raise UserError(
                    f"{parts[name].source} and {file} are both {name!r}; say which is what: train=FILE val=FILE"
                )
            parts[name] = read_annotations(file, images=images, format=kind, split=entry)
    if all(annotations.format == "voc" for annotations in parts.values()):
        names = sorted({name for annotations in parts.values() for name in annotations.class_names})
        parts = {split: with_class_names(annotations, names) for split, annotations in parts.items()}
    return parts


def _splits(path: Path, kind: str) -> dict[str, tuple[Path, str | None]]:
    """The splits of a source: the file or folder to read, and what to read of it. One that has no name is "train"."""
    if kind == "yolo":
        return {split: (path, split) for split in yolo.splits_of(path) or ["train"]}
    if kind == "voc":
        if path.is_dir() and (found := voc.splits_of(path)):
            return {split: (path, split) for split in found}
        return {path.stem if path.is_file() and path.stem in SPLITS else "train": (path, None)}
    files = coco.files_of(path) if path.is_dir() else [path]
    names = [coco.split_of(file) for file in files]
    if len(files) == 1:
        return {names[0] if names[0] in SPLITS else "train": (files[0], None)}
    if not files or not set(names) <= set(SPLITS) or len(set(names)) < len(names):
        shown = ", ".join(str(file.relative_to(path)) for file in files) or "none"
        raise UserError(f"{path}: its COCO files ({shown}) do not tell their split; name them: train=FILE val=FILE")
    return {name: (file, None) for name, file in zip(names, files, strict=True)}


def _table(parts: dict[str, Annotations]) -> str:
    """Images of each class in each part."""
    names = next(iter(parts.values())).class_names
    counts = {}
    for split, annotations in parts.items():
        image_of_box = np.repeat(np.arange(len(annotations)), np.diff(annotations.offsets))
        pairs = np.unique(np.stack([image_of_box, annotations.labels]), axis=1)
        counts[split] = np.bincount(pairs[1], minlength=len(names) + 1)
    cells = [(name, *(str(counts[split][label]) for split in parts)) for label, name in enumerate(names, 1)]
    cells.append(("no box", *(str((np.diff(annotations.offsets) == 0).sum()) for annotations in parts.values())))
    return text_table(("images with", *parts), cells, left=1)


def _keys(parts: dict[str, Annotations], to: str, out: Path, images: str) -> list[str]:
    """What the command line says to use what was written: train and val in a config, test in an evaluation."""
    keys: dict[str, list[str]] = {}
    for split, annotations in parts.items():
        file = {"coco": f"{split}.json", "voc": f"ImageSets/Main/{split}.txt", "yolo": "data.yaml"}[to]
        said = [f"annotations={out / file}"]
        if split == "test" and to == "yolo":
            said.append("split=test")
        if images == "none":
            said.append(f"images={annotations.images}")
        section, title = split, "in a config:"
        if split == "test":
            section, title = "val", f"to evaluate on test, after {command('evaluate')} FILE:"
        keys.setdefault(title, []).extend(f"  {shlex.quote(f'data.{section}.{key}')}" for key in said)
    return [line for title, named in keys.items() for line in ("", title, *named)]
