"""The doctor on a clean set, and on sets with one fault each."""

import json
import os
import re
import shutil
from dataclasses import replace

import cv2
import pytest
from conftest import ROOT, assert_clear_error, tiny_raw
from sick_sets import FAULTS, HEIGHT, WIDTH, spoil, write_clean

from detection.core.errors import UserError
from detection.data.annotations import Annotations
from detection.doctor.examine import check_set, examine
from detection.doctor.read_sets import read_set, read_sets
from detection.doctor.rules import KINDS
from detection.doctor.stats import statistics
from detection.doctor.suitability import DEFAULT, check_suitability, examine_anchors, free_memory
from detection.doctor.text_report import as_json, console


@pytest.fixture(scope="session")
def clean_master(tmp_path_factory):
    return write_clean(tmp_path_factory.mktemp("clean"))


@pytest.fixture()
def clean(clean_master, tmp_path):
    """A set's JSON file, the test's own to spoil."""
    shutil.copytree(clean_master.parent, tmp_path / "a set")
    return tmp_path / "a set" / "set.json"


def serious(report):
    return {found.code for found in report.findings if found.severity != "note"}


def codes(report):
    return {found.code for found in report.findings}


def test_a_clean_set_is_called_clean(clean):
    report = examine([read_set(clean, "data")])
    assert report.findings == [] and report.exit_code == 0
    assert "0 errors, 0 warnings, 0 notes" in console(report)
    numbers = as_json(report)["sets"]["data"]
    assert numbers["images"] == 12 and numbers["boxes"] == 48
    assert [entry["boxes"] for entry in numbers["classes"]] == [24, 24]


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_and_nothing_else(clean, name):
    fault, expected = FAULTS[name]
    code = name.split()[0]
    report = examine([read_set(spoil(clean, fault), "data")])
    assert code in codes(report)
    assert serious(report) == expected
    assert report.exit_code == int(any(KINDS[one].severity == "error" for one in expected))
    found = next(found for found in report.findings if found.code == code)
    # The set has 12 images and 48 boxes; a fault of one entry is counted once.
    many = {"box-xyxy", "box-centre", "box-fractions", "no-boxes", "class-id-gaps"}
    assert found.count == 1 or code in many
    assert found.message in console(report) and found.remedy in console(report)
    json.dumps(as_json(report), allow_nan=False)


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
        ("crowd-unflagged", "annotation 902 [1, 1, 94, 70]: 5 boxes of 'cat' in it"),
    ],
)
def test_examples_say_where_and_what(clean, name, words):
    assert words in console(examine([read_set(spoil(clean, FAULTS[name][0]), "data")]))


def test_flags_make_the_hint_at_crowds_a_note(clean):
    def fault(content, folder):
        FAULTS["crowd-unflagged"][0](content, folder)
        content["annotations"].append({**content["annotations"][0], "id": 990, "iscrowd": 1})

    report = examine([read_set(spoil(clean, fault), "data")])
    assert "crowd-unflagged" in codes(report) - serious(report)


def test_without_decoding_less_is_seen_and_said(clean):
    for name in ("image-damaged", "image-blank"):
        report = examine([read_set(spoil(clean, FAULTS[name][0]), "data")], read_images="headers")
        assert not serious(report) and "damage inside" in console(report)
        break
    shutil.copy(clean.parent / "images" / "set 01.jpg", clean.parent / "images" / "set 02.jpg")
    assert serious(examine([read_set(clean, "data")], read_images="headers")) == {"image-twice"}
    (clean.parent / "images" / "set 05.jpg").unlink()
    report = examine([read_set(clean, "data")], read_images="none")
    assert serious(report) == {"image-missing"} and report.findings[0].examples[0].image == "set 05.jpg"


# ---- two sets


@pytest.fixture()
def pair(clean):
    """train.json and val.json with images in one folder."""
    write_clean(clean.parent, seed=1, name="val")
    return clean, clean.parent / "val.json"


def examine_pair(pair, **options):
    return examine([read_set(pair[0], "train"), read_set(pair[1], "val")], **options)


