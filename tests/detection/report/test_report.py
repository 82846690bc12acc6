"""tools/report.py: pages in a browser, numbers, and errors."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from browser import assert_whole
from coco_results import random_results, truth_as_results
from conftest import assert_clear_error, run_seed

from detection.checkpoint import read_checkpoint
from detection.core.errors import UserError
from detection.data.formats.coco import read_coco
from detection.evaluation.coco_evaluator import evaluate_results, write_results
from detection.report.run_data import read_file, read_run
from detection.report.write_report import report_on_training, write_report


@pytest.fixture(scope="module")
def detections(trained, tmp_path_factory):
    """A folder with good.json and bad.json, detections of the trained run's data."""
    folder = tmp_path_factory.mktemp("detections")
    index = read_coco(trained.parent / "data" / "annotations.json")
    rng = np.random.default_rng(run_seed())
    truth = [r | {"score": float(rng.uniform(0.6, 1))} for r in truth_as_results(index)]
    write_results(folder / "good.json", truth[:-3] + random_results(index, rng, 3)[-9:])
    write_results(folder / "bad.json", random_results(index, rng))
    return folder


@pytest.fixture()
def run(trained, tmp_path):
    """A copy of the trained run that a test may change."""
    names = ("best.pt", "config.yaml", "metrics.jsonl", "best_predictions.json", "predictions.json")
    (tmp_path / "run").mkdir()
    for name in names:
        shutil.copy(trained / name, tmp_path / "run")
    return tmp_path / "run"


def test_the_report_of_a_run(tool, trained, tmp_path):
    out = tmp_path / "a report.html"
    done = tool("report", trained, "--out", out, "--no-latency")
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout
    seen = assert_whole(out)
    for title in ("Metrics", "Training", "Error types", "Calibration", "Images with the lowest F1", "Environment"):
        assert title in seen.text
    assert "best_predictions.json" in seen.text and seen.plots >= 8 and seen.images
    numbers = json.loads((tmp_path / "a report.json").read_text())
    expected = read_checkpoint(trained / "best.pt")["numbers"]
    assert numbers["numbers"]["AP"] == pytest.approx(expected["AP"], abs=1e-12)
    assert [record["epoch"] for record in numbers["history"]] == [6, 12, 18, 24]
    assert numbers["trained_with"] and "torch" in numbers["environment"]["versions"]
    for name, values in expected["per_class"].items():
        assert values.items() <= numbers["numbers"]["per_class"][name].items()


@pytest.mark.slow
def test_predictions_without_a_model_and_their_comparison(tool, trained, detections, tmp_path):
    data = trained.parent / "data" / "annotations.json"
    done = tool("report", "--predictions", detections / "good.json", "--data", data, "--out", tmp_path / "one.html")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "one.json").read_text())
    index = read_coco(data)
    expected = evaluate_results(index, json.loads((detections / "good.json").read_text()))
    assert found["numbers"]["AP"] == pytest.approx(expected.numbers["AP"], abs=1e-12)
    assert found["latency"] is found["config"] is None and found["history"] == []

    files = [detections / "bad.json", detections / "good.json"]
    done = tool("report", "--predictions", *files, "--data", data, "--out", tmp_path / "two.html", "--resamples", 50)
    assert done.returncode == 0, done.stderr
    assert "AP of disc" in done.stdout
    seen = assert_whole(tmp_path / "two.html", dark=True)
    assert "bad.json against good.json" in seen.title and seen.images
    row = json.loads((tmp_path / "two.json").read_text())["differences"][0]
    assert row["name"] == "AP" and row["clear"] and row["low"] > 0
    assert row["second"] == pytest.approx(expected.numbers["AP"], abs=1e-12)


