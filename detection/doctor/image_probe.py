"""One image file: what its header says, whether it is whole, and what it looks like in 17 x 16 pixels.

Runs in processes of its own, which start the sooner for it: Pillow, simplejpeg and OpenCV are all that it imports.
"""

import hashlib
import io
import os
import re
import signal
import warnings
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from detection.core.errors import UserError
from detection.core.files import file_fault, read_file
from detection.data.image_headers import TAIL, is_truncated, largest_file, stored_size, too_large

THUMB = (17, 16)
"""Width and height of the small grey image by which images are compared."""
HUGE = 100_000_000
"""Pixels above which an image is not decoded here."""
ORIENTATION = 0x0112
HARMLESS = 16
"""Bytes between the data and the end mark of a JPEG that are no damage."""
FOREIGN = (
    (b"version https://git-lfs", "a Git LFS pointer: git lfs pull fetches the image"),
    (b"<", "text that begins with '<', perhaps the error page of a failed download"),
    (b"{", "text that begins with '{', perhaps the answer of a failed download"),
    (b"%PDF", "a PDF"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x00\x00\x00\x00", "zeros, as after a power cut or a full disk"),
)


class ImageProbe(NamedTuple):
    """What was found. `status` is ok, missing, unreadable, truncated, damaged, huge or refused; `detail` says more.

    `size` is (width, height) as stored, `orientation` the EXIF tag (1 upright, 5–8 lying), `bits` those of a channel,
    `clear` whether something is transparent, `digest` of the bytes, `thumb` uint8 of 17 x 16 pixels, upright, of
    images that were decoded.
    """

    status: str
    detail: str = ""
    format: str = ""
    mode: str = ""
    size: tuple[int, int] = (0, 0)
    orientation: int = 1
    bits: int = 8
    frames: int = 1
    clear: bool = False
    digest: bytes = b""
    thumb: bytes = b""


def init_worker() -> None:
    """In each process that looks: a terminal's Ctrl-C is for the main one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(0)


def probe_many(files: list[str], decode: bool) -> list[ImageProbe]:
    """`look` at each."""
    # `look` itself decides what is too large to be decoded.
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        return [look(file, decode) for file in files]
    finally:
        Image.MAX_IMAGE_PIXELS = before


def look(path: str, decode: bool) -> ImageProbe:
    """Read a file and look at it; never raises for what is in it.

    Args:
        decode: also decode it, of a JPEG the luminance at an eighth of its size: damage inside is found, and `thumb`.
    """
    reason = file_fault(path)
    if reason is not None:
        # A link that leads nowhere is as good as no file.
        there = os.path.lexists(path) and "does not exist" not in reason
        return ImageProbe("unreadable" if there else "missing", reason)
    try:
        data = read_file(path, "image", largest=largest_file())
    except UserError as error:
        return ImageProbe("unreadable", str(error))
    if not data:
        return ImageProbe("unreadable", "an empty file")
    digest = hashlib.blake2b(data, digest_size=16).digest()
    with warnings.catch_warnings():
        # Of large images and odd EXIF: what matters is told as a finding.
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data))
        except Exception as error:
            # Pillow's readers raise all kinds of errors over broken headers.
            return _foreign(data, error)._replace(digest=digest)
        with image:
            found = _header(image, data)._replace(digest=digest)
            if is_truncated(data[:4], data[-TAIL:]):
                return found._replace(status="truncated", detail="no end-of-image mark")
            if reason := too_large(image.size):
                return found._replace(status="refused", detail=reason)
            if image.size[0] * image.size[1] > HUGE:
                return found._replace(status="huge", detail=f"{image.size[0]}x{image.size[1]}")
            return _decoded(image, data, found) if decode else found


def _header(image: Image.Image, data: bytes) -> ImageProbe:
    orientation = 1
    if image.info.get("exif"):
        try:
            orientation = int(image.getexif().get(ORIENTATION, 1))
        except Exception:
            orientation = 1  # a broken tag is no tag, for OpenCV too
    bits = 8
    if image.format == "PNG":
        bits = data[24]
    elif image.format == "TIFF":
        bits = max(image.tag_v2.get(258, (8,)))  # type: ignore[attr-defined]
    elif image.mode.startswith(("I", "F")):
        bits = 16
    return ImageProbe(
        "ok",
        format="JPEG" if image.format == "MPO" else image.format or "",
        mode=image.mode,
        size=image.size,
        orientation=orientation if 1 <= orientation <= 8 else 1,
        bits=bits,
        # A phone's JPEG with a depth map beside it is one image.
        frames=1 if image.format == "MPO" else getattr(image, "n_frames", 1),
    )


def _decoded(image: Image.Image, data: bytes, found: ImageProbe) -> ImageProbe:
    try:
        if found.format == "JPEG" and found.mode in ("RGB", "L"):
            clear, grey = False, _jpeg(data)
        else:
            image.load()
            clear, grey = _is_clear(image), _grey(image)
    except Exception as error:
        # Decoders raise all kinds of errors over broken files, which is what is to be found.
        early = "truncated" in str(error) or "premature" in str(error).lower()
        status = "truncated" if early else "damaged"
        return found._replace(status=status, detail=str(error) or type(error).__name__)
    plain = found.format in ("JPEG", "PNG", "BMP") and found.mode in ("RGB", "RGBA", "L", "P", "1")
    if not plain and not _opencv_reads(data):
        return found._replace(status="unreadable", detail=f"{found.format} {found.mode}, which OpenCV cannot read")
    return found._replace(clear=clear, thumb=_upright(grey, found.orientation).tobytes())


def _jpeg(data: bytes) -> np.ndarray:
    """The luminance, scaled while it is decoded to 1/8, 1/4 or 1/2, but not below three times the thumbnail.

    Raises ValueError for what OpenCV and Pillow pass over, filling in grey: an early end, damage in the middle.
    """
    width, height = 3 * THUMB[0], 3 * THUMB[1]
    try:
        return simplejpeg.decode_jpeg(data, "GRAY", min_height=height, min_width=width, min_factor=1)[..., 0]
    except ValueError as error:
        extra = re.search(r"(\d+) extraneous bytes", str(error))
        # Some cameras pad; what is decoded is whole.
        if extra is None or int(extra[1]) > HARMLESS:
            raise
    return simplejpeg.decode_jpeg(data, "GRAY", min_height=height, min_width=width, min_factor=1, strict=False)[..., 0]


def _is_clear(image: Image.Image) -> bool:
    if image.mode in ("RGBA", "LA", "PA"):
        lowest, _ = image.getchannel("A").getextrema()
        return int(lowest) < 255  # type: ignore[arg-type]
    if "transparency" in image.info:
        lowest, _ = image.convert("RGBA").getchannel("A").getextrema()
        return int(lowest) < 255  # type: ignore[arg-type]
    return False


def _grey(image: Image.Image) -> np.ndarray:
    """uint8 [h, w], small but not yet the thumbnail."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, np.float32)
        low, high = float(values.min()), float(values.max())
        return ((values - low) * (255 / max(high - low, 1e-9))).astype(np.uint8)
    return np.asarray(image.convert("L"))


def _upright(grey: np.ndarray, orientation: int) -> np.ndarray:
    """The thumbnail, turned and mirrored as the EXIF tag says."""
    if orientation in (5, 6, 7, 8):
        grey = grey.T
    if orientation in (3, 4, 7, 8):
        grey = grey[::-1]
    if orientation in (2, 3, 6, 7):
        grey = grey[:, ::-1]
    return cv2.resize(np.ascontiguousarray(grey), THUMB, interpolation=cv2.INTER_AREA)


def _foreign(data: bytes, error: Exception) -> ImageProbe:
    """What Pillow does not know: OpenCV may."""
    for start, what in FOREIGN:
        if data.lstrip()[: len(start)] == start:
            return ImageProbe("unreadable", what)
    if b"ftyphei" in data[:16] or b"ftypmif1" in data[:16]:
        return ImageProbe("unreadable", "HEIC, a phone's format: convert it to JPEG")
    size = stored_size(data)
    if size is not None and (reason := too_large(size)):
        return ImageProbe("refused", reason, size=size)
    try:
        image = None if size is None else cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
    except cv2.error:
        image = None
    if image is None:
        known = data[:3] == b"\xff\xd8\xff" or data[:4] == b"\x89PNG"
        return ImageProbe("truncated" if known else "unreadable", "a broken header" if known else "no known format")
    thumb = cv2.resize(image, THUMB, interpolation=cv2.INTER_AREA)
    return ImageProbe("ok", format="", mode="", size=(image.shape[1], image.shape[0]), thumb=thumb.tobytes())


def _opencv_reads(data: bytes) -> bool:
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_REDUCED_GRAYSCALE_8) is not None
    except cv2.error:
        return False
