"""The training augmentation of one image: boxes and ignored regions follow it."""

import numpy as np
import pytest

from detection.config import AugmentConfig
from detection.data.transforms import Augmentation, AugmentedSample


def sample_of(image, boxes=(), labels=(), ignored=False):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    return AugmentedSample(image, boxes, np.array(labels, np.int64), np.full(len(boxes), ignored))


FULL = AugmentConfig(
    horizontal_flip=0.5,
    vertical_flip=0.5,
    scale=[0.6, 1.6],
    crop=0.5,
    brightness=0.3,
    contrast=0.3,
    saturation=0.3,
    hue=0.05,
)


def coloured_rectangles(seed):
    """Three rectangles, red, green and blue: image and boxes."""
    rng = np.random.default_rng(seed)
    image = np.full((180, 240, 3), 124, np.uint8)
    colors = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    boxes = []
    for i, color in enumerate(colors):
        x, y, w, h = 10 + 75 * i, int(rng.integers(10, 100)), int(rng.integers(20, 60)), int(rng.integers(20, 60))
        image[y : y + h, x : x + w] = color
        boxes.append([x, y, x + w, y + h])
    return image, boxes


PLAIN = FULL.model_copy(update={"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0})


def extent_of(image, label):
    """[x1, y1, x2, y2] of the colour of `label`; [] where it is not there."""
    ys, xs = np.nonzero((image.max(2) > 200) & (image.argmax(2) == label - 1))
    return [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] if len(xs) else []


@pytest.mark.parametrize("seed", range(25))
def test_boxes_follow_the_augmented_image(seed):
    """Wherever a box is afterwards, it holds its own colour and is tight."""
    augment = Augmentation(PLAIN, 160, 200)
    result, new_boxes, labels, _ = augment(sample_of(*coloured_rectangles(seed), [1, 2, 3]), seed)
    assert result.dtype == np.uint8 and new_boxes.dtype == np.float32 and labels.dtype == np.int64
    assert len(new_boxes) == len(labels) <= 3
    height, width = result.shape[:2]
    for (x1, y1, x2, y2), label in zip(new_boxes, labels, strict=True):
        assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
        inside = result[int(y1 + 2) : int(y2 - 2), int(x1 + 2) : int(x2 - 2)]
        if inside.size:
            assert (inside.reshape(-1, 3).argmax(1) == label - 1).mean() > 0.95
        if extent := extent_of(result, label):
            np.testing.assert_allclose([x1, y1, x2, y2], extent, atol=2.5)


@pytest.mark.parametrize("seed", range(25))
def test_ignored_regions_follow_the_augmented_image_and_change_nothing_else(seed):
    """Any visible part of a region is kept; objects beside it are as without it."""
    image, boxes = coloured_rectangles(seed)
    augment = Augmentation(PLAIN, 160, 200)
    result = augment(sample_of(image, boxes, [1, 2, 3], ignored=True), seed)
    assert result.ignored.all() and result.boxes.dtype == np.float32 and result.labels.dtype == np.int64
    found = dict(zip(result.labels.tolist(), result.boxes, strict=True))
    for label in (1, 2, 3):
        extent = extent_of(result.image, label)
        sides = np.diff(np.reshape(extent or [0] * 4, (2, 2)), axis=0)
        if (sides > 3).all():
            np.testing.assert_allclose(found[label], extent, atol=1.5)
    objects = augment(sample_of(image, boxes[:2], [1, 2]), seed)
    both = sample_of(image, boxes, [1, 2, 3])
    both = augment(both._replace(ignored=np.array([False, False, True])), seed)
    assert np.array_equal(both.image, objects.image) and np.array_equal(both.boxes[~both.ignored], objects.boxes)


def test_augmentation_is_a_function_of_its_seed():
    image = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    sample = sample_of(image, [[10, 10, 60, 60]], [1])
    one, two = Augmentation(FULL, 80, 100), Augmentation(FULL, 80, 100)
    for seed in (3, 4, 3):
        two(sample, seed + 100)  # a different past
        for a, b in zip(one(sample, seed), two(sample, seed), strict=True):
            assert np.array_equal(a, b)
    assert not np.array_equal(one(sample, 3)[0], one(sample, 4)[0])


def test_augmentation_of_an_image_without_boxes():
    image = np.zeros((90, 120, 3), np.uint8)
    for seed in range(8):
        _, boxes, labels, _ = Augmentation(FULL, 80, 100)(sample_of(image), seed)
        assert boxes.shape == (0, 4) and labels.shape == (0,)