def test_a_run_against_itself_has_no_difference(tool, run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    done = tool("report", run, other, "--resamples", 20)
    assert done.returncode == 0, done.stderr
    content = json.loads((other / "compare.json").read_text())
    assert content["runs"] == ["run", "other"] and content["images"] == {}
    for row in content["differences"]:
        assert row["difference"] == row["low"] == row["high"] == 0 and not row["clear"]
    assert "no clear difference" in (other / "compare.html").read_text()


@pytest.mark.slow
def test_the_latency_of_the_checkpoint_is_in_the_report(run):
    content = json.loads(write_report(read_run(run), run / "report.html").read_text())
    (row,) = content["latency"]
    assert row["backend"] == "eager" and row["median"] > 0 and row["parameters"] > 1e5
    assert "Cost and latency" in (run / "report.html").read_text()


@pytest.mark.numeric
@pytest.mark.slow
def test_predictions_of_the_last_evaluation_are_not_used_for_best_pt(run):
    """predictions.json is from the last evaluation, or from tools/evaluate.py on other data."""
    (run / "best_predictions.json").unlink()
    index = read_run(run).annotations
    write_results(run / "predictions.json", truth_as_results(index))
    source = read_run(run)
    assert "run for this report" in source.detections_source
    expected = read_checkpoint(run / "best.pt")["numbers"]["AP"]
    assert source.analysis.matches.evaluation.numbers["AP"] == pytest.approx(expected, abs=1e-6)
    with pytest.raises(UserError, match="no detections with the AP of"):
        read_run(run, detect=False)
    (run / "predictions.json").write_text('[{"image_id": 987, "category_id": 3, "bbox": [0, 0, 1, 1], "score": 1}]')
    assert "run for this report" in read_run(run).detections_source


@pytest.mark.slow
def test_missing_or_corrupt_images_do_not_prevent_a_report(run, coco_set, tmp_path):
    data = coco_set / "annotations.json"
    write_results(tmp_path / "found.json", random_results(read_coco(data), np.random.default_rng(run_seed())))
    for path in list((coco_set / "images").iterdir())[::2]:
        path.write_bytes(b"no image")
    write_report(read_file(tmp_path / "found.json", data, None), tmp_path / "broken.html")
    assert "could not be read" in (tmp_path / "broken.html").read_text()
    shutil.rmtree(coco_set / "images")
    write_report(read_file(tmp_path / "found.json", data, None), tmp_path / "gone.html")
    assert "set their folder with --images" in (tmp_path / "gone.html").read_text()


@pytest.mark.slow
def test_images_are_limited_to_max_bytes(trained, detections, tmp_path):
    source = read_file(detections / "bad.json", trained.parent / "data" / "annotations.json", None)
    write_report(source, tmp_path / "small.html", max_bytes=60_000)
    write_report(source, tmp_path / "large.html")
    small, large = ((tmp_path / f"{name}.html").read_text() for name in ("small", "large"))
    assert len(small) < len(large) - 100_000
    assert "more images are omitted" in small and "more images are omitted" not in large


@pytest.mark.slow
def test_a_run_without_history(run, tmp_path):
    (run / "metrics.jsonl").unlink()
    (run / "best.pt").unlink()
    write_report(read_run(run), run / "report.html")
    assert ">Training</h2>" not in (run / "report.html").read_text()


def test_usage_errors(tool, run, coco_set, tmp_path):
    data = coco_set / "annotations.json"
    assert_clear_error(tool("report", tmp_path / "absent"), "absent does not exist", "output_dir")
    assert_clear_error(tool("report", coco_set), "is not the folder of a training run")
    assert_clear_error(tool("report", "--predictions", data), "--predictions needs --data")
    assert_clear_error(tool("report", "--predictions", "x.json", "--data", data), "x.json does not exist")
    assert_clear_error(tool("report", run, "--images", tmp_path / "no", "--data", data), "no does not exist")
    assert_clear_error(tool("report", run, "--out", tmp_path / "x.pdf"), "must end in .html")
    broken = tmp_path / "broken.json"
    broken.write_text('[{"image_id": ')
    assert_clear_error(tool("report", "--predictions", broken, "--data", data), "broken.json is not JSON")
    broken.write_text('[{"image_id": 987, "category_id": 3, "bbox": [0, 0, 1, 1], "score": 1}]')
    assert_clear_error(tool("report", "--predictions", broken, "--data", data), "broken.json: entry 1: image_id 987")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"metrics\.jsonl, line 1 is not JSON"),
        ('{"epoch": 1}\n[1]\n', "line 2 is not the record of an evaluation"),
    ],
)
def test_a_corrupt_history_is_an_error(run, text, message):
    (run / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        read_run(run)


def test_a_run_without_checkpoint_and_predictions_is_an_error(run):
    for name in ("best.pt", "best_predictions.json", "predictions.json"):
        (run / name).unlink()
    with pytest.raises(UserError, match=r"neither best\.pt nor detections of .*annotations\.json"):
        read_run(run)


def test_an_error_in_the_report_does_not_fail_the_training(run, caplog):
    (run / "best_predictions.json").write_text("[")
    with caplog.at_level("INFO", logger="detection"):
        report_on_training(run)
    assert "the report could not be written" in caplog.text and "is not JSON" in caplog.text
    assert not (run / "report.html").exists()


@pytest.mark.slow
def test_training_writes_a_report(tiny_config):
    from detection.engine.train_detector import run_training

    config = tiny_config.with_overrides(["train.report=true", "eval.background=true"])
    assert run_training(config, on_finished=report_on_training)
    folder = Path(config.output_dir)
    seen = assert_whole(folder / "report.html")
    assert "Cost and latency" in seen.text and "learning rate" in (folder / "report.html").read_text()
    assert "report written in" in (folder / "train.log").read_text()
