"""COCO, VOC and YOLO from disk into one index, by hand-written sets with known answers."""

import os
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_raw
from PIL import Image
from small_sets import save_image, voc_object, voc_xml

from detection import UserError
from detection.config_io import parse_config
from detection.data.classes import choose_classes
from detection.data.dataset import SampleKey, build_dataset
from detection.data.formats.detect_format import read_annotations
from detection.data.image_io import image_size, read_image
from detection.data.load_split import read_split
from detection.data.prepare.convert import convert_data

# ---- what is right


def test_voc_counts_pixels_from_one(voc_set):
    index = read_annotations(voc_set, split="train")
    assert index.format == "voc" and index.class_names == ("cat", "dog") and index.category_ids.tolist() == [1, 2]
    assert index.file_names.tolist() == ["gato ñ 1.jpg"] and index.sizes.tolist() == [[60, 40]]
    assert index.boxes.tolist() == [[0, 0, 60, 40], [10, 20, 10, 10]] and index.labels.tolist() == [1, 2]
    assert index.crowd.tolist() == [False, True] and index.areas.tolist() == [2400, 100]
    assert "1 difficult objects: taken as crowd" in index.report()
    assert Path(index.images) == voc_set / "JPEGImages"


def test_ways_to_name_a_voc_set(voc_set, tmp_path):
    for path, split, count in (
        (voc_set, None, 2),
        (voc_set / "Annotations", None, 2),
        (voc_set / "ImageSets/Main/train.txt", None, 1),
        (voc_set, "train", 1),
    ):
        index = read_annotations(path, split=split)
        assert len(index) == count and Path(index.images) == voc_set / "JPEGImages"
    with pytest.raises(UserError, match=r"has no ImageSets/Main/val\.txt"):
        read_annotations(voc_set, split="val")
    # As Roboflow lays it: XML and images in one folder.
    for name in ("Annotations/b.xml", "JPEGImages/b.jpg"):
        (tmp_path / "flat").mkdir(exist_ok=True)
        os.link(voc_set / name, tmp_path / "flat" / Path(name).name)
    index = read_annotations(tmp_path / "flat")
    assert index.file_names.tolist() == ["b.jpg"] and index.images == str(tmp_path / "flat") and len(index.boxes) == 0
    # The image set of a class; one stem with a space before a number is a name where such a file is.
    (voc_set / "ImageSets/Main/cat_train.txt").write_text("gato ñ 1\nb -1\n", encoding="utf-8")
    assert len(read_annotations(voc_set / "ImageSets/Main/cat_train.txt")) == 2


def test_voc_images_are_found_by_either_name(voc_set):
    """Tools rename the image and not what the XML says, or convert it to another kind of file."""
    (voc_set / "Annotations/b.xml").write_text(voc_xml("", name="elsewhere/IMG_1.jpg"))
    assert read_annotations(voc_set).file_names.tolist() == ["b.jpg", "gato ñ 1.jpg"]
    save_image(voc_set / "JPEGImages/b.png")
    (voc_set / "JPEGImages/b.jpg").unlink()
    assert read_annotations(voc_set).file_names.tolist() == ["b.png", "gato ñ 1.jpg"]


def test_yolo_boxes_polygons_and_images_without_labels(yolo_set):
    index = read_annotations(yolo_set)
    assert index.format == "yolo" and index.class_names == ("кот", "dog") and index.category_ids.tolist() == [1, 2]
    assert index.file_names.tolist() == ["images/train/a 猫.jpg", "images/train/c.jpg", "images/train/sub/b.png"]
    assert np.diff(index.offsets).tolist() == [2, 0, 1] and index.labels.tolist() == [2, 1, 1]
    np.testing.assert_allclose(index.boxes, [[0, 0, 60, 40], [12, 16, 6, 8], [6, 4, 6, 8]])
    assert Path(index.images) == yolo_set
    (yolo_set / "labels/train/c.txt").unlink()
    assert "1 images without a label file: taken as without boxes" in read_annotations(yolo_set / "data.yaml").report()
    assert len(read_annotations(yolo_set, split="val")) == 1


