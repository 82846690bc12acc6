"""Annotations, targets, transforms, batches."""

import json

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from detection import UserError
from detection.data.dataset import DetectionDataset, SampleKey, build_dataset
from detection.data.formats.coco import read_coco
from detection.data.image_io import read_image
from detection.data.load_split import check_same_classes
from detection.data.loader import build_loader, iterate
from detection.data.sampler import EvalBatchSampler, TrainBatchSampler
from detection.data.transforms import resize, to_original

IMAGE = {"id": 1, "file_name": "a.jpg", "width": 100, "height": 50}
CATEGORY = {"id": 5, "name": "thing"}


def coco(tmp_path, annotations, images=(IMAGE,), categories=(CATEGORY,)):
    path = tmp_path / "a.json"
    path.write_text(
        json.dumps({"images": list(images), "annotations": list(annotations), "categories": list(categories)})
    )
    return path


def box(*xywh, **more):
    return {"id": 1, "image_id": 1, "category_id": 5, "bbox": list(xywh), "area": 1.0, "iscrowd": 0, **more}


def test_labels_follow_sorted_category_ids(coco_set):
    index = read_coco(coco_set / "annotations.json")
    assert index.class_names == ("square", "disc") and index.category_ids.tolist() == [3, 7]
    content = json.loads((coco_set / "annotations.json").read_text())
    for annotation in content["annotations"]:
        i = index.image_ids.tolist().index(annotation["image_id"])
        rows = slice(index.offsets[i], index.offsets[i + 1])
        assert annotation["category_id"] in index.category_ids[index.labels[rows] - 1]
        assert annotation["bbox"] in index.boxes[rows].tolist()


def test_crowd_and_empty_images(coco_set):
    index = read_coco(coco_set / "annotations.json")
    boxes, labels = index.training_boxes(0)
    assert boxes.shape == (0, 4) and boxes.dtype == np.float32 and labels.shape == (0,) and labels.dtype == np.int64
    assert len(index.training_boxes(1)[0]) == 1 and index.offsets[2] - index.offsets[1] == 2
    regions, of_class = index.ignored_regions(1)
    assert regions.shape == (1, 4) and of_class.tolist() == [2] and len(index.ignored_regions(2)[0]) == 0
    assert "1 images without boxes (kept)" in index.report()
    assert "1 crowd regions (ignored)" in index.report()


def test_boxes_are_clipped_and_degenerate_ones_dropped_with_a_report(tmp_path):
    annotations = [
        box(-10, -10, 30, 30),
        box(90, 40, 30, 30),
        box(10, 10, 0, 5),
        box(10, 10, 5, -3),
        box(200, 10, 5, 5),
        box(20, 20, 5, 5),
    ]
    index = read_coco(coco(tmp_path, annotations))
    boxes, labels = index.training_boxes(0)
    assert boxes.tolist() == [[0, 0, 20, 20], [90, 40, 100, 50], [20, 20, 25, 25]]
    assert labels.tolist() == [1, 1, 1]
    report = index.report()
    assert "2 boxes clipped" in report and "3 degenerate boxes dropped from training (a.jpg [10.0, 10.0, 0.0" in report
    # What evaluation sees is as in the file.
    assert [a["bbox"] for a in index.to_coco()["annotations"]] == [a["bbox"] for a in annotations]


def test_missing_area_and_crowd_are_filled_and_said(tmp_path):
    annotation = box(1, 2, 10, 20)
    del annotation["area"], annotation["iscrowd"]
    index = read_coco(coco(tmp_path, [annotation]))
    assert index.areas.tolist() == [200.0] and index.crowd.tolist() == [False]
    assert "1 annotations without area" in index.report() and "1 annotations without iscrowd" in index.report()


