"""Image files: finding them in folders, their sizes without decoding, reading and writing them."""

import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from detection.core.errors import UserError
from detection.core.files import file_fault, open_regular_file, read_file, shown
from detection.data.image_headers import TAIL, is_truncated, largest_file, stored_size, too_large

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".jp2", ".ppm", ".pgm"})
"""Of files that are taken for images."""
LARGEST_LIST = 1 << 28
"""A text file of more bytes lists no images."""
_ORIENTATION = 0x0112
_LYING = (5, 6, 7, 8)
"""Orientations in EXIF that exchange width and height."""


def files_below(folder: Path) -> Iterator[str]:
    """Names of all files in `folder` and its subfolders, relative to it and with "/", sorted within each folder.

    Links to folders are followed. A folder is visited once, so that loops of links end.

    Raises:
        UserError: a folder that cannot be read.
    """
    seen: set[tuple[int, int]] = set()

    def walk(path: str, prefix: str) -> Iterator[str]:
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in seen:
                return
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"folder {path} cannot be read: {error.strerror}") from None
        for entry in found:
            try:
                below = entry.is_dir()
            except OSError:  # a link to itself; opening it as a file gives the error
                below = False
            if below:
                yield from walk(entry.path, f"{prefix}{entry.name}/")
            else:
                yield prefix + entry.name

    yield from walk(str(folder), "")


def names_outside(names: Sequence[str], folder: str | Path) -> list[int]:
    """Indices of the names (relative to `folder`, or absolute) that point outside it.

    Only the name counts: a link inside the folder may point anywhere.
    """
    suspects = [i for i, name in enumerate(names) if ".." in name or os.path.isabs(name)]
    if not suspects:
        return []
    # An absolute name may contain the links on the path of the folder, or their targets.
    places = {os.path.abspath(folder), os.path.realpath(folder)}

    def inside(name: str) -> bool:
        return any(os.path.normpath(os.path.join(p, name)).startswith(p.rstrip(os.sep) + os.sep) for p in places)

    return [i for i in suspects if not inside(names[i])]


def outside_message(name: str, folder: str | Path) -> str:
    """What to say of a name that `names_outside` found."""
    return f"image {shown(name)!r} leads out of the images folder {folder}: names must stay below it"


def regular_files(folder: Path) -> list[str]:
    """Names of the regular files in a folder, links to such included. Raises UserError where it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            # The directory entry holds the type of everything but links, so that no file is opened.
            return [e.name for e in entries if (file_fault(e.path) is None if e.is_symlink() else e.is_file())]
    except OSError as error:
        raise UserError(f"folder {folder} cannot be read: {error.strerror}") from None


def images_below(folder: Path) -> list[str]:
    """As `files_below`, of images only (by their suffix, hidden files left out), all sorted."""
    return sorted(
        name
        for name in files_below(folder)
        if os.path.splitext(name)[1].lower() in SUFFIXES and not os.path.basename(name).startswith(".")
    )


def listed(path: Path, what: str) -> list[tuple[int, str]]:
    """The non-empty lines of a text file that lists images, with their line numbers from 1.

    Raises:
        UserError: absent, not a regular file, empty, not UTF-8, or too large; the message calls it `what`.
    """
    try:
        lines = enumerate(read_file(path, what, largest=LARGEST_LIST).decode("utf-8-sig").splitlines(), 1)
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    found = [(number, line.strip()) for number, line in lines if line.strip()]
    if not found:
        raise UserError(f"{what} {path} is empty")
    return found


def image_size(path: str | Path) -> tuple[int, int]:
    """Read (width, height) of the upright image, as `read_image` returns it, from the header of the file.

    Images that Pillow refuses or does not know are decoded.

    Raises:
        UserError: absent, not a regular file, not an image, or of too many pixels.
    """
    try:
        with open_regular_file(path, "image") as file, Image.open(file) as image:
            # To find EXIF data behind the pixels, Pillow decodes the whole PNG; OpenCV ignores such data.
            known = image.format != "PNG" or "exif" in image.info
            turned = known and image.getexif().get(_ORIENTATION) in _LYING
            # Some versions of Pillow return the size of a TIFF already turned.
            if not (turned and image.format == "TIFF"):
                return image.size[::-1] if turned else image.size
    except UserError:
        raise
    except Exception as error:  # Pillow raises nearly anything for damaged headers; OpenCV has the last word
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"image {path} cannot be read: {error.strerror}") from None
    height, width = read_image(path).shape[:2]
    return width, height


def image_sizes(paths: Sequence[str]) -> list[tuple[int, int] | UserError]:
    """`image_size` of each, or the error that it raised; threads wait for the disk together."""

    def some(start: int) -> list[tuple[int, int] | UserError]:
        sizes: list[tuple[int, int] | UserError] = []
        for path in paths[start : start + 256]:
            try:
                sizes.append(image_size(path))
            except UserError as error:
                sizes.append(error)
        return sizes

    with warnings.catch_warnings(), ThreadPoolExecutor(8) as pool:
        # Reading the headers of large images is safe.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return [size for sizes in pool.map(some, range(0, len(paths), 256)) for size in sizes]


def write_jpeg(path: Path, bgr: np.ndarray, quality: int) -> None:
    """Write an image, uint8 [H, W, 3] BGR, as JPEG, without waiting until it is on the disk.

    Raises:
        UserError: it, or its folder, cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes())
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror}") from None


