"""Detects the format of annotations and reads them."""

import os
from pathlib import Path

from detection.core.errors import UserError
from detection.core.files import open_regular_file
from detection.data.annotations import Annotations
from detection.data.formats import coco, index_cache, voc, yolo
from detection.data.formats.raw import RawAnnotations, to_index
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
    """Read a split of a data set, strictly.

    Args:
        annotations: COCO, the JSON file or a folder that it is in; VOC, the folder with Annotations/, an image set
            of it, or a folder of XML files; YOLO, data.yaml or the folder that it is in.
        images: the images' folder; None is where the format has it.
        format: "coco", "voc", "yolo", or "auto".
        split: "train", "val" or "test" of a folder or data.yaml that holds several; None reads all of a VOC folder,
            the one file of a COCO folder, and the training images of a data.yaml.
        cache: keep the index of a large COCO file beside it, and take it from there.

    Raises:
        UserError: absent, unreadable, wrong; the message names file and entry.
    """
    path = Path(annotations)
    if not cache or (detect_format(path) if format == "auto" else format) != "coco":
        return to_index(read_raw(path, images=images, format=format, split=split))
    path = coco.find_file(path, split)
    try:
        stamp = index_cache.stamp_of(path) if path.stat().st_size >= index_cache.FROM_BYTES else None
    except OSError:
        stamp = None  # the reader of the format reports what is wrong with the file
    if stamp is None:
        return to_index(coco.parse_coco(path, images))
    kept = index_cache.open_cached(path, stamp, str(images or coco.images_beside(path)))
    if kept is not None:
        # It may have been kept with another images folder.
        names = kept.file_names.tolist()
        for row in names_outside(names, kept.images):
            raise UserError(f"{path}: {outside_message(names[row], kept.images)}")
    return kept or index_cache.keep(path, stamp, to_index(coco.parse_coco(path, images)))


def read_raw(
    annotations: str | Path, *, images: str | Path | None = None, format: str = "auto", split: str | None = None
) -> RawAnnotations:
    """As `read_annotations`, but with what is wrong listed in place of raised, see `RawAnnotations`.

    Raises:
        UserError: absent, of no known format, or not to be taken for its format at all.
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
    """Where the images of a split are, by a first look at its files. It may not exist.

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
    """coco, voc or yolo. Raises UserError where it is absent, none of them, or several."""
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
    return kind or "coco"  # which says that it does not exist


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
