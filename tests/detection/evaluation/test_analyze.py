"""What lies behind the number: cases whose answer is known by hand, and agreement with pycocotools."""

import json
import math

import numpy as np
import pytest
from coco_results import SETS, random_results, truth_as_results
from conftest import run_seed

from detection.core.errors import UserError
from detection.data.formats.coco import read_coco
from detection.evaluation.analyze import analyze
from detection.evaluation.bootstrap import compare
from detection.evaluation.breakdown import KINDS, break_down
from detection.evaluation.coco_evaluator import evaluate_results
from detection.evaluation.curves import calibrate, confusion_matrix, score_images, threshold_curve
from detection.evaluation.groups import groups_by_crowdedness, groups_by_shape, groups_by_size
from detection.evaluation.matches import class_aps, match, mean_ap

pytestmark = pytest.mark.numeric

NAMES = ("a", "b")
HALF = 51 / 101
"""AP of a class of which one of two objects is found: 51 of the 101 recalls, 0.00 to 0.50."""


def data(path, *images):
    """An index of 1000 x 1000 images with objects (class, x) or (class, x, "crowd"): squares of 100 px at (x, 0)."""
    annotations = []
    for i, objects in enumerate(images):
        for name, x, *crowd in objects:
            annotation = {"id": len(annotations) + 1, "image_id": i + 1, "category_id": NAMES.index(name) + 1}
            annotation |= {"bbox": [x, 0, 100, 100], "area": 1e4, "iscrowd": int(bool(crowd))}
            annotations.append(annotation)
    content = {
        "images": [{"id": i + 1, "file_name": f"{i}.jpg", "width": 1000, "height": 1000} for i in range(len(images))],
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(NAMES)],
    }
    path.write_text(json.dumps(content))
    return read_coco(path)


def found(name, x, score, image=1):
    return {"image_id": image, "category_id": NAMES.index(name) + 1, "bbox": [x, 0, 100, 100], "score": score}


def kinds(breakdown):
    return [KINDS[kind] for kind in breakdown.kind if kind >= 0]


