"""Images on their way to the network: reading, resizing (the same for all uses), augmentation (training)."""

import os
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from detection.config import AugmentConfig
from detection.core.boxes import clip_boxes

# albumentations otherwise asks a server for its newest version at import, which hangs without a network.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
import albumentations as A

FILL = (124, 116, 104)
"""RGB of padding: ImageNet's mean, about zero after normalisation, like the padding of a batch."""


class AugmentedSample(NamedTuple):
    """An image and its boxes."""

    image: np.ndarray
    """uint8 [H, W, 3] RGB"""
    boxes: np.ndarray
    """float32 [n, 4] xyxy in pixels of the image"""
    labels: np.ndarray
    """int64 [n]"""
    ignored: np.ndarray
    """bool [n]: the box is not an object but a region that is ignored in training. Any visible part of it is kept."""


def resize(image: np.ndarray, short_side: int, long_side: int) -> tuple[np.ndarray, tuple[float, float]]:
    """Scale so that the short side is `short_side` unless the long one would exceed `long_side`.

    This one function serves training, evaluation, prediction and export.

    Returns:
        The image [H', W', 3] and (x, y) factors: box in the result = box in the original x factor.
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
    """The training augmentation of a config, made with albumentations; boxes follow the image.

    Calling it with a seed makes it a pure function: the same seed gives the same image, in any worker, and
    a resumed run sees what the uninterrupted one would have.
    """

    def __init__(self, config: AugmentConfig, short_side: int, long_side: int) -> None:
        self.config = config
        self.short_side, self.long_side = short_side, long_side
        # In full resolution, so that a cut-out part is scaled up to the size of a whole image.
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
        """Whether parts are cut out before resizing, so that an image is wanted in its original size."""
        return self._before is not None

    def __call__(self, sample: AugmentedSample, seed: int) -> AugmentedSample:
        """The sample, resized and augmented."""
        return self.after(self.first(sample, self.short_side, self.long_side, seed), seed + 1)

    def first(self, sample: AugmentedSample, short_side: int, long_side: int, seed: int) -> AugmentedSample:
        """What comes before several images are mixed: cut out a part, resize."""
        sample = _run(self._before, sample, seed)
        image, (fx, fy) = resize(sample.image, short_side, long_side)
        return sample._replace(image=image, boxes=sample.boxes * np.array([fx, fy, fx, fy], np.float32))

    def after(self, sample: AugmentedSample, seed: int) -> AugmentedSample:
        """What comes after: geometry that keeps the size, colour."""
        return _run(self._after, sample, seed)


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
        keypoint_params=A.KeypointParams(format="xy", remove_invisible=False),
    )


def _run(compose: A.Compose | None, sample: AugmentedSample, seed: int) -> AugmentedSample:
    if compose is None:
        return sample
    image, boxes, labels, ignored = sample
    compose.set_random_seed(seed)
    # Ignored regions go along as two corners each: as boxes they would be dropped where they are hardly visible, and
    # `BBoxSafeRandomCrop` would keep them whole. Half a pixel: albumentations' points count from centres of pixels.
    corners = boxes[ignored].reshape(-1, 2) - 0.5
    result = compose(image=image, bboxes=boxes[~ignored], labels=labels[~ignored], keypoints=corners)
    height, width = result["image"].shape[:2]
    corners = np.asarray(result["keypoints"], np.float32).reshape(-1, 2, 2) + 0.5
    regions = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    regions = clip_boxes(regions, np.array([width, height])).astype(np.float32)
    visible = ((regions[:, 2:] - regions[:, :2]) >= 1).all(axis=1)
    objects = np.asarray(result["bboxes"], np.float32).reshape(-1, 4)
    kept_labels = np.asarray(result["labels"], np.int64).reshape(-1)
    return AugmentedSample(
        result["image"],
        np.concatenate([objects, regions[visible]]),
        np.concatenate([kept_labels, labels[ignored][visible]]),
        np.arange(len(objects) + visible.sum()) >= len(objects),
    )
