"""The checks of a config's dataset, the reports, and the command tools/check_data.py."""

import json
import re
import shutil
from dataclasses import replace

import pytest
from conftest import ROOT, assert_clear_error, tiny_raw
from faulty_datasets import FAULTS, apply_fault, errors_and_warnings, write_clean_dataset

from detection.core.errors import UserError
from detection.data.annotations import Annotations
from detection.doctor.anchor_checks import DEFAULT_ANCHOR_CONFIG, check_anchor_coverage, measure_anchor_coverage
from detection.doctor.dataset_statistics import dataset_statistics
from detection.doctor.memory_checks import free_memory
from detection.doctor.read_sets import read_set, read_sets
from detection.doctor.rules import RULES
from detection.doctor.run_checks import check_set, run_checks
from detection.doctor.text_report import format_report


@pytest.fixture()
def clean(tmp_path):
    """The JSON file of a dataset without faults."""
    return write_clean_dataset(tmp_path / "a set")


@pytest.fixture()
def pair(clean):
    """The JSON files of train and val, with images in one folder."""
    return clean, write_clean_dataset(clean.parent, seed=1, name="val")


@pytest.fixture()
def config(pair, tmp_path):
    import yaml

    values = tiny_raw(pair[0].parent, tmp_path / "run")
    for split, path in zip(("train", "val"), pair, strict=True):
        values["data"][split] = {"images": str(path.parent / "images"), "annotations": str(path)}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_config_adds_anchors_and_memory(config):
    sets, loaded = read_sets(str(config), overrides=["data.batch_size=10000000"])
    report = run_checks(sets, loaded, config_name="tiny")
    assert report.anchor_coverage is not None and report.anchor_coverage.anchor_config.short_side == 96
    assert errors_and_warnings(report) == {"memory-high"}
    assert report.memory is not None and report.memory["total"] > 1e13


def test_a_detector_without_anchors(config):
    sets, loaded = read_sets(str(config), overrides=["model.detector=ghostdet"])
    report = run_checks(sets, loaded)
    assert report.anchor_coverage is None and report.memory is not None


def test_anchors_and_input_sizes_that_do_not_fit(clean):
    entries = read_set(clean, "data")
    found = measure_anchor_coverage(entries, replace(DEFAULT_ANCHOR_CONFIG, anchor_sizes=(300, 301, 302, 303, 304)))
    assert found.matched == 0 and found.better_matched > 0.9
    (finding,) = check_anchor_coverage(found, "data")
    assert finding.code == "anchors-miss" and "would match" in finding.message
    found = measure_anchor_coverage(
        entries, replace(DEFAULT_ANCHOR_CONFIG, short_side=32, long_side=32, anchor_sizes=(4, 8, 16, 32, 64))
    )
    assert "boxes-small" in {finding.code for finding in check_anchor_coverage(found, "data")}


def test_classes_that_a_config_does_not_select_are_ignored(clean):
    from detection.doctor.image_checks import probe_images

    entries = read_set(clean, "data")
    seen = probe_images([entries.path(row) for row in range(12)], workers=1)
    for chosen, expected in (
        (["dog"], {"id": 2, "name": "dog", "boxes": 24, "images": 12}),
        ({"pet": ["cat", "dog"]}, {"id": 1, "name": "pet", "boxes": 48, "images": 12}),
    ):
        findings, checked = check_set(entries, seen, chosen)
        assert findings == [] and dataset_statistics(checked.selected)["classes"] == [expected]


