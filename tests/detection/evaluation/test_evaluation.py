"""The numbers agree with plain pycocotools, and its traps are closed."""

import contextlib
import io
import json
import math

import numpy as np
import pytest
from coco_results import SETS, random_results, truth_as_results
from conftest import run_seed
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection import UserError
from detection.checkpoint import Classes
from detection.config import EVAL_BACKENDS
from detection.data.formats.coco import read_coco
from detection.evaluation import score
from detection.evaluation.coco_evaluator import METRICS, CocoEvaluator, evaluate_results, read_results, write_results
from detection.evaluation.score import category_ids_of, score_checkpoint


def plain_pycocotools(path, results, tmp_path):
    """The evaluation as pycocotools' own demo does it: from the files."""
    (tmp_path / "results.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        for annotation in truth.dataset["annotations"]:
            annotation.setdefault("iscrowd", 0)
        evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "results.json")), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def assert_equal_numbers(evaluation, stats):
    for name, expected in zip(METRICS, stats, strict=True):
        value = evaluation.numbers[name]
        assert (expected == -1 and math.isnan(value)) or value == pytest.approx(expected, abs=1e-6), name


@pytest.mark.numeric
@pytest.mark.parametrize("seed", range(3))
def test_equal_to_plain_pycocotools(coco_set, tmp_path, seed):
    index = read_coco(coco_set / "annotations.json")
    results = random_results(index, np.random.default_rng(run_seed(seed)))
    evaluation = evaluate_results(index, results)
    assert_equal_numbers(evaluation, plain_pycocotools(coco_set / "annotations.json", results, tmp_path))
    assert 0 < evaluation.numbers["AP"] < 1
    mean = np.nanmean([ap for _, ap, _, _ in evaluation.per_class])
    assert mean == pytest.approx(evaluation.numbers["AP"], abs=1e-9)


@pytest.mark.numeric
@pytest.mark.parametrize("name", SETS)
def test_equal_to_plain_pycocotools_on_real_annotations(shared_data, tmp_path, name):
    for path in sorted((shared_data / name).glob("val*.json")):
        index = read_coco(path)
        results = random_results(index, np.random.default_rng(run_seed(1)))
        assert_equal_numbers(evaluate_results(index, results), plain_pycocotools(path, results, tmp_path))


@pytest.mark.parametrize("name", SETS)
def test_ground_truth_scores_one_and_nothing_scores_zero(shared_data, name):
    for path in sorted((shared_data / name).glob("*.json")):
        index = read_coco(path)
        perfect = evaluate_results(index, truth_as_results(index))
        assert perfect.numbers["AP"] == pytest.approx(1.0, abs=1e-9), path
        assert evaluate_results(index, []).numbers["AP"] == 0.0


def test_ground_truth_scores_one(coco_set):
    index = read_coco(coco_set / "annotations.json")
    evaluation = evaluate_results(index, truth_as_results(index))
    assert evaluation.numbers["AP"] == evaluation.numbers["AP50"] == 1.0
    assert [(name, boxes) for name, _, _, boxes in evaluation.per_class] == [("square", 11), ("disc", 10)]


@pytest.mark.parametrize("backend", EVAL_BACKENDS)
def test_one_evaluator_for_several_evaluations(coco_set, backend):
    if backend != EVAL_BACKENDS[0]:
        pytest.importorskip("faster_coco_eval")
    index = read_coco(coco_set / "annotations.json")
    evaluator = CocoEvaluator(index, backend)
    for seed in (0, 1):
        results = random_results(index, np.random.default_rng(seed))
        evaluator.reset()
        for half in (results[:50], results[50:]):
            evaluator.update(half)
        once = evaluate_results(index, results, backend)
        assert repr(evaluator.compute()) == repr(once)  # repr, as NaN is not NaN


def test_images_without_detections_count_as_missed(coco_set):
    index = read_coco(coco_set / "annotations.json")
    results = truth_as_results(index)
    half = [r for r in results if r["image_id"] % 2]
    assert evaluate_results(index, half).numbers["AR100"] == pytest.approx(len(half) / len(results), abs=0.02)


def test_detections_inside_a_crowd_region_cost_nothing(coco_set):
    index = read_coco(coco_set / "annotations.json")
    crowd = next(a for a in index.to_coco()["annotations"] if a["iscrowd"])
    x, y, w, h = crowd["bbox"]
    inside = {
        "image_id": crowd["image_id"],
        "category_id": crowd["category_id"],
        "bbox": [x + 2, y + 2, w / 2, h / 2],
        "score": 1.0,
    }
    assert evaluate_results(index, [inside, *truth_as_results(index)]).numbers["AP"] == 1.0


