"""run_checks on a dataset without faults, and on datasets with one fault each."""

import json
import os
import shutil

import cv2
import pytest
from faulty_datasets import (
    FAULTS,
    HEIGHT,
    WIDTH,
    all_codes,
    apply_fault,
    errors_and_warnings,
    write_clean_dataset,
)

from detection.doctor.read_sets import read_set, read_sets
from detection.doctor.rules import RULES
from detection.doctor.run_checks import run_checks
from detection.doctor.text_report import format_report, to_json


@pytest.fixture()
def clean(tmp_path):
    """The JSON file of a dataset without faults."""
    return write_clean_dataset(tmp_path / "a set")


def test_a_clean_dataset_has_no_findings(clean):
    report = run_checks([read_set(clean, "data")])
    assert report.findings == [] and report.exit_code == 0
    assert "0 errors, 0 warnings, 0 notes" in format_report(report)
    numbers = to_json(report)["sets"]["data"]
    assert numbers["images"] == 12 and numbers["boxes"] == 48
    assert [entry["boxes"] for entry in numbers["classes"]] == [24, 24]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_nothing_else(clean, name):
    fault, expected = FAULTS[name]
    code = name.split()[0]
    report = run_checks([read_set(apply_fault(clean, fault), "data")])
    assert code in all_codes(report)
    assert errors_and_warnings(report) == expected
    assert report.exit_code == int(any(RULES[one].severity == "error" for one in expected))
    found = next(found for found in report.findings if found.code == code)
    # A fault of one entry counts once, out of 12 images and 48 boxes.
    many = {"box-xyxy", "box-centre", "box-fractions", "no-boxes", "class-id-gaps"}
    assert found.count == 1 or code in many
    assert found.message in format_report(report) and found.remedy in format_report(report)
    json.dumps(to_json(report), allow_nan=False)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("image-missing renamed", "SET 03.JPG"),
        ("image-unreadable", "error page of a failed download"),
        ("image-unreadable lfs", "git lfs pull"),
        ("image-size", "is 96x72, annotated as 200x100"),
        ("exif-at-odds", "EXIF orientation 6"),
        ("box-outside", "annotation 11 [200, 10, 20, 20]: image 96x72"),
        ("box-beyond", "by 14.0 pixels"),
        ("image-extension", "it is PNG"),
        ("class-few", "fox (1)"),
        ("image-twice", "set 03.jpg: and set 02.jpg"),
        ("crowd-unflagged", "annotation 902 [1, 1, 94, 70]: contains 5 boxes of 'cat'"),
    ],
)
def test_examples_name_the_place_and_the_fault(clean, name, words):
    assert words in format_report(run_checks([read_set(apply_fault(clean, FAULTS[name][0]), "data")]))


def test_crowd_unflagged_is_a_note_if_the_file_has_crowd_flags(clean):
    def fault(content, folder):
        FAULTS["crowd-unflagged"][0](content, folder)
        content["annotations"].append({**content["annotations"][0], "id": 990, "iscrowd": 1})

    report = run_checks([read_set(apply_fault(clean, fault), "data")])
    assert "crowd-unflagged" in all_codes(report) - errors_and_warnings(report)


def test_without_decoding_fewer_faults_are_found(clean):
    for name in ("image-damaged", "image-blank"):
        report = run_checks([read_set(apply_fault(clean, FAULTS[name][0]), "data")], read_images="headers")
        assert not errors_and_warnings(report) and "corrupt data" in format_report(report)
        break
    shutil.copy(clean.parent / "images" / "set 01.jpg", clean.parent / "images" / "set 02.jpg")
    assert errors_and_warnings(run_checks([read_set(clean, "data")], read_images="headers")) == {"image-twice"}
    (clean.parent / "images" / "set 05.jpg").unlink()
    report = run_checks([read_set(clean, "data")], read_images="none")
    assert errors_and_warnings(report) == {"image-missing"} and report.findings[0].examples[0].image == "set 05.jpg"


# ---- train and val


@pytest.fixture()
def pair(clean):
    """The JSON files of train and val, with images in one folder."""
    return clean, write_clean_dataset(clean.parent, seed=1, name="val")


def check_pair(pair, **options):
    return run_checks([read_set(pair[0], "train"), read_set(pair[1], "val")], **options)


def test_clean_train_and_val(pair):
    assert check_pair(pair).findings == []