def test_the_page_in_a_browser(pair, tmp_path):
    from browser import assert_whole

    from detection.doctor.doctor_page import write_doctor_page

    folder = pair[0].parent / "images"
    shutil.copy(folder / "set 04.jpg", folder / "val 07.jpg")
    for name in ("image-truncated", "box-beyond", "box-twice", "crowd-unflagged"):
        apply_fault(pair[0], FAULTS[name][0])
    report = run_checks([read_set(pair[0], "train"), read_set(pair[1], "val")])
    write_doctor_page(report, tmp_path / "page.html")
    seen = assert_whole(tmp_path / "page.html")
    assert seen.title == "Dataset report" and seen.plots >= 7
    for text in (
        "leak-same (train and val)",
        "box-beyond (train)",
        "What to do",
        "Anchors and input size",
        "set 03.jpg",
    ):
        assert text in seen.text
    # 12 + 12 samples, and the images of findings.
    assert len(seen.images) >= 28


def test_the_tool(tool, clean, tmp_path):
    out = tmp_path / "out"
    done = tool("check_data", clean, "--json", out / "a.json", "--html", out / "a.html", "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert "0 errors, 0 warnings, 0 notes" in done.stdout and (out / "a.html").is_file()
    assert json.loads((out / "a.json").read_text())["clean"] is True
    apply_fault(clean, FAULTS["box-degenerate"][0])
    done = tool("check_data", clean, "--fix", out / "fixed.json")
    assert done.returncode == 1 and "box-degenerate" in done.stdout and "fixed copy" in done.stdout
    done = tool("check_data", out / "fixed.json", "--images", clean.parent / "images")
    assert done.returncode == 0 and "0 errors" in done.stdout


def test_usage_errors(tool, clean, config, tmp_path):
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


def test_impossible_file_names(clean, tmp_path):
    from detection.doctor.doctor_page import write_doctor_page
    from detection.doctor.text_report import write_json

    def fault(content, folder):
        content["images"][2]["file_name"] = "a\x00b.jpg"
        content["images"][3]["file_name"] = "half \ud800.jpg"
        content["categories"][0]["name"] = "half \ud800"

    report = run_checks([read_set(apply_fault(clean, fault), "data")])
    assert errors_and_warnings(report) == {"image-missing"} and report.findings[0].count == 2
    format_report(report).encode("utf-8")
    write_json(report, tmp_path / "a.json")
    write_doctor_page(report, tmp_path / "a.html")


def test_a_model_that_cannot_be_built(config):
    sets, loaded = read_sets(str(config), overrides=["model.backbone.name=nonsense"])
    with pytest.raises(UserError, match="nonsense"):
        run_checks(sets, loaded)
    assert free_memory("cuda:77") is None


@pytest.mark.slow
def test_everything_that_training_rejects_is_an_error(clean):
    """A dataset without errors must load for training."""
    from detection.data.dataset import DetectionDataset, SampleKey
    from detection.data.formats.coco import read_coco
    from detection.data.load_split import check_images

    def accepted(path) -> bool:
        try:
            index: Annotations = read_coco(path)
            check_images(index, index.images)
            dataset = DetectionDataset(index, index.images, short_side=96, long_side=96)
            for i in range(len(index)):
                dataset.load(SampleKey(0, i))
        except UserError:
            return False
        return True

    before = clean.read_text()
    images = clean.parent / "images"
    kept = {path.name: path.read_bytes() for path in images.iterdir()}
    for name, (fault, _) in FAULTS.items():
        report = run_checks([read_set(apply_fault(clean, fault), "data")])
        if not report.exit_code:
            assert accepted(clean), name
        shutil.rmtree(images)
        images.mkdir()
        for file, data in kept.items():
            (images / file).write_bytes(data)
        clean.write_text(before)


def test_the_docs_list_every_rule():
    text = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `[a-z0-9-]+` \| (?:error|warning|note).*$", text, re.MULTILINE)
    expected = [f"| `{code}` | {rule.severity} | {rule.title} | {rule.remedy} |" for code, rule in RULES.items()]
    assert rows == expected


def test_every_rule_has_a_test():
    in_faults = {name.split()[0] for name in FAULTS}
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
        "class-complete-nowhere",
        *("anchors-miss", "boxes-small", "memory-high"),
    }
    assert in_faults | elsewhere == set(RULES) and not in_faults & elsewhere
