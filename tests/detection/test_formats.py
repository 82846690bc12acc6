"""COCO, VOC and YOLO from disk into one index: by hand-written sets with known answers, and by broken ones."""

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import tiny_raw
from PIL import Image

from detection import UserError
from detection.config import parse_config
from detection.data.classes import choose_classes
from detection.data.convert_data import convert_data
from detection.data.dataset import Draw, build_dataset
from detection.data.formats import read_annotations, read_raw
from detection.data.picture_files import picture_size, pictures_below
from detection.data.raw import MOST_PROBLEMS, checks
from detection.data.sources import check_images, read_split
from detection.data.transforms import read_image


def picture(path: Path, width: int = 60, height: int = 40) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(path.suffix, np.zeros((height, width, 3), np.uint8))[1].tobytes())
    return path


def voc_xml(
    objects: str, size: str = "<size><width>60</width><height>40</height><depth>3</depth></size>", name=""
) -> str:
    return f"<annotation><filename>{name}</filename>{size}{objects}</annotation>"


def voc_object(name="cat", corners=(1, 1, 60, 40), more="") -> str:
    xmin, ymin, xmax, ymax = corners
    box = f"<xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax>"
    return f"<object><name>{name}</name>{more}<bndbox>{box}</bndbox></object>"


@pytest.fixture()
def voc(tmp_path: Path) -> Path:
    """Two pictures, of which train.txt has one; names with spaces and letters of other scripts."""
    root = tmp_path / "VOC набор 1"
    for stem, objects in (
        ("gato ñ 1", voc_object() + voc_object("dog", (11, 21, 20, 30), "<difficult>1</difficult>")),
        ("b", ""),
    ):
        picture(root / "JPEGImages" / f"{stem}.jpg")
        (root / "Annotations").mkdir(exist_ok=True)
        (root / "Annotations" / f"{stem}.xml").write_text(voc_xml(objects, name=f"{stem}.jpg"), encoding="utf-8")
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "ImageSets" / "Main" / "train.txt").write_text("gato ñ 1\n", encoding="utf-8")
    return root


@pytest.fixture()
def yolo(tmp_path: Path) -> Path:
    """Three pictures for training, one of them without a label file, one with an empty one; one for validation."""
    root = tmp_path / "YOLO 集"
    for name in ("train/a 猫.jpg", "train/sub/b.png", "train/c.jpg", "val/d.jpg"):
        picture(root / "images" / name)
        (root / "labels" / name).parent.mkdir(parents=True, exist_ok=True)
    (root / "labels/train/a 猫.txt").write_text("1 0.5 0.5 1 1\n\n0 0.25 0.5 0.1 0.2\n")
    (root / "labels/train/sub/b.txt").write_text("0 0.1 0.1 0.2 0.1 0.2 0.3\n")
    (root / "labels/train/c.txt").write_text("")
    (root / "labels/val/d.txt").write_text("1 0.5 0.5 0.5 0.5\n")
    (root / "data.yaml").write_text(
        "train: images/train\nval: [images/val]\nnc: 2\nnames: [кот, dog]\n", encoding="utf-8"
    )
    return root


# ---- what is right


def test_voc_counts_pixels_from_one(voc):
    index = read_annotations(voc, split="train")
    assert index.format == "voc" and index.class_names == ("cat", "dog") and index.category_ids.tolist() == [1, 2]
    assert index.file_names.tolist() == ["gato ñ 1.jpg"] and index.sizes.tolist() == [[60, 40]]
    assert index.boxes.tolist() == [[0, 0, 60, 40], [10, 20, 10, 10]] and index.labels.tolist() == [1, 2]
    assert index.crowd.tolist() == [False, True] and index.areas.tolist() == [2400, 100]
    assert "1 difficult objects: taken as crowd" in index.report()
    assert Path(index.images) == voc / "JPEGImages"