@pytest.mark.parametrize(
    ("annotations", "images", "categories", "message"),
    [
        ([box(1, 2, 3, 4, image_id=9)], [IMAGE], [CATEGORY], "annotation 1 names image 9"),
        ([box(1, 2, 3, 4, category_id=9)], [IMAGE], [CATEGORY], "annotation 1 names category 9"),
        ([box(1, 2, 3)], [IMAGE], [CATEGORY], r"annotation 1 has bbox \[1, 2, 3\]"),
        ([box("a", 2, 3, 4)], [IMAGE], [CATEGORY], "expected are four numbers"),
        ([{**box(1, 2, 3, 4), "bbox": None}], [IMAGE], [CATEGORY], "annotation 1"),
        ([box(1, 2, 3, float("nan"))], [IMAGE], [CATEGORY], "not finite"),
        ([{"id": 4, "image_id": 1}], [IMAGE], [CATEGORY], "annotation 4 has no 'category_id'"),
        ([], [IMAGE, IMAGE], [CATEGORY], "image id 1 is there more than once"),
        ([], [IMAGE], [CATEGORY, CATEGORY], "category id 5 is there more than once"),
        ([], [{"id": 1, "file_name": "a.jpg"}], [CATEGORY], "image 1 has no 'width'"),
        ([], [{**IMAGE, "width": 0}], [CATEGORY], "image a.jpg has width 0"),
        ([], [{**IMAGE, "id": "one"}], [CATEGORY], "image id 'one' is not a whole number"),
        ([], [], [CATEGORY], "has no images"),
        ([], [IMAGE], [], "has no categories"),
    ],
)
def test_bad_annotations_are_named(tmp_path, annotations, images, categories, message):
    with pytest.raises(UserError, match=message) as error:
        read_coco(coco(tmp_path, annotations, images, categories))
    assert "a.json" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "is not JSON"), ("{", "is not JSON"), ("[1]", "no list 'images'"), ('{"images": 3}', "not in COCO format")],
)
def test_files_that_are_not_coco(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_coco(tmp_path / "x.json")
    with pytest.raises(UserError, match="does not exist"):
        read_coco(tmp_path / "y.json")


def test_class_mismatch_is_named(tmp_path):
    one = read_coco(coco(tmp_path, []))
    two = read_coco(coco(tmp_path, [], categories=[{"id": 5, "name": "other"}]))
    with pytest.raises(UserError, match="id 5 is 'thing' in the first, 'other' in the second"):
        check_same_classes(one, two)


# ---- images


@settings(deadline=None)  # the first comparison of tensors imports for two seconds
@given(
    width=st.integers(1, 900),
    height=st.integers(1, 900),
    short=st.integers(16, 400),
    more=st.integers(0, 300),
    corners=arrays(np.float32, (5, 4), elements=st.floats(0, 1, width=32)),
)
def test_resize_and_back_is_identity_on_boxes(width, height, short, more, corners):
    image, (fx, fy) = resize(np.zeros((height, width, 3), np.uint8), short, short + more)
    new_height, new_width = image.shape[:2]
    assert (round(width * fx), round(height * fy)) == (new_width, new_height)
    assert max(new_width, new_height) <= short + more
    assert min(new_width, new_height) <= short
    boxes = torch.from_numpy(np.sort(corners.reshape(5, 2, 2), axis=1).reshape(5, 4)) * torch.tensor(
        [width, height, width, height]
    )
    back = to_original(boxes * torch.tensor([fx, fy, fx, fy]), (fx, fy), (height, width))
    torch.testing.assert_close(back, boxes, rtol=1e-5, atol=1e-3)


@given(arrays(np.float32, (4, 4), elements=st.floats(-500, 900, width=32)))
def test_boxes_end_inside_the_original(boxes):
    back = to_original(torch.from_numpy(boxes), (0.5, 0.25), (200, 300))
    assert (back >= 0).all() and (back[:, 0::2] <= 300).all() and (back[:, 1::2] <= 200).all()


@pytest.mark.parametrize(
    ("size", "expected"),
    [((640, 480), (1067, 800)), ((480, 640), (800, 1067)), ((2000, 500), (1333, 333)), ((800, 1333), (800, 1333))],
)
def test_short_and_long_side(size, expected):
    image, _ = resize(np.zeros((size[1], size[0], 3), np.uint8), 800, 1333)
    assert (image.shape[1], image.shape[0]) == expected


def test_grey_alpha_and_orientation(tmp_path):
    grey = np.arange(0, 240, 4, dtype=np.uint8).reshape(6, 10)
    cv2.imwrite(str(tmp_path / "grey.png"), grey)
    assert np.array_equal(read_image(tmp_path / "grey.png"), np.repeat(grey[:, :, None], 3, 2))
    cv2.imwrite(str(tmp_path / "alpha.png"), np.dstack([grey] * 4))
    assert read_image(tmp_path / "alpha.png").shape == (6, 10, 3)
    color = np.zeros((4, 4, 3), np.uint8)
    color[..., 2] = 255  # red in OpenCV's order
    cv2.imwrite(str(tmp_path / "red.png"), color)
    assert read_image(tmp_path / "red.png")[0, 0].tolist() == [255, 0, 0]

    from PIL import Image

    turned = Image.fromarray(np.zeros((20, 40, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, to be shown upright
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (40, 20, 3)
    assert read_image(tmp_path / "turned.jpg", (20, 40)).shape == (40, 20, 3)
    # Annotated as stored: then that is what is trained on.
    assert read_image(tmp_path / "turned.jpg", (40, 20)).shape == (20, 40, 3)
    with pytest.raises(UserError, match="is 20x40 pixels, its annotation says 10x10"):
        read_image(tmp_path / "turned.jpg", (10, 10))


def test_bad_images_are_named(tmp_path):
    cv2.imwrite(str(tmp_path / "whole.jpg"), np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    data = (tmp_path / "whole.jpg").read_bytes()
    cases = {
        "half.jpg": (data[: len(data) // 2], "truncated"),
        "half.png": (cv2.imencode(".png", cv2.imread(str(tmp_path / "whole.jpg")))[1].tobytes()[:5000], "truncated"),
        "empty.jpg": (b"", "not an image"),
        "text.png": (b"hello", "not an image"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message) as error:
            read_image(tmp_path / name)
        assert name in str(error.value)
    (tmp_path / "tail.jpg").write_bytes(data + b"bytes that some cameras append")
    assert read_image(tmp_path / "tail.jpg").shape == (64, 64, 3)


# ---- samples and batches


def test_samples(tiny_config):
    for split in ("train", "val"):
        dataset = build_dataset(tiny_config, split)
        image, target = dataset[SampleKey(0, 0)]
        assert image.dtype == torch.uint8 and image.dim() == 3
        assert target["boxes"].shape == (0, 4) and target["boxes"].dtype == torch.float32
        assert target["labels"].shape == (0,) and target["labels"].dtype == torch.int64
        image, target = dataset[SampleKey(0, 2)]
        assert target["image_id"] == 20 and set(target["labels"].tolist()) <= {1, 2}
        assert target["ignored_boxes"].shape == (0, 4) and target["ignored_labels"].dtype == torch.int64
    assert target["size"] == (96, 96) and target["scale"] == (1.0, 1.0)


def test_workers_and_epochs_decide_nothing_but_their_part(tiny_config):
    dataset = build_dataset(tiny_config, "train")
    batches = TrainBatchSampler(dataset.annotations.sizes, 4, seed=3, group_by_aspect=True)
    seen = []
    for workers in (0, 2):
        loader = build_loader(dataset, batches, workers=workers, device=torch.device("cpu"))
        for epoch in (0, 1):
            batches.set_epoch(epoch)
            seen.append(
                [[(image.sum().item(), t["image_id"]) for image, t in zip(*b, strict=True)] for b in iterate(loader)]
            )
    assert seen[0] == seen[2] and seen[1] == seen[3] and seen[0] != seen[1]


def test_train_batches():
    sizes = np.array([(100, 50)] * 13 + [(50, 100)] * 9)
    batches = TrainBatchSampler(sizes, 4, seed=0, group_by_aspect=True)
    epoch = list(batches)
    assert len(epoch) == len(batches) == 5 and all(len(b) == 4 for b in epoch)
    indices = [i for b in epoch for _, i, *_ in b]
    assert len(set(indices)) == 20
    mixed = [b for b in epoch if len({sizes[i][0] for _, i, *_ in b}) > 1]
    assert len(mixed) <= 1
    batches.set_epoch(0, start=3)
    assert list(batches) == epoch[3:]
    batches.set_epoch(1)
    assert [i for b in batches for _, i, *_ in b] != indices
    assert len(list(TrainBatchSampler(sizes[:3], 4, seed=0, group_by_aspect=True))) == 1


def test_eval_batches_see_each_image_once():
    sizes = np.random.default_rng(0).integers(50, 200, (23, 2))
    batches = list(EvalBatchSampler(sizes, 4))
    assert sorted(i for b in batches for _, i, *_ in b) == list(range(23)) and len(batches) == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_one_plain_error_also_from_a_worker(tiny_config, workers):
    dataset = build_dataset(tiny_config, "val")
    path = dataset.images / "image 5.jpg"
    path.write_bytes(path.read_bytes()[:200])
    loader = build_loader(
        dataset, EvalBatchSampler(dataset.annotations.sizes, 4), workers=workers, device=torch.device("cpu")
    )
    with pytest.raises(UserError) as error:
        list(iterate(loader))
    assert str(error.value).startswith("image ") and "image 5.jpg is truncated" in str(error.value)


def test_absent_images_are_counted_and_named(tiny_config, coco_set):
    for i in (2, 3):
        (coco_set / "images" / f"image {i}.jpg").unlink()
    with pytest.raises(UserError, match=r"2 of 12 images named in .* are not in .*: image 2\.jpg, image 3\.jpg"):
        build_dataset(tiny_config, "train")
    tiny_config.data.train.images = str(coco_set / "nowhere")
    with pytest.raises(UserError, match=r"data\.train\.images: folder .*nowhere does not exist"):
        build_dataset(tiny_config, "train")


def test_training_without_any_annotation_is_refused(tiny_config, coco_set):
    path = coco_set / "annotations.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "annotations": []}))
    with pytest.raises(UserError, match="no annotation at all"):
        build_dataset(tiny_config, "train")
    assert len(build_dataset(tiny_config, "val")) == 12


@pytest.mark.parametrize("name", ["bccd", "cards", "coco128", "coco_mini", "person"])
def test_real_annotations(shared_data, name):
    for path in sorted((shared_data / name).glob("*.json")):
        index = read_coco(path)
        dataset = DetectionDataset(index, shared_data / name / "images", short_side=128, long_side=160)
        for i in range(0, len(index), max(1, len(index) // 8)):
            image, target = dataset.load(SampleKey(0, i))
            height, width = image.shape[1:]
            boxes = target["boxes"]
            assert (boxes[:, 2:] > boxes[:, :2]).all() and (boxes >= 0).all()
            assert (boxes[:, 0::2] <= width + 1e-3).all() and (boxes[:, 1::2] <= height + 1e-3).all()


def test_no_more_workers_than_batches(coco_set):
    index = read_coco(coco_set / "annotations.json")
    dataset = DetectionDataset(index, coco_set / "images", short_side=96, long_side=96)
    batches = EvalBatchSampler(index.sizes, 4)
    for workers, made in ((96, len(batches)), (1, 1), (0, 0)):
        assert build_loader(dataset, batches, workers=workers, device=torch.device("cpu")).num_workers == made
