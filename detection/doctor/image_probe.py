"""Read one image file: its header, whether its data is complete, and a thumbnail of 17 x 16 pixels.

Worker processes import this module; it imports little, so that they start quickly.
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

THUMBNAIL_SIZE = (17, 16)
"""Width and height of the grayscale thumbnails that are compared to find near-duplicates."""
HUGE_PIXELS = 100_000_000
"""Larger images are not decoded."""
EXIF_ORIENTATION = 0x0112
MAX_EXTRANEOUS_BYTES = 16
"""Padding before the end marker of a JPEG that is not damage; some cameras write it."""
NON_IMAGE_SIGNATURES = (
    (b"version https://git-lfs", "a Git LFS pointer: git lfs pull fetches the image"),
    (b"<", "text that starts with '<', perhaps the error page of a failed download"),
    (b"{", "text that starts with '{', perhaps the response to a failed download"),
    (b"%PDF", "a PDF"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x00\x00\x00\x00", "starts with zero bytes, perhaps after a power failure or on a full disk"),
)


class ImageProbe(NamedTuple):
    """Result of reading one image file.

    Attributes:
        status: ok, missing, unreadable, truncated, damaged, huge, refused or unprobed.
        detail: reason for the status.
        format, mode: as in Pillow; "" if unknown.
        size: stored (width, height), before EXIF rotation.
        orientation: EXIF orientation (1: none, 5–8: width and height swapped).
        bits: bits per channel.
        frames: number of frames or pages.
        transparent: whether any pixel is transparent.
        digest: BLAKE2b hash of the file.
        thumbnail: bytes of uint8 [16, 17], rotated upright; b"" if the image was not decoded.
    """

    status: str
    detail: str = ""
    format: str = ""
    mode: str = ""
    size: tuple[int, int] = (0, 0)
    orientation: int = 1
    bits: int = 8
    frames: int = 1
    transparent: bool = False
    digest: bytes = b""
    thumbnail: bytes = b""


def init_worker() -> None:
    """Set up a worker process: only the main process reacts to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(0)


def probe_many(files: list[str], decode: bool) -> list[ImageProbe]:
    """Call `probe_image` on each file."""
    # `probe_image` checks the size itself.
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        return [probe_image(file, decode) for file in files]
    finally:
        Image.MAX_IMAGE_PIXELS = before


def probe_image(path: str, decode: bool) -> ImageProbe:
    """Read an image file. Never raises an error because of its content.

    Args:
        decode: also decode the image (for JPEG, the luminance at 1/8 scale or more), to detect corrupt data and to make
            the thumbnail.
    """
    reason = file_fault(path)
    if reason is not None:
        # A broken symbolic link counts as a missing file.
        exists = os.path.lexists(path) and "does not exist" not in reason
        return ImageProbe("unreadable" if exists else "missing", reason)
    try:
        data = read_file(path, "image", largest=largest_file())
    except UserError as error:
        return ImageProbe("unreadable", str(error))
    if not data:
        return ImageProbe("unreadable", "an empty file")
    digest = hashlib.blake2b(data, digest_size=16).digest()
    with warnings.catch_warnings():
        # Pillow warns of large images and invalid EXIF; findings report what matters.
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data))
        except Exception as error:
            # Pillow's readers raise all kinds of errors over broken headers.
            return _probe_without_pillow(data, error)._replace(digest=digest)
        with image:
            found = _header(image, data)._replace(digest=digest)
            if is_truncated(data[:4], data[-TAIL:]):
                return found._replace(status="truncated", detail="no end-of-image mark")
            if reason := too_large(image.size):
                return found._replace(status="refused", detail=reason)
            if image.size[0] * image.size[1] > HUGE_PIXELS:
                return found._replace(status="huge", detail=f"{image.size[0]}x{image.size[1]}")
            return _decoded(image, data, found) if decode else found


