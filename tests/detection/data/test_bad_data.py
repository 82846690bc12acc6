"""Broken VOC and YOLO sets: each fault is one error that names file and entry, and all of them can be listed."""

import json

import pytest
from small_sets import voc_object, voc_xml

from detection import UserError
from detection.data.formats.detect_format import read_annotations, read_raw
from detection.data.formats.raw import MAX_ISSUES, checks
from detection.data.image_io import images_below
from detection.data.load_split import check_images


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
def test_bad_voc_files_are_named(voc_set, xml, message):
    (voc_set / "Annotations/b.xml").write_text(xml)
    with pytest.raises(UserError, match=message):
        read_annotations(voc_set)


def test_voc_without_a_size(voc_set):
    for size in ("", "<size><width>0</width><height>0</height></size>"):
        (voc_set / "Annotations/b.xml").write_text(voc_xml(voc_object(), size))
        index = read_annotations(voc_set)
        assert index.sizes.tolist() == [[60, 40], [60, 40]]
        assert "b.xml has no width and height of 1 or more: they are taken from the image" in index.report()
    (voc_set / "JPEGImages/b.jpg").unlink()
    with pytest.raises(UserError, match=r"b\.xml has no width and height, and its image gives none: image .* does not"):
        read_annotations(voc_set)


def test_voc_in_utf16_and_bytes_that_are_nothing(voc_set):
    text = voc_xml(voc_object(name="кот"))
    (voc_set / "Annotations/b.xml").write_bytes(f"<?xml version='1.0' encoding='utf-16'?>{text}".encode("utf-16"))
    assert "кот" in read_annotations(voc_set).class_names
    bomb = "<?xml version='1.0' encoding='utf-16'?><!DOCTYPE x [<!ENTITY a 'aa'>]><annotation/>"
    (voc_set / "Annotations/b.xml").write_bytes(bomb.encode("utf-16"))
    with pytest.raises(UserError, match="declares entities"):
        read_annotations(voc_set)
    (voc_set / "Annotations/b.xml").write_bytes(b"<annotation>\xff\xfe\x00</annotation>")
    with pytest.raises(UserError, match=r"b\.xml is not XML"):
        read_annotations(voc_set)


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
        ("0 200 150 30 40", r"expected are shares of the image's sides \(0…1\), not pixels"),
    ],
)
def test_bad_yolo_lines_are_named(yolo_set, line, message):
    (yolo_set / "labels/train/c.txt").write_text(f"0 0.5 0.5 0.1 0.1\n{line}\n")
    with pytest.raises(UserError, match=message):
        read_annotations(yolo_set)


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
        (b"train: labels\nnames: [a, b]\n", "there are no images in"),
        (b"train: data.yaml\nnames: [a, b]\n", "is neither a folder of images nor a .txt file"),
        (b"train: labels/val/d.txt\nnames: [a, b]\n", r"d\.txt, line 1: '1 0\.5 .*' is not the name of an image"),
    ],
)
def test_bad_data_yamls_are_named(yolo_set, text, message):
    (yolo_set / "data.yaml").write_bytes(text)
    with pytest.raises(UserError, match=message):
        read_annotations(yolo_set / "data.yaml")


def test_labels_that_are_nowhere_or_not_text(yolo_set):
    (yolo_set / "labels/train/c.txt").write_bytes(b"\xff\xfe0 0.5")
    with pytest.raises(UserError, match=r"c\.txt is not text: .* at byte 0"):
        read_annotations(yolo_set)
    (yolo_set / "labels").rename(yolo_set / "marks")
    with pytest.raises(
        UserError, match=r"not one of 3 images has a label file; for .*a 猫\.jpg it would be .*a 猫\.txt"
    ):
        read_annotations(yolo_set)


def test_lists_of_images_that_are_none(voc_set, yolo_set, monkeypatch):
    image_set, list_file = voc_set / "ImageSets/Main/train.txt", yolo_set / "list.txt"
    (yolo_set / "data.yaml").write_text("train: list.txt\nnames: [a, b]\n")
    for data, message in (
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b"b\xff\n", "is not UTF-8 text: .* at byte 1"),
        (b"b.jpg\n" * 10, "more than once|does not exist"),
        (b"x" * 200, "is too large: 200 bytes, the limit is 100"),
    ):
        monkeypatch.setattr("detection.data.image_io.LARGEST_LIST", 100)
        for path, source in ((image_set, image_set), (list_file, yolo_set)):
            path.write_bytes(data)
            with pytest.raises(UserError, match=message):
                read_annotations(source)


def test_loops_of_links(yolo_set, voc_set):
    """Folders are gone into once; an image that is a link to itself is named."""
    expected = read_annotations(yolo_set).fingerprint()
    (yolo_set / "images/train/again").symlink_to(yolo_set / "images")
    (yolo_set / "images/train/sub/up").symlink_to("..")
    assert images_below(yolo_set / "images/train") == ["a 猫.jpg", "again/val/d.jpg", "c.jpg", "sub/b.png"]
    (yolo_set / "images/train/again").unlink()
    assert read_annotations(yolo_set).fingerprint() == expected
    (yolo_set / "images/train/z.jpg").symlink_to("z.jpg")
    with pytest.raises(UserError, match=r"image .*z\.jpg cannot be read: it is a link that leads back to itself"):
        read_annotations(yolo_set)
    (yolo_set / "round").symlink_to("round")
    (yolo_set / "round.json").symlink_to("round.json")
    for path in (yolo_set / "round", yolo_set / "round.json"):
        with pytest.raises(UserError, match=r"cannot be read|does not exist"):
            read_annotations(path, format="coco")
    with pytest.raises(UserError, match=r"folder .*round does not exist"):
        check_images(read_annotations(voc_set, images=yolo_set / "round"), yolo_set / "round")


def test_damaged_images_of_a_yolo_set_are_named(yolo_set):
    (yolo_set / "images/train/c.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"c\.jpg .*; the size of each image is needed for its boxes"):
        read_annotations(yolo_set)


def test_all_problems_are_listed_and_the_first_is_raised(yolo_set):
    (yolo_set / "labels/train/c.txt").write_text("7 0.5 0.5 0.1 0.1\n0 0.5 0.5 0.1\n1 0.5 0.5 0.2 0.2\n")
    raw = read_raw(yolo_set)
    assert [problem.kind for problem in raw.problems] == ["bad_class", "bad_line"]
    assert {problem.image for problem in raw.problems} == {"images/train/c.jpg"}
    # The good line is there, and knows its place.
    assert len(raw.boxes) == 4 and raw.place(2).endswith("c.txt, line 3")
    with pytest.raises(
        UserError, match=r"has class 7; .* \(and 1 more such problems; ghostdet check_data lists them\)"
    ):
        read_annotations(yolo_set)


def test_a_list_of_problems_ends(tmp_path, yolo_set):
    (yolo_set / "labels/train/c.txt").write_text("9 0.5 0.5 0.1 0.1\n" * (MAX_ISSUES + 5))
    problems = read_raw(yolo_set).problems
    assert len(problems.items) == MAX_ISSUES and problems.count == MAX_ISSUES + 5


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