def test_the_same_image_in_train_and_val(pair):
    folder = pair[0].parent / "images"
    shutil.copy(folder / "set 04.jpg", folder / "val 07.jpg")
    report = check_pair(pair)
    assert errors_and_warnings(report) == {"leak-same"} and report.exit_code == 1
    example = report.findings[0].examples[0]
    assert (example.image, example.other) == ("val 07.jpg", "set 04.jpg")
    cv2.imwrite(str(folder / "val 07.jpg"), cv2.imread(str(folder / "set 04.jpg")), [cv2.IMWRITE_JPEG_QUALITY, 60])
    report = check_pair(pair)
    assert errors_and_warnings(report) == {"leak-alike"} and report.exit_code == 0


def test_the_same_file_for_train_and_val_leaks_without_opening_images(clean):
    report = check_pair((clean, clean), read_images="none")
    assert errors_and_warnings(report) == {"leak-same"} and report.findings[0].count == 12


def test_classes_of_train_and_val(pair):
    def other_name(content, folder):
        content["categories"][0]["name"] = "lion"

    def no_dogs(content, folder):
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 1]

    before = pair[1].read_text()
    assert errors_and_warnings(check_pair((pair[0], apply_fault(pair[1], other_name)))) == {"classes-differ"}
    pair[1].write_text(before)
    assert all_codes(check_pair((pair[0], apply_fault(pair[1], no_dogs)))) == {"class-unused", "class-only-train"}
    pair[1].write_text(before)
    assert "class-only-val" in errors_and_warnings(check_pair((apply_fault(pair[0], no_dogs), pair[1])))


def test_unlisted_images(pair):
    shutil.copy(pair[0].parent / "images" / "set 00.jpg", pair[0].parent / "images" / "extra.jpg")
    report = check_pair(pair)
    found = next(found for found in report.findings if found.code == "image-unlisted")
    assert found.count == 1 and "extra.jpg" in found.examples[0].text and found.severity == "note"


def test_an_ambiguous_spelling_of_a_file_name_is_not_proposed(clean):
    """Two files match the missing name."""
    folder = clean.parent / "images"
    for name in ("x/set 03.png", "y/SET 03.jpeg"):
        (folder / name).parent.mkdir()
        shutil.copy(folder / "set 03.jpg", folder / name)
    (folder / "set 03.jpg").unlink()
    report = run_checks([read_set(clean, "data")])
    assert "different spelling" not in format_report(report) and "image-missing" in all_codes(report)


# ---- unusual files and contents


def test_paths_that_are_not_files(clean):
    folder = clean.parent / "images"
    for number in (1, 2, 3):
        (folder / f"set 0{number}.jpg").unlink()
    (folder / "set 01.jpg").mkdir()
    os.mkfifo(folder / "set 02.jpg")
    (folder / "set 03.jpg").symlink_to("set 03.jpg")
    (folder / "loop").symlink_to(".")
    report = run_checks([read_set(clean, "data")])
    (found,) = report.findings
    assert found.code == "image-unreadable" and found.count == 3


def test_unusual_file_names(tmp_path):
    path = write_clean_dataset(tmp_path / "mit Leerzeichen und Ümlaut 日本", name="größe 絵")
    assert run_checks([read_set(path, "data")]).findings == []
    assert read_sets(str(path.parent))[0][0].split == "data"


def test_empty_lists(tmp_path):
    image = {"id": 1, "file_name": "a.jpg", "width": 3, "height": 3}
    for images, code in (([], "no-images"), ([image], "no-categories")):
        content = {"images": images, "annotations": [], "categories": []}
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "x.json").write_text(json.dumps(content))
        report = run_checks([read_set(tmp_path / "x.json", "data")])
        assert errors_and_warnings(report) >= {code} and report.exit_code == 1
        format_report(report)


def test_class_imbalance(clean):
    def fault(content, folder):
        for annotation in content["annotations"]:
            annotation["category_id"] = 1
        for i in range(60):
            box = [i, 60, 10 + i % 5, 10]
            extra = {"image_id": 1 + i % 12, "category_id": 1, "bbox": box, "area": 100, "iscrowd": 0}
            content["annotations"].append({"id": 500 + i, **extra})
        content["annotations"][0]["category_id"] = 2

    report = run_checks([read_set(apply_fault(clean, fault), "data")])
    assert {"class-imbalance", "class-few"} <= all_codes(report)


def test_an_image_too_large_to_decode(clean, monkeypatch):
    monkeypatch.setattr("detection.doctor.image_probe.HUGE_PIXELS", WIDTH * HEIGHT - 1)
    report = run_checks([read_set(clean, "data")])
    assert errors_and_warnings(report) == {"image-huge"} and report.findings[0].count == 12