TWO = [("a", 0), ("a", 200)]
# Shifted by 50 px: IoU 1/3. Shifted by 300: none.
CASES = {
    "localisation": (TWO, [found("a", 0, 0.9), found("a", 250, 0.8)], "localisation", 1 - HALF),
    "classification": (
        [*TWO, ("b", 400)],
        [found("a", 0, 0.9), found("b", 400, 0.9), found("b", 200, 0.8)],
        "classification",
        (1 - HALF) / 2,
    ),
    # Better than the right one, it halves the precision of b.
    "both": ([*TWO, ("b", 400)], [found("a", 0, 0.9), found("b", 400, 0.9), found("b", 250, 0.95)], "both", 0.25),
    # Between the two right ones: a precision of 2/3 at the recalls above 0.5.
    "duplicate": (TWO, [found("a", 0, 0.9), found("a", 0, 0.85), found("a", 200, 0.8)], "duplicate", 50 / 101 / 3),
    "background": (TWO, [found("a", 0, 0.9), found("a", 600, 0.85), found("a", 200, 0.8)], "background", 50 / 101 / 3),
    "missed": (TWO, [found("a", 0, 0.9)], "missed", 1 - HALF),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_error_costs_what_it_must(tmp_path, kind):
    objects, results, name, cost = CASES[kind]
    breakdown = break_down(match(data(tmp_path / "d.json", objects), results))
    counts = {other: breakdown.counts[other] for other in KINDS}
    expected = dict.fromkeys(KINDS, 0) | {name: 1}
    if kind == "both":
        # A detection that is badly placed and misnamed explains no object.
        expected["missed"] = 1
    assert counts == expected
    assert breakdown.costs[name] == pytest.approx(cost, abs=1e-9)
    for other in set(KINDS) - {name} - ({"missed"} if kind == "both" else set()):
        assert breakdown.costs[other] == pytest.approx(0, abs=1e-9)


def test_all_kinds_at_once(tmp_path):
    index = data(tmp_path / "d.json", [("a", 0), ("a", 200), ("b", 400), ("b", 600), ("a", 850)], [])
    results = [
        found("a", 0, 0.9),
        found("a", 5, 0.8),
        found("a", 250, 0.7),
        found("a", 400, 0.6),
        found("b", 250, 0.5),
        found("b", 740, 0.4),
        found("b", 0, 0.3, image=2),
    ]
    breakdown = break_down(match(index, results))
    assert kinds(breakdown) == ["duplicate", "localisation", "classification", "both", "background", "background"]
    # Of b 400 a classification error tells, of a 200 a localisation error; b 600 and a 850 are left.
    assert breakdown.counts["missed"] == 2 and breakdown.missed.tolist() == [False, False, False, True, True]
    assert breakdown.counts["false_positives"] == 6 and breakdown.counts["false_negatives"] == 4
    assert breakdown.about[breakdown.kind >= 0].tolist() == [0, 1, 2, -1, -1, -1]


def test_of_two_mistakes_about_an_object_the_better_is_mended_and_the_other_goes(tmp_path):
    index = data(tmp_path / "d.json", TWO)
    results = [found("a", 0, 0.9), found("a", 250, 0.8), found("a", 245, 0.7)]
    assert break_down(match(index, results)).costs["localisation"] == pytest.approx(1 - HALF)
    # About an object that is found anyway they only go: 0.5 of a precision of 1/2 and of 1 at all recalls.
    results = [found("a", 50, 0.95), found("a", 0, 0.9), found("a", 200, 0.8)]
    assert break_down(match(index, results)).costs["localisation"] == pytest.approx(1 - 2 / 3)


def test_errors_with_false_positives_and_negatives(tmp_path):
    index = data(tmp_path / "d.json", TWO)
    breakdown = break_down(match(index, [found("a", 600, 0.9), found("a", 0, 0.8)]))
    # Half of the recalls at a precision of 1/2.
    assert breakdown.ap50 == pytest.approx(HALF / 2)
    assert breakdown.costs["false_positives"] == pytest.approx(HALF / 2)
    assert breakdown.costs["false_negatives"] == pytest.approx(0.5 - HALF / 2)


def test_detections_on_crowd_regions_are_no_errors(tmp_path):
    index = data(tmp_path / "d.json", [("a", 0), ("a", 400, "crowd")], [("a", 0, "crowd")])
    results = [found("a", 0, 0.9), found("a", 400, 0.95), found("a", 0, 0.95, image=2)]
    matches = match(index, results)
    assert break_down(matches).counts == dict.fromkeys((*KINDS, "false_positives", "false_negatives"), 0)
    assert [matches.evaluation.numbers["AP"], mean_ap(class_aps(matches))] == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("objects", [[], [("a", 0, "crowd")]])
def test_without_ground_truth_all_is_undefined_and_nothing_fails(tmp_path, objects):
    analysis = analyze(data(tmp_path / "d.json", objects, []), [found("a", 300, 0.9), found("b", 600, 0.5)])
    assert math.isnan(analysis.breakdown.ap50) and analysis.thresholds == [None, None]
    assert json.loads(json.dumps(analysis.to_json(), allow_nan=False))["errors"]["AP50"] is None
    assert analysis.breakdown.counts["background"] == 2


def test_a_class_that_is_missed_altogether(tmp_path):
    index = data(tmp_path / "d.json", [("a", 0), ("b", 200)])
    assert break_down(match(index, [found("a", 0, 0.9)])).costs["missed"] == pytest.approx(0.5)
    assert break_down(match(index, [])).costs["missed"] == pytest.approx(1.0)
    # What is claimed of it where nothing is stays wrong.
    with_noise = [found("a", 0, 0.9), found("b", 700, 0.3)]
    assert break_down(match(index, with_noise)).costs["missed"] == pytest.approx(0.0)


def test_the_threshold_is_where_f1_is_largest(tmp_path):
    index = data(tmp_path / "d.json", [("a", 0), ("a", 200), ("a", 400)])
    results = [
        found("a", 0, 0.9),
        found("a", 200, 0.7),
        found("a", 600, 0.4),
        found("a", 750, 0.4),
        found("a", 400, 0.2),
    ]
    curve = threshold_curve(match(index, results), 1)
    assert curve.threshold.tolist() == [0.9, 0.7, 0.4, 0.2]
    assert curve.f1 == pytest.approx([2 / 4, 4 / 5, 4 / 7, 6 / 8])
    assert curve.best == pytest.approx(0.55)
    assert curve.at_best() == pytest.approx((1.0, 2 / 3, 0.8))
    nothing = threshold_curve(match(index, results), 2)
    assert nothing.best is None and nothing.at_best() is None and not len(nothing.f1)


def test_calibration_by_hand(tmp_path):
    index = data(tmp_path / "d.json", [("a", 0), ("a", 200)])
    # Bin 0.9: two of score 0.95, one right; bin 0.5: one of 0.55, right; what is below 0.05 plays no part.
    results = [found("a", 0, 0.95), found("a", 600, 0.95), found("a", 200, 0.55), found("a", 700, 0.01)]
    calibration = calibrate(match(index, results))
    assert calibration.count.tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 2]
    assert calibration.error == pytest.approx((2 * abs(0.5 - 0.95) + abs(1 - 0.55)) / 3)