def test_ways_to_name_a_voc_set(voc, tmp_path):
    for path, split, count in (
        (voc, None, 2),
        (voc / "Annotations", None, 2),
        (voc / "ImageSets/Main/train.txt", None, 1),
        (voc, "train", 1),
    ):
        index = read_annotations(path, split=split)
        assert len(index) == count and Path(index.images) == voc / "JPEGImages"
    with pytest.raises(UserError, match=r"has no ImageSets/Main/val\.txt"):
        read_annotations(voc, split="val")
    # As Roboflow lays it: XML and pictures in one folder.
    for name in ("Annotations/b.xml", "JPEGImages/b.jpg"):
        (tmp_path / "flat").mkdir(exist_ok=True)
        os.link(voc / name, tmp_path / "flat" / Path(name).name)
    index = read_annotations(tmp_path / "flat")
    assert index.file_names.tolist() == ["b.jpg"] and index.images == str(tmp_path / "flat") and len(index.boxes) == 0
    # The image set of a class; one stem with a space before a number is a name where such a file is.
    (voc / "ImageSets/Main/cat_train.txt").write_text("gato ñ 1\nb -1\n", encoding="utf-8")
    assert len(read_annotations(voc / "ImageSets/Main/cat_train.txt")) == 2


def test_voc_pictures_are_found_by_either_name(voc):
    """Tools rename the picture and not what the XML says, or convert it to another kind of file."""
    (voc / "Annotations/b.xml").write_text(voc_xml("", name="elsewhere/IMG_1.jpg"))
    assert read_annotations(voc).file_names.tolist() == ["b.jpg", "gato ñ 1.jpg"]
    picture(voc / "JPEGImages/b.png")
    (voc / "JPEGImages/b.jpg").unlink()
    assert read_annotations(voc).file_names.tolist() == ["b.png", "gato ñ 1.jpg"]


def test_yolo_boxes_polygons_and_pictures_without_labels(yolo):
    index = read_annotations(yolo)
    assert index.format == "yolo" and index.class_names == ("кот", "dog") and index.category_ids.tolist() == [1, 2]
    assert index.file_names.tolist() == ["images/train/a 猫.jpg", "images/train/c.jpg", "images/train/sub/b.png"]
    assert np.diff(index.offsets).tolist() == [2, 0, 1] and index.labels.tolist() == [2, 1, 1]
    np.testing.assert_allclose(index.boxes, [[0, 0, 60, 40], [12, 16, 6, 8], [6, 4, 6, 8]])
    assert Path(index.images) == yolo
    (yolo / "labels/train/c.txt").unlink()
    assert "1 pictures without a label file: taken as without boxes" in read_annotations(yolo / "data.yaml").report()
    assert len(read_annotations(yolo, split="val")) == 1


def test_ways_to_write_a_data_yaml(yolo, monkeypatch):
    expected = read_annotations(yolo).fingerprint()
    (yolo / "list.txt").write_text(
        "./images/train/a 猫.jpg\nimages/train/c.jpg\nimages/train/sub/b.png\n", encoding="utf-8"
    )
    for text in (
        "path: .\ntrain: ../images/train\nnames: {0: кот, 1: dog}\n",  # as Roboflow writes it
        f"path: {yolo}\ntrain: [images/train/sub, images/train]\nnames: {{1: dog, 0: кот}}\n",
        "path: /not/on/this/machine\ntrain: list.txt\nnames: [кот, dog]\n",
    ):
        (yolo / "data.yaml").write_text(text, encoding="utf-8")
        assert read_annotations(yolo).fingerprint() == expected, text
    # Pictures that lie elsewhere keep their whole path.
    other = yolo.parent / "elsewhere" / "data.yaml"
    other.parent.mkdir()
    other.write_text(f"train: {yolo}/images/train\nnames: [кот, dog]\n", encoding="utf-8")
    index = read_annotations(other)
    assert index.file_names[0] == f"{yolo}/images/train/a 猫.jpg" and len(index.boxes) == 3


def test_sizes_are_those_of_the_upright_picture(tmp_path, yolo):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = yolo / "images/val/d.jpg"
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(path, exif=exif)
    assert picture_size(path) == (40, 60)
    assert read_annotations(yolo, split="val").boxes.tolist() == [[10, 15, 20, 30]]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp", ".tif", ".ppm"])
