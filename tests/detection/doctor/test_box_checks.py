"""Box formats, pairs and overlaps, compared with simple computations."""

import numpy as np
import pytest
import torch
from faulty_datasets import write_clean_dataset
from torchvision.ops import box_iou

from detection.doctor.box_checks import find_overlapping_boxes
from detection.doctor.box_format import detect_box_format, to_xywh
from detection.doctor.box_pairs import intersection_areas, pairs_in_images
from detection.doctor.read_sets import read_set


@pytest.mark.parametrize("most", [1, 7, 1000])
def test_pairs_are_all_pairs_of_an_image(most):
    images = np.sort(np.random.default_rng(0).integers(0, 9, 60))
    found = [
        pair
        for left, right in pairs_in_images(images, most)
        for pair in zip(left.tolist(), right.tolist(), strict=True)
    ]
    expected = [(i, j) for i in range(60) for j in range(i + 1, 60) if images[i] == images[j]]
    assert found == expected
    assert list(pairs_in_images(images[:0])) == []


@pytest.mark.numeric
def test_intersection_areas_match_torchvision():
    rng = np.random.default_rng(0)
    boxes = np.sort(rng.uniform(0, 50, (30, 2, 2)), axis=1).reshape(30, 4)
    left, right = np.triu_indices(30, 1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    common = intersection_areas(boxes, left, right)
    iou = common / (area[left] + area[right] - common)
    np.testing.assert_allclose(iou, box_iou(torch.tensor(boxes), torch.tensor(boxes)).numpy()[left, right], atol=1e-9)


def random_boxes(count=200, seed=0, biggest=0.5):
    """xywh boxes and image sizes; some boxes touch the edges, some extend a little beyond."""
    rng = np.random.default_rng(seed)
    sizes = np.tile([[640, 480]], (count, 1))
    sides = rng.uniform(0.02, biggest, (count, 2)) * sizes
    corners = rng.uniform(-0.03, 1.0, (count, 2)) * (sizes - sides)
    return np.concatenate([corners, sides], axis=1), sizes


@pytest.mark.parametrize("count", [12, 60, 2000])
@pytest.mark.parametrize("biggest", [0.1, 0.5, 0.9])
def test_xywh_boxes_are_xywh(count, biggest):
    for seed in range(20):
        boxes, sizes = random_boxes(count, seed, biggest)
        assert detect_box_format(boxes, sizes).name == "xywh"
        # Imprecise annotations: a tenth extends far beyond the image.
        boxes[: count // 10, 2:] *= 1.5
        assert detect_box_format(boxes, sizes).name == "xywh"


@pytest.mark.parametrize("count", [60, 2000])
@pytest.mark.parametrize("form", ["xyxy", "centre", "fractions"])
def test_other_formats_are_detected_and_converted(form, count):
    for seed in range(10):
        true, sizes = random_boxes(count, seed)
        true[:, :2] = np.clip(true[:, :2], 0, None)
        boxes = {
            "xyxy": np.concatenate([true[:, :2], true[:, :2] + true[:, 2:]], axis=1),
            "centre": np.concatenate([true[:, :2] + true[:, 2:] / 2, true[:, 2:]], axis=1),
            "fractions": true / np.concatenate([sizes, sizes], axis=1),
        }[form]
        found = detect_box_format(boxes, sizes)
        assert (found.name, found.certain) == (form, True)
        np.testing.assert_allclose(to_xywh(boxes, sizes, form), true, atol=1e-9)


def test_mixed_formats_are_not_certain():
    true, sizes = random_boxes(200)
    true[:, :2] = np.clip(true[:, :2], 0, None)
    mixed = true.copy()
    mixed[:120, 2:] += mixed[:120, :2]
    found = detect_box_format(mixed, sizes)
    assert found.name == "xyxy" and not found.certain and set(found.rows) <= set(range(120))


def test_areas_prove_xyxy_for_few_boxes():
    boxes, sizes = (
        np.array([[300, 200, 400, 300], [350, 250, 600, 400], [400, 300, 500, 350.0]]),
        np.tile([[640, 480]], (3, 1)),
    )
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    assert detect_box_format(boxes, sizes, areas).certain
    assert not detect_box_format(boxes, sizes).certain


def test_contained_boxes_are_counted(tmp_path):
    entries = read_set(write_clean_dataset(tmp_path), "data")
    boxes = entries.boxes.copy()
    boxes[:8] = [[0, 0, 90, 70], *([i * 10, i * 8, 9, 7] for i in range(7))]
    categories, images = entries.category_rows.copy(), entries.image_rows.copy()
    categories[:8], images[:8] = 0, 0
    images[8:] = np.maximum(images[8:], 2)
    _, _, regions, within = find_overlapping_boxes(
        replace_entries(entries, boxes=boxes, category_rows=categories, image_rows=images)
    )
    assert regions.tolist() == [0] and within[0] == 7
    categories[5:8] = 1
    _, _, regions, within = find_overlapping_boxes(
        replace_entries(entries, boxes=boxes, category_rows=categories, image_rows=images)
    )
    assert regions.tolist() == [] and within[0] == 4


def replace_entries(entries, **fields):
    return entries.replace(**fields)