def test_confusion_by_hand(tmp_path):
    index = data(tmp_path / "d.json", [("a", 0), ("a", 200), ("b", 400), ("a", 800, "crowd")], [("b", 0)])
    results = [
        found("a", 0, 0.9),
        found("b", 200, 0.8),
        found("b", 600, 0.7),
        found("a", 800, 0.9),
        found("b", 400, 0.1),
        found("b", 0, 0.8, image=2),
    ]
    matches = match(index, results)
    #                    a  b  missed
    assert confusion_matrix(matches, [0.5, 0.5]).tolist() == [[1, 1, 0], [0, 1, 1], [0, 1, 0]]
    assert confusion_matrix(matches, [None, None]).tolist() == [[0, 0, 2], [0, 0, 2], [0, 0, 0]]
    images = score_images(matches, [0.5, 0.5])
    assert (images.right.tolist(), images.wrong.tolist(), images.missed.tolist()) == ([1, 1], [2, 0], [2, 0])
    assert images.f1.tolist() == [pytest.approx(2 / 6), 1.0]


def test_groups(tmp_path):
    index = data(tmp_path / "d.json", [("a", 0)], [("a", 0), ("a", 200), ("a", 400), ("a", 600)])
    results = [found("a", 0, 0.9), found("a", 0, 0.8, image=2), found("a", 700, 0.85)]
    matches = match(index, results)
    few, several = groups_by_crowdedness(matches)
    assert (few.name, few.objects, few.recall) == ("1 to 3 objects", 1, 1.0)
    assert [few.ap50, several.ap50] == pytest.approx([1.0, 26 / 101]) and several.recall == 0.25
    for groups in (groups_by_size(matches), groups_by_shape(matches)):
        (group,) = groups
        assert group.objects == 5 and group.ap == pytest.approx(matches.evaluation.numbers["AP"])


# ---- agreement with pycocotools