def test_sizes_of_headers(tmp_path, suffix):
    assert picture_size(picture(tmp_path / f"a{suffix}", 31, 17)) == (31, 17)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_sizes_are_those_of_the_picture_that_is_trained_on(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.zeros((20, 40, 3), np.uint8)).save(tmp_path / f"a{suffix}", exif=exif)
    height, width = read_image(tmp_path / f"a{suffix}").shape[:2]
    assert picture_size(tmp_path / f"a{suffix}") == (width, height)


def test_usual_places_of_coco_pictures(tmp_path, coco_set):
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


def test_a_folder_that_could_be_two_things_asks(voc, yolo, coco_set):
    (voc / "data.yaml").write_text("names: [a]\n")
    with pytest.raises(UserError, match="looks like voc and like yolo; say which with format"):
        read_annotations(voc)
    assert len(read_annotations(voc, format="voc")) == 2
    with pytest.raises(UserError, match="is in no known format"):
        read_annotations(coco_set / "images")
    with pytest.raises(UserError, match="is in no known format"):
        read_annotations(coco_set / "images" / "picture 0.jpg")


# ---- what is wrong


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        ("", r"b\.xml is empty"),
        ("<annotation><obj", r"b\.xml is not XML: "),
        ("<!DOCTYPE x [<!ENTITY a 'aa'><!ENTITY b '&a;&a;'>]><annotation>&b;</annotation>", "declares entities"),
        (voc_xml(voc_object(corners=(1, 2, "x", 4))), r"b\.xml, object 1 \(cat\) has bndbox '1', '2', 'x', '4'"),
        (voc_xml(voc_object() + "<object><name>dog</name></object>"), r"object 2 \(dog\) has bndbox None"),
        (voc_xml(voc_object(name="")), r"object 1 has no name"),
        (voc_xml(voc_object(corners=(1, 2, "nan", 4))), r"b\.xml, object 1 has a bbox that is not finite"),
    ],
)
def test_bad_voc_files_are_named(voc, xml, message):
    (voc / "Annotations/b.xml").write_text(xml)
    with pytest.raises(UserError, match=message):
        read_annotations(voc)


def test_voc_without_a_size(voc):
    for size in ("", "<size><width>0</width><height>0</height></size>"):
        (voc / "Annotations/b.xml").write_text(voc_xml(voc_object(), size))
        index = read_annotations(voc)
        assert index.sizes.tolist() == [[60, 40], [60, 40]]
        assert "b.xml has no width and height of 1 or more: they are taken from the picture" in index.report()
    (voc / "JPEGImages/b.jpg").unlink()
    with pytest.raises(UserError, match=r"b\.xml has no width and height, and its picture gives none: image .* cannot"):
        read_annotations(voc)