def test_ways_to_write_a_data_yaml(yolo_set, monkeypatch):
    expected = read_annotations(yolo_set).fingerprint()
    (yolo_set / "list.txt").write_text(
        "./images/train/a 猫.jpg\nimages/train/c.jpg\nimages/train/sub/b.png\n", encoding="utf-8"
    )
    for text in (
        "path: .\ntrain: ../images/train\nnames: {0: кот, 1: dog}\n",  # as Roboflow writes it
        f"path: {yolo_set}\ntrain: [images/train/sub, images/train]\nnames: {{1: dog, 0: кот}}\n",
        "path: /not/on/this/machine\ntrain: list.txt\nnames: [кот, dog]\n",
    ):
        (yolo_set / "data.yaml").write_text(text, encoding="utf-8")
        assert read_annotations(yolo_set).fingerprint() == expected, text
    # Images that lie elsewhere keep their whole path.
    other = yolo_set.parent / "elsewhere" / "data.yaml"
    other.parent.mkdir()
    other.write_text(f"train: {yolo_set}/images/train\nnames: [кот, dog]\n", encoding="utf-8")
    index = read_annotations(other)
    assert index.file_names[0] == f"{yolo_set}/images/train/a 猫.jpg" and len(index.boxes) == 3


def test_sizes_are_those_of_the_upright_image(tmp_path, yolo_set):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = yolo_set / "images/val/d.jpg"
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(path, exif=exif)
    assert image_size(path) == (40, 60)
    assert read_annotations(yolo_set, split="val").boxes.tolist() == [[10, 15, 20, 30]]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp", ".tif", ".ppm"])
def test_sizes_of_headers(tmp_path, suffix):
    assert image_size(save_image(tmp_path / f"a{suffix}", 31, 17)) == (31, 17)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_sizes_are_those_of_the_image_that_is_trained_on(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.zeros((20, 40, 3), np.uint8)).save(tmp_path / f"a{suffix}", exif=exif)
    height, width = read_image(tmp_path / f"a{suffix}").shape[:2]
    assert image_size(tmp_path / f"a{suffix}") == (width, height)


def test_usual_places_of_coco_images(tmp_path, coco_set):
    content = (coco_set / "annotations.json").read_text()
    root = tmp_path / "coco"
    for name in ("annotations", "train2017", "valid"):
        (root / name).mkdir(parents=True)
    (root / "annotations/instances_train2017.json").write_text(content)
    (root / "valid/_annotations.coco.json").write_text(content)
    assert read_annotations(root, split="train").images == str(root / "train2017")
    assert read_annotations(root, split="val").images == str(root / "valid")
    assert read_annotations(coco_set).images == str(coco_set / "images")
    with pytest.raises(UserError, match=r"has several: annotations/instances_train2017\.json, valid/_annotations"):
        read_annotations(root)


def test_a_folder_that_could_be_two_things_asks(voc_set, yolo_set, coco_set):
    (voc_set / "data.yaml").write_text("names: [a]\n")
    with pytest.raises(UserError, match="looks like voc and like yolo; say which with format"):
        read_annotations(voc_set)
    assert len(read_annotations(voc_set, format="voc")) == 2
    with pytest.raises(UserError, match="is in no known format"):
        read_annotations(coco_set / "images")
    with pytest.raises(UserError, match="is in no known format"):
        read_annotations(coco_set / "images" / "image 0.jpg")


# ---- classes, and what is made of it all


def test_chosen_and_merged_classes(coco_set):
    index = read_annotations(coco_set)
    assert index.class_names == ("square", "disc")
    some = choose_classes(index, ["disc"])
    assert some.class_names == ("disc",) and some.category_ids.tolist() == [7] and len(some) == len(index)
    for i in range(len(index)):
        rows, own = (slice(x.offsets[i], x.offsets[i + 1]) for x in (index, some))
        assert some.boxes[own].tolist() == index.boxes[rows][index.labels[rows] == 2].tolist()
    assert (some.labels == 1).all() and "11 boxes of 1 classes that were not chosen left out" in some.report()
    one = choose_classes(index, {"thing": ["disc", "square"]})
    assert one.class_names == ("thing",) and one.category_ids.tolist() == [3] and len(one.boxes) == len(index.boxes)
    # Labels follow the ids, whatever the order in which they are chosen.
    assert choose_classes(index, ["disc", "square"]).fingerprint() == index.fingerprint()
    for chosen, message in (
        (["disk"], r"has no class 'disk' \(did you mean 'disc'\?\); it has square, disc"),
        ({"a": ["disc"], "b": ["disc"]}, "'disc' is in 'a' and in 'b'; it can be in one"),
        (["disc", "disc"], "has a class twice"),
    ):
        with pytest.raises(UserError, match=message):
            choose_classes(index, chosen)
    with pytest.raises(UserError, match="has none of the classes"):
        choose_classes(index, ["car"], lenient=True)