def test_no_ground_truth_is_undefined_not_minus_one(coco_set):
    path = coco_set / "annotations.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "annotations": []}))
    index = read_coco(path)
    for results in ([], [{"image_id": 10, "category_id": 3, "bbox": [1, 1, 5, 5], "score": 0.5}]):
        evaluation = evaluate_results(index, results)
        assert all(math.isnan(v) for v in evaluation.numbers.values())
        assert "n/a" in evaluation.table()
        assert json.loads(json.dumps(evaluation.to_json(), allow_nan=False))["AP"] is None


def test_a_class_without_examples_is_undefined_and_not_averaged(coco_set):
    path = coco_set / "annotations.json"
    content = json.loads(path.read_text())
    content["categories"].append({"id": 99, "name": "unseen"})
    path.write_text(json.dumps(content))
    index = read_coco(path)
    evaluation = evaluate_results(index, truth_as_results(index))
    assert evaluation.numbers["AP"] == 1.0
    assert math.isnan({n: ap for n, ap, _, _ in evaluation.per_class}["unseen"])


def test_annotation_ids_of_zero_or_twice_do_no_harm(coco_set):
    """pycocotools takes id 0 for "unmatched": with the file's own ids such an object could not be found."""
    path = coco_set / "annotations.json"
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        annotation["id"] = 0
    path.write_text(json.dumps(content))
    index = read_coco(path)
    assert evaluate_results(index, truth_as_results(index)).numbers["AP"] == 1.0


def test_what_is_given_is_not_changed(coco_set):
    index = read_coco(coco_set / "annotations.json")
    results = truth_as_results(index)
    before = json.dumps(results)
    evaluate_results(index, results)
    assert json.dumps(results) == before


def test_results_round_trip(coco_set, tmp_path):
    index = read_coco(coco_set / "annotations.json")
    results = random_results(index, np.random.default_rng(run_seed(5)))
    write_results(tmp_path / "p.json", results)
    assert read_results(tmp_path / "p.json") == results


GOOD = {"image_id": 10, "category_id": 3, "bbox": [1, 2, 3, 4], "score": 0.5}


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"a": 1}, "a list of detections"),
        ([GOOD, {**GOOD, "image_id": 11}], "entry 2: image_id 11 is not in"),
        ([{**GOOD, "category_id": 1}], "entry 1: category_id 1 is not in"),
        ([{**GOOD, "bbox": [1, 2, 3]}], r"entry 1: bbox \[1, 2, 3\] is not"),
        ([{**GOOD, "bbox": [1, 2, 3, float("inf")]}], "entry 1: bbox"),
        ([{**GOOD, "score": "high"}], "score 'high' is not a number"),
        ([{k: v for k, v in GOOD.items() if k != "score"}], "entry 1 has no 'score'"),
        ([3], "entry 1 is not an object"),
    ],
)
def test_malformed_results_are_named(coco_set, results, message):
    with pytest.raises(UserError, match=message):
        evaluate_results(read_coco(coco_set / "annotations.json"), results)


def test_categories_are_matched_by_name(coco_set):
    index = read_coco(coco_set / "annotations.json")
    assert category_ids_of(Classes(("square", "disc"), (1, 2)), index) == [3, 7]
    assert category_ids_of(Classes(("disc", "star", "square"), (1, 2, 3)), index) == [7, None, 3]
    with pytest.raises(UserError, match="classes that the model does not know: disc"):
        category_ids_of(Classes(("square",), (1,)), index)


@pytest.mark.numeric
def test_an_evaluation_that_is_cut_off_goes_on_where_it_was(trained, tmp_path, monkeypatch):
    found = tmp_path / "found.json"
    whole = score_checkpoint(trained / "best.pt", overrides=["data.workers=0"], predictions_file=str(found))
    expected = json.loads(found.read_text())
    plain, seen = score.detect_batches, []

    def cut_off(*args, **kwargs):
        for number, batch in enumerate(plain(*args, **kwargs)):
            if number == 2:
                raise KeyboardInterrupt
            yield batch

    def counted(*args, **kwargs):
        for batch in plain(*args, **kwargs):
            seen.extend(batch[0])
            yield batch

    options = {"overrides": ["data.workers=0", "eval.batch_size=4"], "predictions_file": str(found)}
    monkeypatch.setattr(score, "detect_batches", cut_off)
    with pytest.raises(KeyboardInterrupt):
        score_checkpoint(trained / "best.pt", **options)
    part = found.with_name("found.json.part0")
    part.write_text(part.read_text() + '{"images": [99')  # as a kill in the middle of a line leaves it
    monkeypatch.setattr(score, "detect_batches", counted)
    resumed = score_checkpoint(trained / "best.pt", **options, resume=True)
    assert len(seen) == 4 and not part.exists()
    assert resumed.numbers["AP"] == pytest.approx(whole.numbers["AP"], abs=1e-9)
    key = lambda r: (r["image_id"], r["category_id"], -r["score"], r["bbox"])  # noqa: E731
    assert len(json.loads(found.read_text())) == len(expected)
    for a, b in zip(sorted(json.loads(found.read_text()), key=key), sorted(expected, key=key), strict=True):
        assert a["image_id"] == b["image_id"] and a["bbox"] == pytest.approx(b["bbox"], abs=1e-3)

    # With other settings nothing of it is taken over.
    monkeypatch.setattr(score, "detect_batches", cut_off)
    with pytest.raises(KeyboardInterrupt):
        score_checkpoint(trained / "best.pt", **options)
    seen.clear()
    monkeypatch.setattr(score, "detect_batches", counted)
    other = {**options, "overrides": [*options["overrides"], "eval.nms_threshold=0.3"]}
    score_checkpoint(trained / "best.pt", **other, resume=True)
    assert len(seen) == 12