REDUCED = {2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}


def read_image(
    path: str | Path,
    size: tuple[int, int] | None = None,
    at_least: tuple[int, int] | None = None,
    *,
    bgr: bool = False,
) -> np.ndarray:
    """RGB uint8 [H, W, 3], upright according to its EXIF orientation.

    Args:
        size: (width, height) that an annotation claims. Some tools annotate the image as stored: where
            only the stored orientation has this size, that one is returned.
        at_least: (height, width) that is enough, of an image whose `size` is given: a JPEG may then be
            decoded to 1/2, 1/4 or 1/8 of its size, which takes a fraction of the time.
        bgr: OpenCV's own order instead, for an image that OpenCV is to write again.

    Raises:
        UserError: absent, not a regular file, not an image, truncated, of more pixels than
            `detection.data.image_headers.max_pixels`, or of another size than claimed.
    """
    return decode_checked_image(read_file(path, "image", largest=largest_file()), path, size, at_least, bgr=bgr)


def decode_checked_image(
    content: bytes,
    path: str | Path,
    size: tuple[int, int] | None = None,
    at_least: tuple[int, int] | None = None,
    *,
    bgr: bool = False,
) -> np.ndarray:
    """As `read_image`, of a file's content; errors call it `path`."""
    if is_truncated(content[:4], content[-TAIL:]):
        raise UserError(f"image {path} is truncated: it has no end-of-image mark; copy it again or remove it")
    foreign = f"image {path} is not an image that OpenCV can read (corrupt, truncated or foreign)"
    stored_as = stored_size(content)
    if stored_as is None:
        raise UserError(foreign)
    if reason := too_large(stored_as):
        raise UserError(f"image {path} has {reason}")
    if size is not None and at_least is not None and (factor := _reduction(content, size, at_least)) > 1:
        image = _decode(content, REDUCED[factor], bgr)
        if image is not None and (image.shape[1], image.shape[0]) == (-(-size[0] // factor), -(-size[1] // factor)):
            return image
        # The code below handles unusual images (orientation, damage) at full size.
    image = _decode(content, cv2.IMREAD_COLOR, bgr)
    if image is None:
        raise UserError(foreign)
    if size is not None and (image.shape[1], image.shape[0]) != tuple(size):
        stored = _decode(content, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION, bgr)
        if stored is None or (stored.shape[1], stored.shape[0]) != tuple(size):
            raise UserError(
                f"image {path} is {image.shape[1]}x{image.shape[0]} pixels, its annotation says {size[0]}x{size[1]}"
            )
        image = stored
    return image


def decode_image(content: bytes, flags: int = cv2.IMREAD_COLOR, *, bgr: bool = False) -> np.ndarray | None:
    """Bytes of an image file -> RGB (or BGR) uint8 [H, W, 3] (grey and alpha are converted).

    Returns:
        None if it is not an image, or if `detection.data.image_headers` cannot read or does not accept its size.

    Raises:
        MemoryError: there is not enough memory for the image.
    """
    size = stored_size(content)
    return None if size is None or too_large(size) else _decode(content, flags, bgr)


def _decode(content: bytes, flags: int, bgr: bool) -> np.ndarray | None:
    """`decode_image` of a size that was checked: OpenCV takes memory for whatever a header names."""
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except cv2.error as error:
        if error.code == cv2.Error.StsNoMem:
            raise MemoryError from None
        return None
    return image if image is None or bgr else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _reduction(content: bytes, size: tuple[int, int], at_least: tuple[int, int]) -> int:
    """By how much a JPEG can be reduced and still have `at_least` (height, width) pixels; 1 for other files."""
    if content[:2] != b"\xff\xd8":
        return 1
    room = min(size[0] / at_least[1], size[1] / at_least[0])
    return max((factor for factor in REDUCED if factor <= room), default=1)