def test_classes_of_the_config(tiny_config):
    config = tiny_config.with_overrides(["data.classes={thing: [square, disc]}"])
    assert build_dataset(config, "train").annotations.class_names == ("thing",)
    config = tiny_config.with_overrides(["data.classes=[disc]"])
    assert build_dataset(config, "val").annotations.category_ids.tolist() == [7]
    for wrong in ("[]", "[5]", "disc", "{a: disc}", "{a: []}"):
        with pytest.raises(UserError, match=r"data\.classes: expected: names, like \[car, bus\]") as error:
            tiny_config.with_overrides([f"data.classes={wrong}"])
        assert len(str(error.value).splitlines()) == 1


def test_voc_splits_share_their_classes(voc_set, tmp_path):
    """A class that only one of them has must not shift the labels of the other."""
    (voc_set / "Annotations/b.xml").write_text(voc_xml(voc_object("ant"), name="b.jpg"))
    (voc_set / "ImageSets/Main/val.txt").write_text("b\n")
    raw = tiny_raw(tmp_path, tmp_path / "run")
    raw["data"]["train"] = raw["data"]["val"] = {"annotations": str(voc_set)}
    data = parse_config(raw, "test").data
    for split, label in (("train", 2), ("val", 1)):
        index = read_split(data, split)
        assert index.class_names == ("ant", "cat", "dog") and index.labels[0] == label
    assert read_split(data, "val", alone=True).class_names == ("ant",)


@pytest.mark.numeric
@pytest.mark.parametrize("kind", ["voc", "yolo"])
def test_training_and_evaluation_in_every_format(coco_set, tmp_path, kind):
    from detection.engine.train_detector import run_training
    from detection.evaluation.score import score_checkpoint

    convert_data(
        [f"train={coco_set}/annotations.json", f"val={coco_set}/annotations.json"],
        kind,
        tmp_path / kind,
        transfer="link",
    )
    raw = tiny_raw(coco_set, tmp_path / "run")
    source = tmp_path / kind / ("data.yaml" if kind == "yolo" else ".")
    raw["data"]["train"] = raw["data"]["val"] = {"annotations": str(source)}
    raw["train"] |= {"epochs": 1}
    config = parse_config(raw, "test")
    sample = build_dataset(config, "val")[SampleKey(0, 5)]
    expected = build_dataset(parse_config(tiny_raw(coco_set, tmp_path), "test"), "val")
    # VOC's and YOLO's classes are in another order or have other ids: what counts is the name.
    other = expected[SampleKey(0, expected.annotations.file_names.tolist().index(Path(sample_name(config, 5)).name))]
    assert np.array_equal(sample[0], other[0])
    np.testing.assert_allclose(sample[1]["boxes"], other[1]["boxes"], atol=1e-3)
    assert run_training(config)
    evaluation = score_checkpoint(tmp_path / "run" / "best.pt")
    assert evaluation is not None and set(evaluation.to_json()["per_class"]) == {"disc", "square"}
    assert [boxes for *_, boxes in sorted(evaluation.per_class)] == [10, 11]
    if kind == "voc":  # which loses nothing of this set: other ids, the same numbers
        again = score_checkpoint(tmp_path / "run" / "best.pt", annotations=str(coco_set / "annotations.json"))
        assert again is not None
        np.testing.assert_allclose(list(again.numbers.values()), list(evaluation.numbers.values()), atol=1e-6)
        for one, two in zip(sorted(again.per_class), sorted(evaluation.per_class), strict=True):
            assert one[0] == two[0] and one[1:] == pytest.approx(two[1:])


def sample_name(config, i: int) -> str:
    return str(build_dataset(config, "val").annotations.file_names[i])