def test_voc_in_utf16_and_bytes_that_are_nothing(voc):
    text = voc_xml(voc_object(name="кот"))
    (voc / "Annotations/b.xml").write_bytes(f"<?xml version='1.0' encoding='utf-16'?>{text}".encode("utf-16"))
    assert "кот" in read_annotations(voc).class_names
    bomb = "<?xml version='1.0' encoding='utf-16'?><!DOCTYPE x [<!ENTITY a 'aa'>]><annotation/>"
    (voc / "Annotations/b.xml").write_bytes(bomb.encode("utf-16"))
    with pytest.raises(UserError, match="declares entities"):
        read_annotations(voc)
    (voc / "Annotations/b.xml").write_bytes(b"<annotation>\xff\xfe\x00</annotation>")
    with pytest.raises(UserError, match=r"b\.xml is not XML"):
        read_annotations(voc)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 0.5 0.5 0.1 0.1", r"c\.txt, line 2 has class 2; data\.yaml has the classes 0…1"),
        ("-1 0.5 0.5 0.1 0.1", "has class -1"),
        ("0.5 0.5 0.5 0.1 0.1", r"has class 0\.5"),
        ("0 0.5 0.5 0.1", "expected are five numbers"),
        ("0 0.5 0.5 0.1 0.1 0.9", "expected are five numbers"),
        ("cat 0.5 0.5 0.1 0.1", "expected are five numbers"),
        ("0 0.5 0.5 nan 0.1", "not pixels"),
        ("0 200 150 30 40", r"expected are shares of the picture's sides \(0…1\), not pixels"),
    ],
)
def test_bad_yolo_lines_are_named(yolo, line, message):
    (yolo / "labels/train/c.txt").write_text(f"0 0.5 0.5 0.1 0.1\n{line}\n")
    with pytest.raises(UserError, match=message):
        read_annotations(yolo)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is no data.yaml"),
        (b"train: [", "is not YAML"),
        (b"names: [a]\ntrain: \xff\xfe", "is not UTF-8 text"),
        (b"train: images/train\n", "has no names"),
        (b"train: images/train\nnames: {0: a, 2: b}\n", "must have the numbers 0…1, not 0, 2"),
        (b"train: images/train\nnames: [a, b]\nnc: 3\n", "nc is 3, and there are 2 names"),
        (b"val: images/val\nnames: [a, b]\n", "has no 'train'; it has val"),
        (b"train: images/nowhere\nnames: [a, b]\n", "train is 'images/nowhere', and .* does not exist"),
        (b"train: labels\nnames: [a, b]\n", "there are no pictures in"),
        (b"train: data.yaml\nnames: [a, b]\n", "is neither a folder of pictures nor a .txt file"),
        (b"train: labels/val/d.txt\nnames: [a, b]\n", r"d\.txt, line 1: '1 0\.5 .*' is not the name of a picture"),
    ],
)
def test_bad_data_yamls_are_named(yolo, text, message):
    (yolo / "data.yaml").write_bytes(text)
    with pytest.raises(UserError, match=message):
        read_annotations(yolo / "data.yaml")


def test_labels_that_are_nowhere_or_not_text(yolo):
    (yolo / "labels/train/c.txt").write_bytes(b"\xff\xfe0 0.5")
    with pytest.raises(UserError, match=r"c\.txt is not text: .* at byte 0"):
        read_annotations(yolo)
    (yolo / "labels").rename(yolo / "marks")
    with pytest.raises(
        UserError, match=r"not one of 3 pictures has a label file; for .*a 猫\.jpg it would be .*a 猫\.txt"
    ):
        read_annotations(yolo)


def test_loops_of_links(yolo, voc):
    """Folders are gone into once; a picture that is a link to itself is named."""
    expected = read_annotations(yolo).fingerprint()
    (yolo / "images/train/again").symlink_to(yolo / "images")
    (yolo / "images/train/sub/up").symlink_to("..")
    assert pictures_below(yolo / "images/train") == ["a 猫.jpg", "again/val/d.jpg", "c.jpg", "sub/b.png"]
    (yolo / "images/train/again").unlink()
    assert read_annotations(yolo).fingerprint() == expected
    (yolo / "images/train/z.jpg").symlink_to("z.jpg")
    with pytest.raises(UserError, match=r"image .*z\.jpg cannot be read: Too many levels of symbolic links"):
        read_annotations(yolo)
    (yolo / "round").symlink_to("round")
    (yolo / "round.json").symlink_to("round.json")
    for path in (yolo / "round", yolo / "round.json"):
        with pytest.raises(UserError, match=r"cannot be read|does not exist"):
            read_annotations(path, format="coco")
    with pytest.raises(UserError, match=r"folder .*round does not exist"):
        check_images(read_annotations(voc, images=yolo / "round"), yolo / "round")


