"""Images made of several: boxes go where their objects go."""

import numpy as np
import pytest

from detection.data.mixing import copy_paste, mixup, mosaic
from detection.data.transforms import AugmentedSample

COLORS = np.array([(0, 0, 0), (250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)], np.uint8)


def piece(label, height=80, width=100, count=2, seed=0):
    """A grey image with rectangles in the colour of its label."""
    rng = np.random.default_rng([seed, label])
    image = np.full((height, width, 3), 90, np.uint8)
    boxes = []
    for k in range(count):
        x, y = 5 + k * width // 2 + int(rng.integers(0, 10)), int(rng.integers(5, 30))
        boxes.append([x, y, x + 24, y + 20])
        image[y : y + 20, x : x + 24] = COLORS[label]
    return AugmentedSample(
        image, np.array(boxes, np.float32).reshape(-1, 4), np.full(count, label), np.zeros(count, bool)
    )


def with_region(sample, region, label):
    return sample._replace(
        boxes=np.concatenate([sample.boxes, np.array([region], np.float32)]),
        labels=np.append(sample.labels, label),
        ignored=np.append(sample.ignored, True),
    )


def purity(image, box, label):
    x1, y1, x2, y2 = np.round(box).astype(int) + np.array([1, 1, -1, -1])
    inside = image[y1:y2, x1:x2].reshape(-1, 3).astype(int)
    return 1.0 if not inside.size else (np.abs(inside - COLORS[label]).max(1) < 60).mean()


@pytest.mark.parametrize("seed", range(12))
def test_boxes_of_a_mosaic_lie_on_their_objects(seed):
    tiles = [piece(1, seed=seed), piece(2, 60, 140, seed=seed), piece(3, 120, 60, seed=seed), piece(4, seed=seed)]
    image, boxes, labels, _ = mosaic(tiles, np.random.default_rng(seed), 0.25)
    assert image.shape == (80, 100, 3) and image.dtype == np.uint8
    assert boxes.dtype == np.float32 and len(boxes) == len(labels) > 0
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= 100).all() and (boxes[:, 3] <= 80).all()
    for box, label in zip(boxes, labels, strict=True):
        assert purity(image, box, label) > 0.9, (box, label)


def test_a_mosaic_drops_what_is_hardly_visible_and_takes_images_without_boxes():
    empty = piece(1, 50, 50, count=0)
    _, boxes, labels, _ = mosaic([empty] * 4, np.random.default_rng(0), 0.25)
    assert boxes.shape == (0, 4) and labels.shape == (0,)
    tiles = [piece(1)] * 4
    kept = [len(mosaic(tiles, np.random.default_rng(0), v)[1]) for v in (0.0, 0.5, 1.0)]
    assert kept[0] >= kept[1] >= kept[2] and kept[0] > kept[2]


def test_mixup_shows_both_and_keeps_the_boxes_of_both():
    first, second = piece(1, 80, 100), piece(2, 60, 140)
    image, boxes, labels, _ = mixup(first, second, np.random.default_rng(1), 0.25)
    assert image.shape == first[0].shape
    assert labels.tolist().count(1) == 2 and set(labels.tolist()) == {1, 2}
    assert (boxes[:, 2] <= 100).all() and (boxes[:, 3] <= 60 + 20).all()
    x1, y1, x2, y2 = boxes[labels == 2][0].astype(int)
    assert image[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2, 1].mean() > 120  # the green of the second shines through


@pytest.mark.parametrize("seed", range(6))
def test_pasted_boxes_hold_their_object_and_leave_the_others_visible(seed):
    target, source = piece(1), piece(2)
    before = target[0].copy()
    image, boxes, labels, _ = copy_paste(target, source, np.random.default_rng(seed))
    assert np.array_equal(target[0], before), "the image given may be in the cache"
    assert labels.tolist()[:2] == [1, 1] and len(boxes) == len(labels)
    assert (labels == 2).any()
    for box in boxes[labels == 2]:
        assert purity(image, box, 2) > 0.7
    for box in boxes[labels == 1]:
        assert purity(image, box, 1) >= 0.55  # at most a fifth hidden by each of two


@pytest.mark.parametrize("seed", range(4))
def test_any_visible_part_of_an_ignored_region_is_kept(seed):
    """Also where an object would be dropped; regions of both images are there, and none is pasted as an object."""
    whole = [with_region(piece(label), (0, 0, 100, 80), label) for label in (1, 2, 3, 4)]
    mixed = mosaic(whole, np.random.default_rng(seed), 1.0)
    assert mixed.labels[mixed.ignored].tolist() == [1, 2, 3, 4]
    small = piece(2, 40, 50, count=1)
    mixed = mixup(small, whole[0], np.random.default_rng(seed), 1.0)
    assert mixed.boxes[mixed.ignored].tolist() == [[0, 0, 50, 40]] and mixed.labels[mixed.ignored].tolist() == [1]
    pasted = copy_paste(with_region(piece(1), (0, 0, 100, 80), 1), whole[1], np.random.default_rng(seed))
    assert pasted.ignored.tolist()[:3] == [False, False, True] and not pasted.ignored[3:].any()
    assert (pasted.labels[3:] == 2).all() and len(pasted.labels) > 3


def test_the_same_generator_gives_the_same_image():
    tiles = [piece(label) for label in (1, 2, 3, 4)]
    for make in (
        lambda r: mosaic(tiles, r, 0.25),
        lambda r: mixup(*tiles[:2], r, 0.25),
        lambda r: copy_paste(*tiles[:2], r),
    ):
        one, two, other = (make(np.random.default_rng(s)) for s in (5, 5, 6))
        assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
        assert not np.array_equal(one[0], other[0])