def assert_agrees(index, results):
    matches = match(index, results)
    aps = [mean_ap(class_aps(matches, t)) for t in range(len(matches.thresholds))]
    expected = evaluate_results(index, results)
    numbers = expected.numbers
    assert [np.mean(aps), aps[0], aps[5]] == pytest.approx([numbers["AP"], numbers["AP50"], numbers["AP75"]], abs=1e-12)
    per_class = [ap50 for _, _, ap50, _ in expected.per_class]
    assert class_aps(matches, 0) == pytest.approx(per_class, abs=1e-12, nan_ok=True)
    assert break_down(matches).ap50 == pytest.approx(numbers["AP50"], abs=1e-12)
    small = (matches.annotations.areas <= 32**2, matches.box[:, 2] * matches.box[:, 3] <= 32**2)
    if not math.isnan(numbers["APs"]):
        ours = [mean_ap(class_aps(matches, t, objects=small[0], detections=small[1])) for t in range(10)]
        # COCOeval matches anew for each range, and prefers objects within it.
        assert np.mean(ours) == pytest.approx(numbers["APs"], abs=0.03)
    return matches


def test_ap_of_the_matches_is_the_evaluators(coco_set):
    index = read_coco(coco_set / "annotations.json")
    for results in ([], truth_as_results(index), random_results(index, np.random.default_rng(run_seed(3)))):
        assert_agrees(index, results)


@pytest.mark.parametrize(
    "name", [name if name == "bccd" else pytest.param(name, marks=pytest.mark.slow) for name in SETS]
)
def test_ap_of_the_matches_is_the_evaluators_on_photographs(shared_data, name):
    index = read_coco(shared_data / name / "val.json")
    assert_agrees(index, random_results(index, np.random.default_rng(run_seed(4))))


# ---- bootstrap


def test_a_run_against_itself_differs_in_nothing(coco_set):
    index = read_coco(coco_set / "annotations.json")
    matches = match(index, random_results(index, np.random.default_rng(run_seed())))
    rows = compare(matches, matches, resamples=50)
    assert [row.name for row in rows] == ["AP", "AP50", "AP75", "AP of square", "AP of disc"]
    assert all(row.value == row.low == row.high == 0 and not row.clear for row in rows)
    assert rows[0].first == pytest.approx(matches.evaluation.numbers["AP"], abs=1e-12)


def test_a_worse_run_is_told(coco_set):
    index = read_coco(coco_set / "annotations.json")
    good = match(index, truth_as_results(index))
    bad = match(index, random_results(index, np.random.default_rng(run_seed())))
    row = compare(bad, good, resamples=100)[0]
    assert row.clear and 0 < row.low < row.value < row.high and row.second == 1.0
    assert compare(good, bad, resamples=100)[0].value == -row.value


def test_a_resample_is_scored_as_pycocotools_scores_those_images(tmp_path):
    from detection.evaluation.bootstrap import resampled_aps

    rng = np.random.default_rng(run_seed(1))
    objects = [[("ab"[int(rng.integers(2))], 200 * int(k)) for k in range(rng.integers(0, 5))] for _ in range(12)]
    index = data(tmp_path / "d.json", *objects)
    results = random_results(index, rng)
    draw = rng.multinomial(12, [1 / 12] * 12)
    assert draw.max() > 1 and draw.min() == 0
    copies = [i for i in range(12) for _ in range(draw[i])]
    drawn = data(tmp_path / "drawn.json", *(objects[i] for i in copies))
    of_image = {i: [r for r in results if r["image_id"] == i + 1] for i in range(12)}
    expected = evaluate_results(
        drawn, [r | {"image_id": place + 1} for place, i in enumerate(copies) for r in of_image[i]]
    )
    matches = match(index, results)
    aps = [resampled_aps(matches, label, draw[None])[:, 0].mean() for label in (1, 2)]
    assert aps == pytest.approx([ap for _, ap, _, _ in expected.per_class], abs=1e-12)


def test_runs_on_other_data_are_not_compared(tmp_path):
    one = match(data(tmp_path / "1.json", TWO), [])
    two = match(data(tmp_path / "2.json", [("a", 0)]), [])
    with pytest.raises(UserError, match=r"different data .*1\.json: 1 images, 2 objects"):
        compare(one, two)
