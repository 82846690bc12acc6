"""Detection in tiles: geometry, objects that the whole image misses, and merging of results."""

import numpy as np
import pytest
from conftest import run_seed
from hypothesis import given, settings
from hypothesis import strategies as st

from detection import UserError
from detection.inference.tiles import TiledPredictor, merge, tile_boxes

pytestmark = pytest.mark.numeric


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(32, 200), st.floats(0, 0.9))
def test_tiles_cover_the_image(height, width, size, overlap):
    tiles = tile_boxes(height, width, size, overlap)
    covered = np.zeros((height, width), bool)
    for x1, y1, x2, y2 in tiles:
        assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
        assert x2 - x1 == min(size, width) and y2 - y1 == min(size, height)
        covered[y1:y2, x1:x2] = True
    assert covered.all()
    assert len(set(tiles)) == len(tiles)
    for low in (0, 1):
        starts = sorted({tile[low] for tile in tiles})
        ends = sorted({tile[low + 2] for tile in tiles})
        assert starts[0] == 0 and ends[-1] == (width, height)[low]
        # What an object needs to lie whole in a tile: neighbours share so much.
        assert all(end - start >= overlap * size - 1e-6 for start, end in zip(starts[1:], ends, strict=False))


def test_tiles_of_known_sizes():
    assert tile_boxes(100, 100, 100, 0.2) == [(0, 0, 100, 100)]
    assert tile_boxes(50, 260, 100, 0.2) == [(0, 0, 100, 50), (80, 0, 180, 50), (160, 0, 260, 50)]
    assert tile_boxes(101, 40, 100, 0.0) == [(0, 0, 40, 100), (0, 1, 40, 101)]


def detections(*rows):
    """(box, score[, label])."""
    return {
        "boxes": np.array([row[0] for row in rows], np.float32).reshape(-1, 4),
        "labels": np.array([row[2] if len(row) > 2 else 1 for row in rows], np.int64),
        "names": [f"class {row[2] if len(row) > 2 else 1}" for row in rows],
        "scores": np.array([row[1] for row in rows], np.float32),
    }


TILES = [(0, 0, 100, 100), (80, 0, 180, 100)]


def boxes_of(found):
    return [tuple(box) for box in found["boxes"].tolist()]


def test_boxes_are_shifted_to_the_image():
    found = merge(
        detections(), [detections(((10, 10, 30, 30), 0.5)), detections(((40, 20, 60, 50), 0.9))], TILES, (100, 180), 0.5
    )
    assert boxes_of(found) == [(120, 20, 140, 50), (10, 10, 30, 30)]
    assert found["scores"].tolist() == pytest.approx([0.9, 0.5]) and found["names"] == ["class 1", "class 1"]


def test_duplicates_are_merged():
    left, right = detections(((82, 10, 96, 30), 0.5)), detections(((3, 10, 16, 30), 0.6))
    assert boxes_of(merge(detections(), [left, right], TILES, (100, 180), 0.5)) == [(83, 10, 96, 30)]
    # Classes are apart.
    right["labels"][:] = 2
    assert len(merge(detections(), [left, right], TILES, (100, 180), 0.5)["boxes"]) == 2


def test_cut_box_is_dropped_for_the_whole_object():
    """A third of an object is in the left tile, with a higher score than the whole object in the right tile."""
    left, right = detections(((85, 40, 100, 60), 0.9)), detections(((5, 40, 50, 60), 0.6))
    assert boxes_of(merge(detections(), [left, right], TILES, (100, 180), 0.5)) == [(85, 40, 130, 60)]
    # So it is where the look at the whole image has it.
    whole = detections(((60, 40, 130, 60), 0.4))
    parts = [detections(((60, 40, 100, 60), 0.9)), detections(((0, 40, 50, 60), 0.8))]
    assert boxes_of(merge(whole, parts, TILES, (100, 180), 0.5)) == [(60, 40, 130, 60)]
    # Of another class, it hides nothing.
    whole["labels"][:] = 2
    assert len(merge(whole, parts, TILES, (100, 180), 0.5)["boxes"]) == 3


def test_cut_box_without_a_whole_object_is_kept():
    found = merge(detections(), [detections(((60, 0, 100, 100), 0.9)), detections()], TILES, (100, 180), 0.5)
    assert boxes_of(found) == [(60, 0, 100, 100)]


def test_boxes_at_the_image_border_are_not_cut():
    """Boxes at the border of the image are not cut: of two that overlap the higher score wins, as usual."""
    left = detections(((0, 0, 40, 40), 0.9), ((0, 0, 50, 44), 0.8))
    assert boxes_of(merge(detections(), [left, detections()], TILES, (100, 180), 0.5)) == [(0, 0, 40, 40)]


def test_nothing_found():
    assert len(merge(detections(), [detections(), detections()], TILES, (100, 180), 0.5)["boxes"]) == 0


def squares(side=30, pitch=96, size=384):
    """Bright squares like those of the training set, but in an image four times as large each way."""
    image = np.random.default_rng(run_seed()).integers(90, 130, (size, size, 3), dtype=np.uint8)
    corners = [(x, y) for x in range(30, size, pitch) for y in range(30, size, pitch)]
    for x, y in corners:
        image[y : y + side, x : x + side] = 240
    return image, np.array([(x, y, x + side, y + side) for x, y in corners], np.float32)


def found_of(boxes, found, names=("square",)):
    """Number of boxes that have a detection with IoU above 0.5."""
    count = 0
    for box in boxes:
        low, high = np.maximum(found["boxes"][:, :2], box[:2]), np.minimum(found["boxes"][:, 2:], box[2:])
        common = (high - low).clip(0).prod(1)
        area = (found["boxes"][:, 2:] - found["boxes"][:, :2]).prod(1) + (box[2:] - box[:2]).prod()
        count += bool((common / (area - common) > 0.5).any())
    return count


def test_tiles_find_objects_missed_in_the_whole_image(predictor):
    image, boxes = squares()
    assert found_of(boxes, predictor.predict(image)) == 0
    tiled = TiledPredictor(predictor, 96, 0.4, batch_size=5).predict(image)
    assert found_of(boxes, tiled) >= 0.8 * len(boxes)
    assert (np.diff(tiled["scores"]) <= 0).all()


def test_small_images_are_processed_once(predictor):
    image = squares(size=90)[0]
    plain, tiled = predictor.predict(image), TiledPredictor(predictor, 96).predict(image)
    assert np.array_equal(plain["boxes"], tiled["boxes"]) and plain["names"] == tiled["names"]


def test_batch_of_several_sizes(predictor):
    tiled = TiledPredictor(predictor, 96, 0.3, batch_size=3)
    images = [squares(size=size)[0] for size in (90, 200, 150)]
    batched = tiled.detect([tiled.prepare(image) for image in images])
    for image, found in zip(images, batched, strict=True):
        alone = tiled.predict(image)
        assert len(alone["boxes"]) == len(found["boxes"])
        np.testing.assert_allclose(np.sort(alone["scores"]), np.sort(found["scores"]), atol=1e-3)


@pytest.mark.parametrize(
    ("size", "overlap", "message"), [(8, 0.2, "at least 32 pixels"), (96, 0.95, "between 0 and 0.9, not 0.95")]
)
def test_wrong_options(predictor, size, overlap, message):
    with pytest.raises(UserError, match=message):
        TiledPredictor(predictor, size, overlap)
