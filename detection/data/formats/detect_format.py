"""Detects the format of annotations and reads them."""

import os
from pathlib import Path

from detection.core.errors import UserError
from detection.core.files import open_regular_file
from detection.data.annotations import Annotations
from detection.data.formats import coco, index_cache, voc, yolo
from detection.data.formats.raw import RawAnnotations, to_annotations
from detection.data.image_io import names_outside, outside_message

FORMATS = ("coco", "voc", "yolo")


def read_annotations(
    annotations: str | Path,
    *,
    images: str | Path | None = None,
    format: str = "auto",
    split: str | None = None,
    cache: bool = True,
) -> Annotations:
    """Read a split of a dataset strictly.

    Args:
        annotations: COCO: the JSON file or its folder. VOC: the folder with Annotations/, one of its image sets, or a
            folder of XML files. YOLO: data.yaml or its folder.
        images: folder of the images; None is the usual place of the format.
        format: "coco", "voc", "yolo", or "auto".
        split: "train", "val" or "test" of a folder or data.yaml with several splits. None reads all of a VOC folder,
            the only file of a COCO folder, and the training images of a data.yaml.
        cache: store the arrays of a large COCO file beside it, and read them from there the next time.

    Raises:
        UserError: the annotations are absent, unreadable or invalid; the message names file and entry.
    """
    path = Path(annotations)
    if not cache or (detect_format(path) if format == "auto" else format) != "coco":
        return to_annotations(read_raw(path, images=images, format=format, split=split))
    path = coco.find_file(path, split)
    try:
        stamp = index_cache.stamp_of(path) if path.stat().st_size >= index_cache.FROM_BYTES else None
    except OSError:
        stamp = None  # the reader of the format reports the error
    if stamp is None:
        return to_annotations(coco.parse_coco(path, images))
    kept = index_cache.open_cached(path, stamp, str(images or coco.images_beside(path)))
    if kept is not None:
        # The cache may be from a reading with another folder of images.
        names = kept.file_names.tolist()
        for row in names_outside(names, kept.images):
            raise UserError(f"{path}: {outside_message(names[row], kept.images)}")
    return kept or index_cache.keep(path, stamp, to_annotations(coco.parse_coco(path, images)))


def read_raw(
    annotations: str | Path, *, images: str | Path | None = None, format: str = "auto", split: str | None = None
) -> RawAnnotations:
    """As `read_annotations`, but list the faults of entries instead of raising an error; see `RawAnnotations`.

    Raises:
        UserError: the annotations are absent, of an unknown format, or not of their format at all.
    """
    path = Path(annotations)
    kind = detect_format(path) if format == "auto" else format
    if kind == "voc":
        return voc.parse_voc(path, images, split)
    if kind == "yolo":
        return yolo.parse_yolo(path, images, split or "train")
    return coco.parse_coco(coco.find_file(path, split), images)


def images_folder(
    annotations: str | Path, *, images: str | Path | None = None, format: str = "auto", split: str | None = None
) -> Path:
    """Folder of the images of a split, which may not exist; annotations are not read.

    Raises:
        UserError: the annotations are absent or of no known format.
    """
    path = Path(annotations)
    kind = detect_format(path) if format == "auto" else format
    if kind == "voc":
        return voc.images_folder(path, images, split)
    if kind == "yolo":
        return yolo.images_folder(path, images, split or "train")
    path = coco.find_file(path, split)
    open_regular_file(path, "annotation file").close()
    return Path(images) if images is not None else coco.images_beside(path)


def detect_format(path: Path) -> str:
    """Return "coco", "voc" or "yolo". Raises UserError if a path fits none of them, or a folder fits several."""
    if path.is_dir():
        found = _formats_of(path)
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(
                f"folder {path} looks like {' and like '.join(found)}; say which with format, or name a file"
            )
        raise UserError(
            f"folder {path} is in no known format: it has no COCO file (*.json), no Annotations/*.xml of VOC "
            "and no data.yaml of YOLO"
        )
    kind = {".json": "coco", ".txt": "voc", ".yaml": "yolo", ".yml": "yolo"}.get(path.suffix.lower())
    if kind is None and path.exists():
        raise UserError(
            f"{path} is in no known format; expected are a COCO file (.json), a data.yaml of YOLO, an image set of VOC "
            "(.txt), or a folder"
        )
    return kind or "coco"  # its reader reports an absent file


def _formats_of(folder: Path) -> list[str]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"folder {folder} cannot be read: {error.strerror}") from None
    found = []
    if coco.files_of(folder):
        found.append("coco")
    if (folder / "Annotations").is_dir() or any(name.lower().endswith(".xml") for name in names):
        found.append("voc")
    if yolo.yamls_of(folder):
        found.append("yolo")
    return found