# ---- faster-coco-eval


def assert_same_numbers(index, results):
    plain, fast = evaluate_results(index, results), evaluate_results(index, results, "faster-coco-eval")
    assert fast.numbers == pytest.approx(plain.numbers, abs=1e-9, nan_ok=True)
    for one, two in zip(plain.per_class, fast.per_class, strict=True):
        assert one[0] == two[0] and one[1:] == pytest.approx(two[1:], abs=1e-9, nan_ok=True)


@pytest.mark.numeric
def test_the_fast_backend_gives_the_same(coco_set):
    pytest.importorskip("faster_coco_eval")
    index = read_coco(coco_set / "annotations.json")
    for results in ([], truth_as_results(index), random_results(index, np.random.default_rng(run_seed()), 30)):
        before = json.dumps(results)
        assert_same_numbers(index, results)
        assert json.dumps(results) == before


@pytest.mark.numeric
def test_the_fast_backend_and_the_traps(coco_set):
    """Crowd regions, no ground truth, more detections than count, equal scores, areas on COCO's very limits."""
    pytest.importorskip("faster_coco_eval")
    path = coco_set / "annotations.json"
    content = json.loads(path.read_text())
    for annotation, side in zip(content["annotations"], [32, 96, 32, 96, 31.99, 96.01] * 4, strict=False):
        annotation["bbox"][2:], annotation["area"] = [side, side], side * side
    for annotation in content["annotations"][1::3]:
        annotation["iscrowd"] = 1
    path.write_text(json.dumps(content))
    index = read_coco(path)
    rng = np.random.default_rng(run_seed())
    many = random_results(index, rng, 400)
    assert max(np.bincount([r["image_id"] for r in many if r["category_id"] == 3])) > 100
    assert_same_numbers(index, many)
    assert_same_numbers(index, [r | {"score": round(r["score"], 1)} for r in many])
    assert_same_numbers(index, [r for r in many if r["image_id"] == 10])
    path.write_text(json.dumps({**content, "annotations": []}))
    assert_same_numbers(read_coco(path), many)
    assert_same_numbers(read_coco(path), [])


@pytest.mark.numeric
@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_the_fast_backend_gives_the_same_on_photographs(shared_data, name):
    pytest.importorskip("faster_coco_eval")
    for path in sorted((shared_data / name).glob("*.json")):
        index = read_coco(path)
        for results in (random_results(index, np.random.default_rng(run_seed(1)), 40), truth_as_results(index), []):
            assert_same_numbers(index, results)


@pytest.mark.numeric
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_fast_backend_gives_the_same_at_the_size_of_coco():
    pytest.importorskip("faster_coco_eval")
    from evaluation_speed import random_evaluation

    assert_same_numbers(*random_evaluation(5000, 100, 80))


def test_a_backend_that_is_not_installed_is_named(coco_set, tool, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    index = read_coco(coco_set / "annotations.json")
    with pytest.raises(UserError, match=r"needs faster-coco-eval: pip install -e '\.\[fast-eval\]'"):
        evaluate_results(index, [], "faster-coco-eval")


def test_the_tools_take_a_backend(tool, coco_set, tmp_path):
    pytest.importorskip("faster_coco_eval")
    index = read_coco(coco_set / "annotations.json")
    write_results(tmp_path / "p.json", random_results(index, np.random.default_rng(run_seed(5))))
    arguments = ["--predictions", tmp_path / "p.json", "--data", coco_set / "annotations.json"]
    plain, fast = tool("evaluate", *arguments), tool("evaluate", *arguments, "--backend", "faster-coco-eval")
    assert plain.returncode == fast.returncode == 0, fast.stderr
    assert plain.stdout == fast.stdout
    done = tool("dev/evaluation_speed", "--images", 20, "--detections", 10, "--classes", 3)
    assert done.returncode == 0, done.stderr
    assert "20 images, 200 detections" in done.stdout and "times as fast" in done.stdout