def test_two_clean_sets(pair):
    assert examine_pair(pair).findings == []


def test_the_same_image_in_train_and_val(pair):
    folder = pair[0].parent / "images"
    shutil.copy(folder / "set 04.jpg", folder / "val 07.jpg")
    report = examine_pair(pair)
    assert serious(report) == {"leak-same"} and report.exit_code == 1
    example = report.findings[0].examples[0]
    assert (example.image, example.other) == ("val 07.jpg", "set 04.jpg")
    cv2.imwrite(str(folder / "val 07.jpg"), cv2.imread(str(folder / "set 04.jpg")), [cv2.IMWRITE_JPEG_QUALITY, 60])
    report = examine_pair(pair)
    assert serious(report) == {"leak-alike"} and report.exit_code == 0


def test_one_file_for_both_leaks_also_where_no_image_is_opened(clean):
    report = examine_pair((clean, clean), read_images="none")
    assert serious(report) == {"leak-same"} and report.findings[0].count == 12


def test_classes_of_train_and_val(pair):
    def other_name(content, folder):
        content["categories"][0]["name"] = "lion"

    def no_dogs(content, folder):
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 1]

    before = pair[1].read_text()
    assert serious(examine_pair((pair[0], spoil(pair[1], other_name)))) == {"classes-differ"}
    pair[1].write_text(before)
    assert codes(examine_pair((pair[0], spoil(pair[1], no_dogs)))) == {"class-unused", "class-only-train"}
    pair[1].write_text(before)
    assert "class-only-val" in serious(examine_pair((spoil(pair[0], no_dogs), pair[1])))


def test_images_that_nobody_names(pair):
    shutil.copy(pair[0].parent / "images" / "set 00.jpg", pair[0].parent / "images" / "extra.jpg")
    report = examine_pair(pair)
    found = next(found for found in report.findings if found.code == "image-unlisted")
    assert found.count == 1 and "extra.jpg" in found.examples[0].text and found.severity == "note"


def test_names_of_an_image_in_another_spelling_are_not_taken_twice(clean):
    """Two files could be meant: neither is proposed."""
    folder = clean.parent / "images"
    for name in ("x/set 03.png", "y/SET 03.jpeg"):
        (folder / name).parent.mkdir()
        shutil.copy(folder / "set 03.jpg", folder / name)
    (folder / "set 03.jpg").unlink()
    report = examine([read_set(clean, "data")])
    assert "another spelling" not in console(report) and "image-missing" in codes(report)


# ---- config, page, tool


@pytest.fixture()
def config(pair, tmp_path):
    import yaml

    raw = tiny_raw(pair[0].parent, tmp_path / "run")
    for split, path in zip(("train", "val"), pair, strict=True):
        raw["data"][split] = {"images": str(path.parent / "images"), "annotations": str(path)}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_a_config_is_examined_with_its_anchors_and_memory(config):
    sets, loaded = read_sets(str(config), overrides=["data.batch_size=10000000"])
    report = examine(sets, loaded, config_name="tiny")
    assert report.suitability is not None and report.suitability.setting.short_side == 96
    assert serious(report) == {"memory-high"}
    assert report.memory is not None and report.memory["total"] > 1e13


def test_anchors_and_input_that_do_not_suit(clean):
    raw = read_set(clean, "data")
    found = examine_anchors(raw, replace(DEFAULT, anchor_sizes=(300, 301, 302, 303, 304)))
    assert found.matched == 0 and found.better_matched > 0.9
    (finding,) = check_suitability(found, "data")
    assert finding.code == "anchors-miss" and "would match" in finding.message
    found = examine_anchors(raw, replace(DEFAULT, short_side=32, long_side=32, anchor_sizes=(4, 8, 16, 32, 64)))
    assert "boxes-small" in {finding.code for finding in check_suitability(found, "data")}


def test_classes_that_a_config_does_not_choose_are_not_missed(clean):
    from detection.doctor.image_checks import look_at

    raw = read_set(clean, "data")
    seen = look_at([raw.path(row) for row in range(12)], workers=1)
    for chosen, expected in (
        (["dog"], {"id": 2, "name": "dog", "boxes": 24, "images": 12}),
        ({"pet": ["cat", "dog"]}, {"id": 1, "name": "pet", "boxes": 48, "images": 12}),
    ):
        findings, checked = check_set(raw, seen, chosen)
        assert findings == [] and statistics(checked.selected)["classes"] == [expected]


