"""The doctor's parts against plain computations of the same."""

import os
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from sick_sets import write_clean
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from detection.config_io import parse_config
from detection.doctor.box_checks import doubles
from detection.doctor.box_form import as_xywh, box_form
from detection.doctor.box_pairs import overlaps, pairs_in_images
from detection.doctor.image_checks import look_at
from detection.doctor.image_probe import look
from detection.doctor.read_sets import read_set
from detection.doctor.suitability import DEFAULT, Setting, best_overlaps, predicted_memory, resize
from detection.models.build import build_model


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
def test_overlaps_are_those_of_torchvision():
    rng = np.random.default_rng(0)
    boxes = np.sort(rng.uniform(0, 50, (30, 2, 2)), axis=1).reshape(30, 4)
    left, right = np.triu_indices(30, 1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    common = overlaps(boxes, left, right)
    iou = common / (area[left] + area[right] - common)
    np.testing.assert_allclose(iou, box_iou(torch.tensor(boxes), torch.tensor(boxes)).numpy()[left, right], atol=1e-9)


# ---- the form of boxes


def some_boxes(count=200, seed=0, biggest=0.5):
    """True xywh, some of them at the edges, some a little beyond."""
    rng = np.random.default_rng(seed)
    sizes = np.tile([[640, 480]], (count, 1))
    sides = rng.uniform(0.02, biggest, (count, 2)) * sizes
    corners = rng.uniform(-0.03, 1.0, (count, 2)) * (sizes - sides)
    return np.concatenate([corners, sides], axis=1), sizes


@pytest.mark.parametrize("count", [12, 60, 2000])
@pytest.mark.parametrize("biggest", [0.1, 0.5, 0.9])
def test_true_boxes_are_left_alone(count, biggest):
    for seed in range(20):
        boxes, sizes = some_boxes(count, seed, biggest)
        assert box_form(boxes, sizes).name == "xywh"
        # A sloppy set: a tenth reach far beyond.
        boxes[: count // 10, 2:] *= 1.5
        assert box_form(boxes, sizes).name == "xywh"


@pytest.mark.parametrize("count", [60, 2000])
@pytest.mark.parametrize("form", ["xyxy", "centre", "fractions"])
def test_other_forms_are_recognised_and_undone(form, count):
    for seed in range(10):
        true, sizes = some_boxes(count, seed)
        true[:, :2] = np.clip(true[:, :2], 0, None)
        boxes = {
            "xyxy": np.concatenate([true[:, :2], true[:, :2] + true[:, 2:]], axis=1),
            "centre": np.concatenate([true[:, :2] + true[:, 2:] / 2, true[:, 2:]], axis=1),
            "fractions": true / np.concatenate([sizes, sizes], axis=1),
        }[form]
        found = box_form(boxes, sizes)
        assert (found.name, found.certain) == (form, True)
        np.testing.assert_allclose(as_xywh(boxes, sizes, form), true, atol=1e-9)


def test_a_mixture_of_forms_is_told_and_not_certain():
    true, sizes = some_boxes(200)
    true[:, :2] = np.clip(true[:, :2], 0, None)
    mixed = true.copy()
    mixed[:120, 2:] += mixed[:120, :2]
    found = box_form(mixed, sizes)
    assert found.name == "xyxy" and not found.certain and set(found.rows) <= set(range(120))


def test_areas_give_few_boxes_away():
    boxes, sizes = (
        np.array([[300, 200, 400, 300], [350, 250, 600, 400], [400, 300, 500, 350.0]]),
        np.tile([[640, 480]], (3, 1)),
    )
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    assert box_form(boxes, sizes, areas).certain
    assert not box_form(boxes, sizes).certain


# ---- anchors


@pytest.mark.parametrize("detector", ["retinanet", "faster_rcnn"])
@pytest.mark.parametrize("size", [(320, 240), (150, 333), (64, 64)])
def test_the_best_overlap_is_that_with_the_networks_own_anchors(detector, size):
    setting = Setting(detector, (16, 32, 64, 128, 256), 320, 320, "test")
    raw = {"output_dir": "x", "data": {"train": {"annotations": "a"}, "val": {"annotations": "a"}}}
    raw["model"] = {
        "detector": detector,
        "anchor_sizes": list(setting.anchor_sizes),
        "fpn_channels": 8,
        "head_channels": 8,
    }
    raw["model"]["backbone"] = {"width": 0.5}
    model = build_model(parse_config(raw, "test"), 2).eval()
    rng = np.random.default_rng(0)
    boxes = np.sort(rng.uniform(0, 1, (80, 2, 2)), axis=1).reshape(80, 4) * np.array(size * 2)
    sizes = np.tile([size], (80, 1))
    seen, frames = resize(boxes, sizes, setting)
    width, height = frames[0].astype(int).tolist()
    with torch.inference_mode():
        maps = list(model.backbone(torch.zeros(1, 3, height, width)).values())
        generator = model.anchor_generator if detector == "retinanet" else model.rpn.anchor_generator
        anchors = generator(ImageList(torch.zeros(1, 3, height, width), [(height, width)]), maps)[0]
    per_level = [m.shape[2] * m.shape[3] * n for m, n in zip(maps, generator.num_anchors_per_location(), strict=True)]
    expected = [box_iou(torch.tensor(seen), level.double()).amax(dim=1) for level in anchors.split(per_level)]
    np.testing.assert_allclose(best_overlaps(boxes, sizes, setting), torch.stack(expected, dim=1).numpy(), atol=1e-6)


@pytest.mark.slow
def test_memory_grows_with_the_batch_and_the_image():
    raw = {"output_dir": "x", "data": {"train": {"annotations": "a"}, "val": {"annotations": "a"}}}
    raw["data"] |= {"batch_size": 2, "short_side": 128, "long_side": 128}
    raw["model"] = {"backbone": {"width": 0.5}, "fpn_channels": 16, "head_channels": 16}
    config = parse_config(raw, "test")
    small = predicted_memory(config, 3)
    assert small["total"] == small["weights"] + small["images"]
    large = predicted_memory(config.with_overrides(["data.batch_size=8", "optim.name=adamw"]), 3)
    assert large["images"] == pytest.approx(4 * small["images"]) and large["weights"] > small["weights"]
    wide = predicted_memory(config.with_overrides(["data.short_side=256", "data.long_side=256"]), 3)
    assert wide["images"] == pytest.approx(4 * small["images"], rel=0.05)


# ---- images


@pytest.mark.parametrize("orientation", range(1, 9))
def test_thumbnails_are_upright(tmp_path, orientation):
    rng = np.random.default_rng(0)
    image = Image.fromarray(cv2.resize(rng.integers(0, 255, (6, 8, 3), np.uint8), (160, 120)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    seen = look(str(tmp_path / "a.jpg"), decode=True)
    assert seen.orientation == orientation and seen.size == (160, 120)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg")).convert("L")
    expected = cv2.resize(np.asarray(upright), (17, 16), interpolation=cv2.INTER_AREA)
    thumb = np.frombuffer(seen.thumb, np.uint8).reshape(16, 17)
    assert np.abs(thumb.astype(int) - expected).mean() < 3


def test_processes_see_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("detection.doctor.image_checks.ALONE", 0)
    monkeypatch.setattr("detection.doctor.image_checks.CHUNK", 5)
    folder = write_clean(tmp_path).parent / "images"
    (folder / "bad.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing")
    paths = [*sorted(folder.iterdir()), None, tmp_path / "absent.jpg"]
    one, two = look_at(paths, workers=1), look_at(paths, workers=2)
    assert one.looks == two.looks and np.array_equal(one.thumbs, two.thumbs)
    assert [found.status for found in one.looks[-3:]] == ["ok", "unseen", "missing"]
    assert one.looks[0].status in ("truncated", "unreadable")


@pytest.mark.slow
def test_a_file_over_which_a_process_dies_is_named(tmp_path, monkeypatch):
    """The limit of memory stands in for a decoder that crashes."""
    monkeypatch.setattr("detection.doctor.image_checks.ALONE", 0)
    monkeypatch.setattr("detection.doctor.image_checks.CHUNK", 5)
    monkeypatch.setattr("detection.doctor.probe_workers.probe_many", die_of_number_7)
    folder = write_clean(tmp_path).parent / "images"
    found = look_at(sorted(folder.iterdir()), workers=2)
    assert [one.status for one in found.looks] == ["ok"] * 7 + ["damaged"] + ["ok"] * 4
    assert "set 07.jpg died" in found.looks[7].detail


def die_of_number_7(files, decode):
    if any(file.endswith("set 07.jpg") for file in files):
        os._exit(1)
    return [look(file, decode) for file in files]


def test_boxes_in_boxes_are_counted(tmp_path):
    raw = read_set(write_clean(tmp_path), "data")
    boxes = raw.boxes.copy()
    boxes[:8] = [[0, 0, 90, 70], *([i * 10, i * 8, 9, 7] for i in range(7))]
    categories, images = raw.category_rows.copy(), raw.image_rows.copy()
    categories[:8], images[:8] = 0, 0
    images[8:] = np.maximum(images[8:], 2)
    _, _, regions, within = doubles(replace_entries(raw, boxes=boxes, category_rows=categories, image_rows=images))
    assert regions.tolist() == [0] and within[0] == 7
    categories[5:8] = 1
    _, _, regions, within = doubles(replace_entries(raw, boxes=boxes, category_rows=categories, image_rows=images))
    assert regions.tolist() == [] and within[0] == 4


def replace_entries(raw, **fields):
    return raw.replace(**fields)


def test_another_input_size_is_in_steps_of_32():
    assert DEFAULT.resized(1.5).short_side == 480
    assert replace(DEFAULT, short_side=800, long_side=1333).resized(0.5).long_side == 672
