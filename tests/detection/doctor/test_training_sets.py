"""Checks of a config that trains on a list of data sets."""

import json
import shutil

import pytest
import yaml
from conftest import tiny_raw
from faulty_datasets import all_codes, errors_and_warnings, write_clean_dataset
from small_sets import write_part

from detection import UserError
from detection.doctor.read_sets import read_sets
from detection.doctor.run_checks import run_checks
from detection.doctor.run_doctor import run_doctor
from detection.doctor.text_report import format_report, to_json


@pytest.fixture()
def sets(tmp_path):
    """A config file: cats in one set, dogs in another, both in val."""
    for seed, name in enumerate(("cats", "dogs", "val")):
        folder = tmp_path / name
        write_clean_dataset(folder, seed=seed, name="annotations")
        if name != "val":
            write_part(folder, "part", [name[:-1]], ids={"dog": 1})
    raw = tiny_raw(tmp_path, tmp_path / "run")
    raw["data"]["train"] = [{"annotations": str(tmp_path / name / "part.json")} for name in ("cats", "dogs")]
    raw["data"]["val"] = {"annotations": str(tmp_path / "val" / "annotations.json")}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def check(path, *overrides):
    entries, config = read_sets(str(path), overrides=overrides)
    return run_checks(entries, config)


def test_all_sets_are_checked_and_named(sets):
    report = check(sets)
    assert [checked.original.split for checked in report.sets] == ["train.0", "train.1", "val"]
    assert errors_and_warnings(report) <= {"anchors-miss", "boxes-small"}
    text = format_report(report)
    assert "train.0 is complete for 1 of 2 classes: cat; no background for 1: dog" in text
    assert to_json(report)["complete_classes"] == {"cat": [True, False], "dog": [False, True]}

    part = sets.parent / "dogs" / "part.json"
    content = json.loads(part.read_text())
    content["annotations"][0]["bbox"][2] = 0
    part.write_text(json.dumps(content))
    shutil.copy(sets.parent / "dogs/images/annotations 03.jpg", sets.parent / "val/images/annotations 05.jpg")
    report = check(sets)
    found = {found.code: found.split for found in report.findings}
    assert found["box-degenerate"] == "train.1" and found["leak-same"] == "train and val"
    assert "image-twice" not in all_codes(report)


def test_classes_belong_together_by_name(sets):
    report = check(sets, "data.train.1.complete_classes=[]")
    assert "class-complete-nowhere" in errors_and_warnings(report)
    assert "no background" in format_report(report) and report.exit_code == 1
    report = check(sets, f"data.train=[{{annotations: {sets.parent / 'cats' / 'part.json'}}}]")
    assert {"classes-differ", "class-only-val"} <= errors_and_warnings(report)
    assert "classes-differ" not in all_codes(check(sets, "data.classes={animal: [cat, dog]}"))


def test_a_fixed_copy_is_of_one_set(sets, tmp_path):
    with pytest.raises(UserError, match="--fix corrects one data set at a time"):
        run_doctor(str(sets), fix_file=tmp_path / "fixed.json")
