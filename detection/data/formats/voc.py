"""Reads Pascal VOC: one XML file for each image, and lists of images (image sets).

Corners are counted from 1 and belong to the box (xmin=1, xmax=W is the whole width), so x = xmin - 1 and
w = xmax - xmin + 1. `difficult` objects become crowd regions: not trained on, and not counted in the evaluation, as in
the evaluation of VOC. Classes are in alphabetical order, which is the order of VOC.
"""

import os
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np

from detection.core.commands import command
from detection.core.errors import UserError
from detection.core.files import read_file
from detection.data.formats.raw import Issues, RawAnnotations
from detection.data.image_io import SUFFIXES, files_below, image_size, listed, names_outside

LARGEST_FILE = 1 << 26
"""The most bytes of an XML file."""
IMAGE_FOLDERS = ("JPEGImages", "images", "Images")


def parse_voc(path: str | Path, images: str | Path | None = None, split: str | None = None) -> RawAnnotations:
    """Read the XML files into `RawAnnotations`.

    Args:
        path: an image set (ImageSets/Main/train.txt), a folder with Annotations/, or a folder of XML files.
        images: folder of the images, if it is neither JPEGImages/ nor images/ beside the XML files, nor their own.
        split: image set of a folder: "train" is ImageSets/Main/train.txt. None reads every file.

    Raises:
        UserError: the path does not exist, or has no XML files.
    """
    path = Path(path)
    folder, names, source = _locate(path, split)
    image_folder = _images(folder, images)
    problems = Issues()
    present = _by_stem(image_folder)

    file_names: list[str] = []
    sizes: list[tuple[int, int]] = []
    label_files: list[str] = []
    rows: list[tuple[int, int, str, float, float, float, float, int]] = []
    for name in names:
        label_file = folder / f"{name}.xml"
        root = _root(label_file, problems)
        if root is None:
            continue
        file_name = _image_of(root, name, present)
        image_id = len(file_names) + 1
        file_names.append(file_name)
        label_files.append(str(label_file))
        sizes.append(_size(root, label_file, image_folder / file_name, problems, file_name))
        for number, item in enumerate(root.iter("object"), 1):
            box = _object(item, f"{label_file}, object {number}", problems, file_name)
            if box is not None:
                rows.append((image_id, number, *box))

    classes = sorted({row[2] for row in rows})
    label_of = {name: i for i, name in enumerate(classes, 1)}
    difficult = sum(row[7] for row in rows)
    notes = [f"{difficult} difficult objects: taken as crowd"] if difficult else []
    return RawAnnotations(
        source=source,
        format="voc",
        images=image_folder,
        categories=[(i, name) for name, i in label_of.items()],
        image_ids=np.arange(1, len(file_names) + 1),
        file_names=np.array(file_names, np.str_),
        sizes=np.array(sizes, np.int64).reshape(-1, 2),
        box_images=np.array([row[0] for row in rows], np.int64),
        box_categories=np.array([label_of[row[2]] for row in rows], np.int64),
        boxes=np.array([row[3:7] for row in rows], np.float64).reshape(-1, 4),
        areas=np.full(len(rows), np.nan),
        crowd=np.array([row[7] for row in rows], np.int8),
        box_numbers=np.array([row[1] for row in rows], np.int64),
        label_files=np.array(label_files, np.str_),
        problems=problems,
        notes=notes,
    )


def images_folder(path: Path, images: str | Path | None, split: str | None) -> Path:
    """The folder of the images; XML files are not read. Raises UserError if there are no annotations."""
    return _images(_locate(path, split)[0], images)


def splits_of(path: Path) -> list[str]:
    """Those of train, val and test that are image sets of the folder."""
    return [s for s in ("train", "val", "test") if os.path.lexists(path / "ImageSets" / "Main" / f"{s}.txt")]


def _locate(path: Path, split: str | None) -> tuple[Path, list[str], str]:
    """Folder of the XML files, their names without suffix in order, and the source for messages."""
    if os.path.lexists(path) and not path.is_dir():  # reading an absent one raises the error
        for parent in path.absolute().parents:
            if (parent / "Annotations").is_dir():
                return parent / "Annotations", _image_set(path, parent / "Annotations"), str(path)
        raise UserError(f"image set {path}: there is no folder Annotations beside ImageSets/ that it could be of")
    if not path.is_dir():
        raise UserError(f"{path} does not exist; expected is a VOC folder, one of its image sets, or one of XML files")
    folder = path / "Annotations" if (path / "Annotations").is_dir() else path
    if split is not None and folder != path:
        image_set = path / "ImageSets" / "Main" / f"{split}.txt"
        if not os.path.lexists(image_set):
            raise UserError(
                f"{path} has no {image_set.relative_to(path)}: name an image set or a folder of XML files as "
                f"annotations, or make image sets ({command('convert_data')} … --to voc --split 0.8)"
            )
        return folder, _image_set(image_set, folder), str(image_set)
    names = sorted(name[:-4] for name in files_below(folder) if name.lower().endswith(".xml"))
    if not names:
        raise UserError(f"{folder} has no XML files")
    return folder, names, str(path)