def test_the_page_in_a_browser(pair, tmp_path):
    from browser import assert_whole

    from detection.doctor.doctor_page import write_doctor_page

    folder = pair[0].parent / "images"
    shutil.copy(folder / "set 04.jpg", folder / "val 07.jpg")
    for name in ("image-truncated", "box-beyond", "box-twice", "crowd-unflagged"):
        spoil(pair[0], FAULTS[name][0])
    write_doctor_page(examine_pair(pair), tmp_path / "page.html")
    seen = assert_whole(tmp_path / "page.html")
    assert seen.title == "The data, examined" and seen.plots >= 7
    for text in (
        "leak-same (train and val)",
        "box-beyond (train)",
        "What to do",
        "Anchors and input size",
        "set 03.jpg",
    ):
        assert text in seen.text
    # 12 + 12 examples, and offenders of every finding with images.
    assert len(seen.images) >= 28


def test_the_tool(tool, clean, tmp_path):
    out = tmp_path / "out"
    done = tool("check_data", clean, "--json", out / "a.json", "--html", out / "a.html", "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert "0 errors, 0 warnings, 0 notes" in done.stdout and (out / "a.html").is_file()
    assert json.loads((out / "a.json").read_text())["clean"] is True
    spoil(clean, FAULTS["box-degenerate"][0])
    done = tool("check_data", clean, "--fix", out / "mended.json")
    assert done.returncode == 1 and "box-degenerate" in done.stdout and "mended copy" in done.stdout
    done = tool("check_data", out / "mended.json", "--images", clean.parent / "images")
    assert done.returncode == 0 and "0 errors" in done.stdout


def test_mistakes(tool, clean, config, tmp_path):
    assert_clear_error(tool("check_data", tmp_path / "none.json"), "none.json does not exist")
    assert_clear_error(tool("check_data", clean, "--images", tmp_path / "nowhere"), "nowhere", "does not exist")
    assert_clear_error(tool("check_data", clean, "--fix", clean), "is an input of the same command")
    assert_clear_error(tool("check_data", clean, "--fix", tmp_path / "a.txt"), "must end in .json")
    assert_clear_error(tool("check_data", clean, "optim.lr=1"), "overrides are for configs")
    assert_clear_error(tool("check_data", config, "--val", clean), "names its own datasets")
    assert_clear_error(tool("check_data", config, "data.workerz=1"), "did you mean 'data.workers'")
    (tmp_path / "x.json").write_text('{"images": [')
    assert_clear_error(tool("check_data", tmp_path / "x.json"), "is not JSON")
    assert tool("check_data", clean, "--workers", 0).returncode == 2


@pytest.mark.parametrize("text", ["", "[1]", '{"images": 3}', "\xff\xfe"])
def test_files_that_are_not_coco(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"x\.json"):
        read_set(tmp_path / "x.json", "data")


def test_what_is_no_file_is_told(clean):
    folder = clean.parent / "images"
    for number in (1, 2, 3):
        (folder / f"set 0{number}.jpg").unlink()
    (folder / "set 01.jpg").mkdir()
    os.mkfifo(folder / "set 02.jpg")
    (folder / "set 03.jpg").symlink_to("set 03.jpg")
    (folder / "loop").symlink_to(".")
    report = examine([read_set(clean, "data")])
    (found,) = report.findings
    assert found.code == "image-unreadable" and found.count == 3


def test_names_that_no_file_can_have(clean, tmp_path):
    from detection.doctor.doctor_page import write_doctor_page
    from detection.doctor.text_report import write_json

    def fault(content, folder):
        content["images"][2]["file_name"] = "a\x00b.jpg"
        content["images"][3]["file_name"] = "half \ud800.jpg"
        content["categories"][0]["name"] = "half \ud800"

    report = examine([read_set(spoil(clean, fault), "data")])
    assert serious(report) == {"image-missing"} and report.findings[0].count == 2
    console(report).encode("utf-8")
    write_json(report, tmp_path / "a.json")
    write_doctor_page(report, tmp_path / "a.html")


def test_a_network_that_cannot_be_built_is_told(config):
    sets, loaded = read_sets(str(config), overrides=["model.backbone.name=nonsense"])
    with pytest.raises(UserError, match="nonsense"):
        examine(sets, loaded)
    assert free_memory("cuda:77") is None


def test_odd_names_of_images(tmp_path):
    path = write_clean(tmp_path / "mit Leerzeichen und Ümlaut 日本", name="größe 絵")
    assert examine([read_set(path, "data")]).findings == []
    assert read_sets(str(path.parent))[0][0].split == "data"


@pytest.mark.slow
def test_what_the_reader_of_training_refuses_is_an_error_here(clean):
    """Each fault over which a training would end is told as an error, and only those that it takes are none."""
    from detection.data.dataset import DetectionDataset, Draw
    from detection.data.formats.coco import read_coco
    from detection.data.load_split import check_images

    def accepted(path) -> bool:
        try:
            index: Annotations = read_coco(path)
            check_images(index, index.images)
            dataset = DetectionDataset(index, index.images, short_side=96, long_side=96)
            for i in range(len(index)):
                dataset.load(Draw(0, i))
        except UserError:
            return False
        return True

    before = clean.read_text()
    images = clean.parent / "images"
    kept = {path.name: path.read_bytes() for path in images.iterdir()}
    for name, (fault, _) in FAULTS.items():
        report = examine([read_set(spoil(clean, fault), "data")])
        if not report.exit_code:
            assert accepted(clean), name
        shutil.rmtree(images)
        images.mkdir()
        for file, data in kept.items():
            (images / file).write_bytes(data)
        clean.write_text(before)


def test_every_code_is_explained_in_the_docs():
    text = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `[a-z0-9-]+` \| (?:error|warning|note).*$", text, re.MULTILINE)
    expected = [f"| `{code}` | {kind.severity} | {kind.title} | {kind.remedy} |" for code, kind in KINDS.items()]
    assert rows == expected


def test_every_code_has_a_planted_fault():
    planted = {name.split()[0] for name in FAULTS}
    elsewhere = {
        *(
            "no-images",
            "no-categories",
            "file-broken",
            "image-huge",
            "image-refused",
            "image-unlisted",
            "class-imbalance",
        ),
        *("class-only-val", "class-only-train", "classes-differ", "leak-same", "leak-alike"),
        *("anchors-miss", "boxes-small", "memory-high"),
    }
    assert planted | elsewhere == set(KINDS) and not planted & elsewhere


def test_empty_lists(tmp_path):
    image = {"id": 1, "file_name": "a.jpg", "width": 3, "height": 3}
    for images, code in (([], "no-images"), ([image], "no-categories")):
        content = {"images": images, "annotations": [], "categories": []}
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "x.json").write_text(json.dumps(content))
        report = examine([read_set(tmp_path / "x.json", "data")])
        assert serious(report) >= {code} and report.exit_code == 1
        console(report)


def test_many_more_boxes_of_one_class(clean):
    def fault(content, folder):
        for annotation in content["annotations"]:
            annotation["category_id"] = 1
        for i in range(60):
            box = [i, 60, 10 + i % 5, 10]
            extra = {"image_id": 1 + i % 12, "category_id": 1, "bbox": box, "area": 100, "iscrowd": 0}
            content["annotations"].append({"id": 500 + i, **extra})
        content["annotations"][0]["category_id"] = 2

    report = examine([read_set(spoil(clean, fault), "data")])
    assert {"class-imbalance", "class-few"} <= codes(report)


def test_an_image_too_large_to_be_decoded(clean, monkeypatch):
    monkeypatch.setattr("detection.doctor.image_probe.HUGE", WIDTH * HEIGHT - 1)
    report = examine([read_set(clean, "data")])
    assert serious(report) == {"image-huge"} and report.findings[0].count == 12
