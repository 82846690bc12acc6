"""Training on several data sets with classes of their own, evaluated on several."""

import json
import os
import signal

import pytest
import torch
from conftest import run_seed, tiny_raw, write_coco
from small_sets import write_part

from detection import UserError
from detection.checkpoint import read_checkpoint
from detection.config_io import parse_config
from detection.engine import loop
from detection.engine.detection_task import build_trainer
from detection.engine.loop import train_step
from detection.engine.train_detector import run_training
from detection.report.run_data import read_run


def raw_config(folder, images=12):
    """Discs in half of the images, squares in the other half; one val set has both, a second one discs alone."""
    write_coco(folder / "set", images=images, ids=(3, 7))
    write_coco(folder / "val", seed=run_seed(1), ids=(9, 4))
    raw = tiny_raw(folder / "set", folder / "run")
    halves = [slice(0, None, 2), slice(1, None, 2)]
    raw["data"]["train"] = [
        {"annotations": write_part(folder / "set", f"{name}s", [name], half)}
        for name, half in zip(("disc", "square"), halves, strict=True)
    ]
    raw["data"]["val"] = [
        {"annotations": str(folder / "val" / "annotations.json")},
        {"annotations": write_part(folder / "val", "discs", ["disc"], slice(6), {"disc": 1})},
    ]
    return raw


@pytest.fixture()
def config(tmp_path):
    return parse_config(raw_config(tmp_path), "test")


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.numeric
def test_each_val_set_is_scored_and_the_mean_of_their_aps_counts(config, tmp_path):
    assert run_training(config)
    record, checkpoint = lines(tmp_path / "run")[-1], read_checkpoint(tmp_path / "run" / "best.pt")
    assert list(record["sets"]) == ["annotations", "discs"]
    both, discs = record["sets"].values()
    assert record["AP"] == pytest.approx((both["AP"] + discs["AP"]) / 2)
    assert set(both["per_class"]) == {"disc", "square"} and set(discs["per_class"]) == {"disc"}
    assert checkpoint["classes"] == {"names": ["disc", "square"], "ids": [4, 9]}
    # Each file has the ids of its own annotations, and gives the AP of its set.
    run = tmp_path / "run"
    for name, ids in (("", {4, 9}), ("_discs", {1})):
        found = json.loads((run / f"predictions{name}.json").read_text())
        assert {result["category_id"] for result in found} <= ids and found
        assert (run / f"best_predictions{name}.json").exists()
    assert read_run(run, detect=False).analysis.matches.evaluation.numbers["AP"] == pytest.approx(
        checkpoint["numbers"]["sets"]["annotations"]["AP"], abs=1e-6
    )

    again = config.with_overrides([f"output_dir={tmp_path / 'deferred'}", "eval.background=true"])
    assert run_training(again)
    assert [r["sets"] for r in lines(tmp_path / "deferred")] == [r["sets"] for r in lines(run)]
    for name in ("predictions", "best_predictions", "predictions_discs", "best_predictions_discs"):
        assert (tmp_path / f"deferred/{name}.json").read_text() == (run / f"{name}.json").read_text()


@pytest.mark.numeric
def test_a_stopped_run_resumes_to_the_same_weights(config, tmp_path, monkeypatch):
    """With weights: an epoch has some images twice and leaves others out."""
    overrides = ["data.train.0.weight=0.5", "data.train.1.weight=2.5", "data.augment.mosaic=0.5"]
    assert run_training(config.with_overrides([*overrides, f"output_dir={tmp_path / 'whole'}"]))
    steps = []

    def counted(*args, **kwargs):
        steps.append(1)
        if len(steps) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", counted)
    parts = config.with_overrides([*overrides, f"output_dir={tmp_path / 'parts'}"])
    assert not run_training(parts)
    progress = read_checkpoint(tmp_path / "parts" / "last.pt")["progress"]
    assert (progress["epoch"], progress["batch"]) == (1, 2)  # an epoch has (3 + 15) / 4 batches
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"cannot change: data\.train: "):
        run_training(parts.with_overrides(["data.train.1.weight=2"]), resume=True)
    assert run_training(parts, resume=True)
    for section in ("model", "ema"):
        one, two = (read_checkpoint(tmp_path / name / "last.pt")[section] for name in ("whole", "parts"))
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_what_cannot_be_trained_is_refused_at_the_start(config, tmp_path):
    with pytest.raises(UserError, match=r"faster_rcnn needs annotations of all classes.*ghostdet or retinanet"):
        build_trainer(config.with_overrides(["model.detector=faster_rcnn"]))
    complete = [f"data.train.{number}.complete_classes=[disc, square]" for number in range(2)]
    build_trainer(config.with_overrides(["model.detector=faster_rcnn", *complete]))
    with pytest.raises(UserError, match=r"no set of data\.train is complete for square: .*complete_classes"):
        build_trainer(config.with_overrides(["data.train.1.complete_classes=[disc]"]))
    cats = write_part(tmp_path / "val", "cats", ["disc"])
    content = json.loads((tmp_path / "val" / "cats.json").read_text())
    content["categories"][0]["name"] = "dics"
    (tmp_path / "val" / "cats.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"cats\.json has classes that no set.*dics.*did you mean 'disc'"):
        build_trainer(config.with_overrides([f"data.val.1.annotations={cats}"]))


@pytest.mark.numeric
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_detector_learns_two_classes_from_two_sets_with_one_each(tmp_path):
    """As well as from images with all boxes, if each box is seen as often; much worse if what has no box is background,
    as half of all objects then are."""
    raw = raw_config(tmp_path, images=192)
    write_coco(tmp_path / "test", images=48, seed=run_seed(1000))
    raw["model"] |= {"detector": "ghostdet"}
    raw["data"] |= {"val": {"annotations": str(tmp_path / "test" / "annotations.json")}, "batch_size": 8}
    raw["optim"] |= {"lr": 0.003, "warmup_steps": 20}
    halves = raw["data"]["train"]
    wrong = [{**half, "complete_classes": ["disc", "square"]} for half in halves]
    whole = {"annotations": str(tmp_path / "set" / "annotations.json")}
    found = {}
    for name, sets, epochs in (("whole", whole, 18), ("halves", halves, 36), ("wrong", wrong, 36)):
        raw["output_dir"], raw["data"]["train"] = str(tmp_path / name), sets
        raw["train"] |= {"epochs": epochs, "eval_every": epochs, "ema": 0.99}
        assert run_training(parse_config(raw, "test"))
        found[name] = lines(tmp_path / name)[-1]["AP"]
    assert found["halves"] > found["whole"] - 0.02, found
    assert found["wrong"] < found["halves"] - 0.05, found