def test_damaged_pictures_of_a_yolo_set_are_named(yolo):
    (yolo / "images/train/c.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"c\.jpg .*; the size of each picture is needed for its boxes"):
        read_annotations(yolo)


def test_all_problems_are_listed_and_the_first_is_raised(yolo):
    (yolo / "labels/train/c.txt").write_text("7 0.5 0.5 0.1 0.1\n0 0.5 0.5 0.1\n1 0.5 0.5 0.2 0.2\n")
    raw = read_raw(yolo)
    assert [problem.kind for problem in raw.problems] == ["bad_class", "bad_line"]
    assert {problem.image for problem in raw.problems} == {"images/train/c.jpg"}
    # The good line is there, and knows its place.
    assert len(raw.boxes) == 4 and raw.place(2).endswith("c.txt, line 3")
    with pytest.raises(
        UserError, match=r"has class 7; .* \(and 1 more such problems; tools/check_data\.py lists them\)"
    ):
        read_annotations(yolo)


def test_a_list_of_problems_ends(tmp_path, yolo):
    (yolo / "labels/train/c.txt").write_text("9 0.5 0.5 0.1 0.1\n" * (MOST_PROBLEMS + 5))
    problems = read_raw(yolo).problems
    assert len(problems.items) == MOST_PROBLEMS and problems.count == MOST_PROBLEMS + 5


def test_checks_find_what_arrays_show(tmp_path):
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 4, "height": 4}] * 2,
        "categories": [{"id": 1, "name": "x"}],
        "annotations": [
            {"id": 5, "image_id": 9, "category_id": 1, "bbox": [0, 0, 1, 1]},
            {"image_id": 1, "category_id": 8, "bbox": [0, 0, float("nan"), 1]},
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    raw = read_raw(tmp_path / "a.json")
    assert [(p.kind, p.message) for p in checks(raw)][:3] == [
        ("duplicate_id", "image id 1 is there more than once"),
        ("unknown_image", "annotation 5 names image 9, which the file does not have"),
        ("unknown_category", "annotation number 2 names category 8, which the file does not have"),
    ]
    assert [p.kind for p in checks(raw)][3:] == ["bad_box"]


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
    assert build_dataset(config, "train").index.class_names == ("thing",)
    config = tiny_config.with_overrides(["data.classes=[disc]"])
    assert build_dataset(config, "val").index.category_ids.tolist() == [7]
    with pytest.raises(UserError, match=r"data\.classes"):
        tiny_config.with_overrides(["data.classes=[]"])


def test_voc_splits_share_their_classes(voc, tmp_path):
    """A class that only one of them has must not shift the labels of the other."""
    (voc / "Annotations/b.xml").write_text(voc_xml(voc_object("ant"), name="b.jpg"))
    (voc / "ImageSets/Main/val.txt").write_text("b\n")
    raw = tiny_raw(tmp_path, tmp_path / "run")
    raw["data"]["train"] = raw["data"]["val"] = {"annotations": str(voc)}
    data = parse_config(raw, "test").data
    for split, label in (("train", 2), ("val", 1)):
        index = read_split(data, split)
        assert index.class_names == ("ant", "cat", "dog") and index.labels[0] == label
    assert read_split(data, "val", alone=True).class_names == ("ant",)


@pytest.mark.parametrize("kind", ["voc", "yolo"])
def test_training_and_evaluation_in_every_format(coco_set, tmp_path, kind):
    from detection.evaluation.score import score_checkpoint
    from detection.training.run import run_training

    convert_data(
        [f"train={coco_set}/annotations.json", f"val={coco_set}/annotations.json"],
        kind,
        tmp_path / kind,
        pictures="link",
    )
    raw = tiny_raw(coco_set, tmp_path / "run")
    source = tmp_path / kind / ("data.yaml" if kind == "yolo" else ".")
    raw["data"]["train"] = raw["data"]["val"] = {"annotations": str(source)}
    raw["train"] |= {"epochs": 1}
    config = parse_config(raw, "test")
    sample = build_dataset(config, "val")[Draw(0, 5)]
    expected = build_dataset(parse_config(tiny_raw(coco_set, tmp_path), "test"), "val")
    # VOC's and YOLO's classes are in another order or have other ids: what counts is the name.
    other = expected[Draw(0, expected.index.file_names.tolist().index(Path(sample_name(config, 5)).name))]
    assert np.array_equal(sample[0], other[0])
    np.testing.assert_allclose(sample[1]["boxes"], other[1]["boxes"], atol=1e-3)
    assert run_training(config)
    evaluation = score_checkpoint(tmp_path / "run" / "best.pt")
    assert evaluation is not None and set(evaluation.to_json()["per_class"]) == {"disc", "square"}
    assert [boxes for *_, boxes in sorted(evaluation.per_class)] == [10, 11]


def sample_name(config, i: int) -> str:
    return str(build_dataset(config, "val").index.file_names[i])