def _header(image: Image.Image, data: bytes) -> ImageProbe:
    orientation = 1
    if image.info.get("exif"):
        try:
            orientation = int(image.getexif().get(EXIF_ORIENTATION, 1))
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
            transparent, grey = False, _decode_luminance(data)
        else:
            image.load()
            transparent, grey = _has_transparency(image), _to_grey(image)
    except Exception as error:
        # Decoders raise many types of errors on corrupt files.
        truncated = "truncated" in str(error) or "premature" in str(error).lower()
        status = "truncated" if truncated else "damaged"
        return found._replace(status=status, detail=str(error) or type(error).__name__)
    plain = found.format in ("JPEG", "PNG", "BMP") and found.mode in ("RGB", "RGBA", "L", "P", "1")
    if not plain and not _opencv_can_read(data):
        return found._replace(status="unreadable", detail=f"{found.format} {found.mode}, which OpenCV cannot read")
    return found._replace(transparent=transparent, thumbnail=_upright_thumbnail(grey, found.orientation).tobytes())


def _decode_luminance(data: bytes) -> np.ndarray:
    """Decode the luminance of a JPEG at 1/8, 1/4, 1/2 or full scale, at least three times the thumbnail: uint8 [h, w].

    Raises ValueError for truncated and corrupt data, which OpenCV and Pillow fill with gray without an error.
    """
    width, height = 3 * THUMBNAIL_SIZE[0], 3 * THUMBNAIL_SIZE[1]
    try:
        return simplejpeg.decode_jpeg(data, "GRAY", min_height=height, min_width=width, min_factor=1)[..., 0]
    except ValueError as error:
        extra = re.search(r"(\d+) extraneous bytes", str(error))
        # Padding is harmless: the decoded image is complete.
        if extra is None or int(extra[1]) > MAX_EXTRANEOUS_BYTES:
            raise
    return simplejpeg.decode_jpeg(data, "GRAY", min_height=height, min_width=width, min_factor=1, strict=False)[..., 0]


def _has_transparency(image: Image.Image) -> bool:
    if image.mode in ("RGBA", "LA", "PA"):
        lowest, _ = image.getchannel("A").getextrema()
        return int(lowest) < 255  # type: ignore[arg-type]
    if "transparency" in image.info:
        lowest, _ = image.convert("RGBA").getchannel("A").getextrema()
        return int(lowest) < 255  # type: ignore[arg-type]
    return False


def _to_grey(image: Image.Image) -> np.ndarray:
    """The image as grayscale uint8 [h, w]; more than 8 bits are scaled to the range of the image."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, np.float32)
        low, high = float(values.min()), float(values.max())
        return ((values - low) * (255 / max(high - low, 1e-9))).astype(np.uint8)
    return np.asarray(image.convert("L"))


def _upright_thumbnail(grey: np.ndarray, orientation: int) -> np.ndarray:
    """The thumbnail, uint8 [16, 17], of a grayscale image after applying its EXIF orientation."""
    if orientation in (5, 6, 7, 8):
        grey = grey.T
    if orientation in (3, 4, 7, 8):
        grey = grey[::-1]
    if orientation in (2, 3, 6, 7):
        grey = grey[:, ::-1]
    return cv2.resize(np.ascontiguousarray(grey), THUMBNAIL_SIZE, interpolation=cv2.INTER_AREA)


def _probe_without_pillow(data: bytes, error: Exception) -> ImageProbe:
    """Probe a file that Pillow cannot open; OpenCV may be able to."""
    for start, description in NON_IMAGE_SIGNATURES:
        if data.lstrip()[: len(start)] == start:
            return ImageProbe("unreadable", description)
    if b"ftyphei" in data[:16] or b"ftypmif1" in data[:16]:
        return ImageProbe("unreadable", "HEIC, a format of phones: convert it to JPEG")
    size = stored_size(data)
    if size is not None and (reason := too_large(size)):
        return ImageProbe("refused", reason, size=size)
    try:
        image = None if size is None else cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
    except cv2.error:
        image = None
    if image is None:
        known = data[:3] == b"\xff\xd8\xff" or data[:4] == b"\x89PNG"
        return ImageProbe("truncated" if known else "unreadable", "a corrupt header" if known else "unknown format")
    thumb = cv2.resize(image, THUMBNAIL_SIZE, interpolation=cv2.INTER_AREA)
    return ImageProbe("ok", format="", mode="", size=(image.shape[1], image.shape[0]), thumbnail=thumb.tobytes())


def _opencv_can_read(data: bytes) -> bool:
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_REDUCED_GRAYSCALE_8) is not None
    except cv2.error:
        return False