def _image_set(path: Path, folder: Path) -> list[str]:
    names = []
    for number, line in listed(path, "image set"):
        if names_outside([line], folder):
            raise UserError(f"image set {path}, line {number}: {line[:100]!r} leads out of the folder {folder}")
        stem, _, flag = line.rpartition(" ")
        # Lines of the image set of one class: "000012 -1".
        flagged = stem and flag in ("1", "0", "-1") and not (folder / f"{line}.xml").is_file()
        names.append(stem.strip() if flagged else line)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"image set {path} has {twice!r} more than once")
    return names


def _images(folder: Path, images: str | Path | None) -> Path:
    if images is not None:
        return Path(images)
    for name in IMAGE_FOLDERS:
        if (folder.parent / name).is_dir():
            return folder.parent / name
    return folder


def _by_stem(images: Path) -> dict[str, str]:
    """The existing images by their names with and without suffix."""
    if not images.is_dir():
        return {}
    names = [name for name in files_below(images) if os.path.splitext(name)[1].lower() in SUFFIXES]
    return {os.path.splitext(name)[0]: name for name in names} | {name: name for name in names}


def _image_of(root: ET.Element, name: str, present: dict[str, str]) -> str:
    """The image that the XML file names, or one with the name of the XML file: some tools rename only one of them."""
    said = (root.findtext("filename") or "").strip()
    beside = os.path.join(os.path.dirname(name), said) if said else ""
    return present.get(beside) or present.get(name) or (said if "." in said else f"{name}.jpg")


def _root(path: Path, problems: Issues) -> ET.Element | None:
    try:
        data = read_file(path, "annotation", largest=LARGEST_FILE)
        # The search below would not find ENTITY in UTF-16, which XML allows.
        text = data.decode("utf-16") if data[:2] in (b"\xff\xfe", b"\xfe\xff") else data
        # Entities can fill the memory by referring to each other, or read other files. Annotations do not need them.
        if (b"<!ENTITY" in text) if isinstance(text, bytes) else ("<!ENTITY" in text):
            problems.add("not_readable", f"{path} declares entities, which is refused; remove its DOCTYPE")
            return None
        root = ET.fromstring(text)
    except UserError as error:
        problems.add("not_readable", str(error))
    except (ET.ParseError, ValueError, LookupError, RecursionError) as error:
        problems.add("not_readable", f"{path} is {f'not XML: {error}' if data else 'empty'}")
    else:
        if root.tag == "annotation":
            return root
        message = f"{path} is no annotation of VOC: its root is <{root.tag[:60]}>, expected is <annotation>"
        problems.add("not_readable", message)
    return None


def _size(root: ET.Element, label_file: Path, image: Path, problems: Issues, name: str) -> tuple[int, int]:
    """Size in the XML file, or that of the image; (0, 0) if there is neither."""
    said = [_number(root.findtext(f"size/{key}")) for key in ("width", "height")]
    if all(side is not None and 1 <= side < 2**31 for side in said):
        return int(said[0] or 0), int(said[1] or 0)
    try:
        size = image_size(image)
    except UserError as error:
        problems.add("no_size", f"{label_file} has no width and height, and its image gives none: {error}", image=name)
        return 0, 0
    message = f"{label_file} has no width and height of 1 or more: they are taken from the image"
    problems.add("no_size", message, fatal=False, image=name)
    return size


def _object(
    item: ET.Element, place: str, problems: Issues, image: str
) -> tuple[str, float, float, float, float, int] | None:
    """(class, x, y, w, h, difficult)"""
    name = (item.findtext("name") or "").strip()
    if not name:
        problems.add("missing_key", f"{place} has no name", image=image)
        return None
    said = [item.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
    corners = [_number(text) for text in said]
    if any(value is None for value in corners):
        shown = ", ".join(repr(text) for text in said)
        message = f"{place} ({name}) has bndbox {shown}; expected are the numbers xmin, ymin, xmax, ymax"
        problems.add("bad_box", message, image=image)
        return None
    x1, y1, x2, y2 = (float(value) for value in corners if value is not None)
    difficult = (item.findtext("difficult") or "").strip() in ("1", "true", "True")
    return name, x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1, int(difficult)


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
