"""Pictures on their way to the network: reading, resizing (the same for all uses), augmentation (training)."""

import os
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from detection.config import AugmentConfig
from detection.data.ends import TAIL, is_truncated
from detection.data.headers import largest_file, stored_size, too_large
from detection.errors import UserError
from detection.files import read_file

# albumentations otherwise asks a server for its newest version at import, which hangs without a network.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
import albumentations as A

FILL = (124, 116, 104)
"""RGB of padding: ImageNet's mean, about zero after normalisation, like the padding of a batch."""

Piece = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Image uint8 [H, W, 3] RGB, boxes float32 [n, 4] xyxy in its pixels, labels int64 [n]."""
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
        size: (width, height) that an annotation claims. Some tools annotate the picture as stored: where
            only the stored orientation has this size, that one is returned.
        at_least: (height, width) that is enough, of a picture whose `size` is given: a JPEG may then be
            decoded to 1/2, 1/4 or 1/8 of its size, which takes a fraction of the time.
        bgr: OpenCV's own order instead, for a picture that OpenCV is to write again.

    Raises:
        UserError: absent, not a regular file, not a picture, truncated, of more pixels than
            `detection.data.headers.max_pixels`, or of another size than claimed.
    """
    return image_of(read_file(path, "image", largest=largest_file()), path, size, at_least, bgr=bgr)


def image_of(
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
    foreign = f"image {path} is not a picture that OpenCV can read (corrupt, truncated or foreign)"
    stored_as = stored_size(content)
    if stored_as is None:
        raise UserError(foreign)
    if reason := too_large(stored_as):
        raise UserError(f"image {path} has {reason}")
    if size is not None and at_least is not None and (factor := _reduction(content, size, at_least)) > 1:
        image = _decode(content, REDUCED[factor], bgr)
        if image is not None and (image.shape[1], image.shape[0]) == (-(-size[0] // factor), -(-size[1] // factor)):
            return image
        # Anything unusual about it (orientation, damage) is looked into below, on the whole picture.
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
    """Bytes of a picture file -> RGB (or BGR) uint8 [H, W, 3] (grey and alpha are converted).

    Returns:
        None for what is no picture, and for one whose size `detection.data.headers` does not know or refuses.

    Raises:
        MemoryError: there is too little for it.
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


def resize(image: np.ndarray, short_side: int, long_side: int) -> tuple[np.ndarray, tuple[float, float]]:
    """Scale so that the short side is `short_side` unless the long one would exceed `long_side`.

    This one function serves training, evaluation, prediction and export.

    Returns:
        The picture [H', W', 3] and (x, y) factors: box in the result = box in the original x factor.
    """
    height, width = image.shape[:2]
    shape = resized_shape(height, width, short_side, long_side)
    return resize_to(image, *shape), (shape[1] / width, shape[0] / height)


def resized_shape(height: int, width: int, short_side: int, long_side: int) -> tuple[int, int]:
    """(height, width) after `resize`."""
    scale = min(short_side / min(height, width), long_side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def resize_to(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale [H, W, 3] to [height, width, 3]."""
    if image.shape[:2] == (height, width):
        return image
    # Area averaging does not alias when shrinking; enlarging needs interpolation.
    shrinks = height < image.shape[0] or width < image.shape[1]
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(image, (width, height), interpolation=interpolation)


def to_tensor(image: np.ndarray) -> Tensor:
    """uint8 [H, W, 3] -> uint8 [3, H, W]; normalisation comes on the device."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def to_original(boxes: Tensor, scale: tuple[float, float], size: tuple[int, int]) -> Tensor:
    """Undo `resize`: xyxy [n, 4] in resized pixels -> pixels of the original (height, width), clipped, not rounded."""
    x, y = scale
    height, width = size
    boxes = boxes / boxes.new_tensor([x, y, x, y])
    boxes[:, 0::2] = boxes[:, 0::2].clamp(0, width)
    boxes[:, 1::2] = boxes[:, 1::2].clamp(0, height)
    return boxes


class Augmentation:
    """The training augmentation of a config, made with albumentations; boxes follow the picture.

    Calling it with a seed makes it a pure function: the same seed gives the same picture, in any worker, and
    a resumed run sees what the uninterrupted one would have.
    """

    def __init__(self, config: AugmentConfig, short_side: int, long_side: int) -> None:
        self.config = config
        self.short_side, self.long_side = short_side, long_side
        # In full resolution, so that a cut-out part is scaled up to the size of a whole picture.
        self._before = _compose([A.BBoxSafeRandomCrop(p=config.crop)] if config.crop else [], config)
        after: list[A.BasicTransform] = []
        low, high = config.scale
        if (low, high) != (1.0, 1.0):
            shift = max(high - 1, 1 - low) / 2
            after.append(
                A.Affine(
                    scale=(low, high),
                    translate_percent=(-shift, shift),
                    keep_ratio=True,
                    fill=FILL,
                    p=1.0,
                )
            )
        if config.horizontal_flip:
            after.append(A.HorizontalFlip(p=config.horizontal_flip))
        if config.vertical_flip:
            after.append(A.VerticalFlip(p=config.vertical_flip))
        if config.brightness or config.contrast or config.saturation or config.hue:
            after.append(
                A.ColorJitter(
                    brightness=config.brightness,
                    contrast=config.contrast,
                    saturation=config.saturation,
                    hue=config.hue,
                    p=0.8,
                )
            )
        self._after = _compose(after, config)

    @property
    def needs_original(self) -> bool:
        """Whether parts are cut out before resizing, so that a picture is wanted in its original size."""
        return self._before is not None

    def __call__(self, piece: Piece, seed: int) -> Piece:
        """(RGB uint8 [H, W, 3], float32 [n, 4] xyxy, int64 [n]) -> the same, resized and augmented."""
        return self.after(self.first(piece, self.short_side, self.long_side, seed), seed + 1)

    def first(self, piece: Piece, short_side: int, long_side: int, seed: int) -> Piece:
        """What comes before several pictures are mixed: cut out a part, resize."""
        image, boxes, labels = _run(self._before, piece, seed)
        image, (fx, fy) = resize(image, short_side, long_side)
        return image, boxes * np.array([fx, fy, fx, fy], np.float32), labels

    def after(self, piece: Piece, seed: int) -> Piece:
        """What comes after: geometry that keeps the size, colour."""
        return _run(self._after, piece, seed)


def _compose(transforms: list[A.BasicTransform], config: AugmentConfig) -> A.Compose | None:
    if not transforms:
        return None
    return A.Compose(
        transforms,
        bbox_params=A.BboxParams(
            format="pascal_voc",
            label_fields=["labels"],
            clip=True,
            min_visibility=config.min_visibility,
            min_area=1.0,
            min_width=1.0,
            min_height=1.0,
        ),
    )


def _run(compose: A.Compose | None, piece: Piece, seed: int) -> Piece:
    if compose is None:
        return piece
    image, boxes, labels = piece
    compose.set_random_seed(seed)
    result = compose(image=image, bboxes=boxes, labels=labels)
    return (
        result["image"],
        np.asarray(result["bboxes"], np.float32).reshape(-1, 4),
        np.asarray(result["labels"], np.int64).reshape(-1),
    )
