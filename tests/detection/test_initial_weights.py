"""`model.weights`: a training starts from another detector; classes are matched by name."""

import json
import logging
import math
import os
import signal

import pytest
import torch
from conftest import tiny_raw, write_coco
from torch import nn

from detection import UserError, build_model
from detection.checkpoint import read_checkpoint, save_checkpoint
from detection.config_io import parse_config
from detection.engine import loop
from detection.engine.detection_task import build_trainer
from detection.engine.train_detector import run_training
from detection.initial_weights import class_rows, load_initial_weights

DETECTORS = ("retinanet", "faster_rcnn", "ghostdet")


def config_for(detector: str, **model):
    source = {"images": "images", "annotations": "a.json"}
    raw = {
        "output_dir": "run",
        "model": {
            "detector": detector, "backbone": {"width": 0.5}, "fpn_channels": 16, "head_channels": 16, "head_depth": 1,
            "head_norm": "batch", **model,
        },
        "data": {"train": source, "val": source, "short_side": 96, "long_side": 96},
    }  # fmt: skip
    return parse_config(raw, "test")


def save(path, config, names, seed=1):
    """Write a checkpoint of random weights, batch-norm statistics and biases included."""
    torch.manual_seed(seed)
    model = build_model(config, len(names))
    state = {
        key: torch.rand_like(value) + 0.5 if value.is_floating_point() else value
        for key, value in model.state_dict().items()
    }
    classes = {"names": list(names), "ids": list(range(1, len(names) + 1))}
    save_checkpoint(path, {"model": state, "config": config.model_dump(), "classes": classes})
    return str(path), state


def class_tensors(state):
    return {k: v for k, v in state.items() if any(part in k for part in ("cls_logits", "cls_score", "bbox_pred"))}


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize(
    ("theirs", "own"),
    [
        (("cat", "dog", "person"), ("person", "cat", "dog")),  # another order
        (("cat", "dog", "person"), ("dog",)),  # one class
        (("cat", "dog"), ("bird", "Dog", "traffic light", "cat")),  # a superset
        (("traffic light", "dog"), ("Traffic_Light", "plate")),
    ],
)
def test_classes_are_matched_by_name(tmp_path, detector, theirs, own):
    config = config_for(detector)
    path, state = save(tmp_path / "best.pt", config, theirs)
    model = build_model(config, len(own))
    initial = {k: v.clone() for k, v in model.state_dict().items()}
    report = load_initial_weights(model, config, own, path)
    after = model.state_dict()
    known = {name.lower().replace("_", " "): i for i, name in enumerate(theirs)}
    by_class = 0
    for key, value in after.items():
        rows = class_rows(key, value, len(own))
        if rows is None:
            assert torch.equal(value, state[key]), key
            continue
        by_class += 1
        given = class_rows(key, state[key], len(theirs))
        for i, name in enumerate(own):
            j = known.get(name.lower().replace("_", " "))
            source, place = (initial[key], rows[i]) if j is None else (state[key], given[j])
            assert torch.equal(value[rows[i]], source[place]), (key, name)
        if detector == "faster_rcnn":  # the background is no new class
            first = int(rows.min())
            assert first > 0 and torch.equal(value[:first], state[key][:first])
    assert by_class == {"retinanet": 2, "faster_rcnn": 4, "ghostdet": 6}[detector]
    assert report.kept_classes == [name for name in own if name.lower().replace("_", " ") in known]
    assert not report.reinitialized and not report.refused


def test_new_classes_start_with_the_score_prior(tmp_path):
    config = config_for("ghostdet")
    path, _ = save(tmp_path / "best.pt", config, ("cat",))
    model = build_model(config, 2)
    load_initial_weights(model, config, ("cat", "plate"), path)
    for head in model.head.levels:
        assert head.cls_logits.bias[1].item() == pytest.approx(-math.log(99))
        assert head.cls_logits.bias[0].item() >= 0.5


def test_averaged_weights_are_taken(tmp_path):
    config = config_for("ghostdet")
    path, state = save(tmp_path / "best.pt", config, ("cat",))
    content = read_checkpoint(path)
    average = {key: value + 1 for key, value in content["model"].items()}
    save_checkpoint(tmp_path / "best.pt", {**content, "ema": average})
    model = build_model(config, 1)
    load_initial_weights(model, config, ("cat",), path)
    assert torch.equal(model.state_dict()["backbone.body.bn1.weight"], state["backbone.body.bn1.weight"] + 1)


def test_another_head_starts_anew_where_it_does_not_fit(tmp_path, caplog):
    path, _ = save(tmp_path / "best.pt", config_for("ghostdet"), ("cat",))
    deeper = config_for("ghostdet", head_depth=2)
    with caplog.at_level(logging.INFO, "detection"):
        report = load_initial_weights(build_model(deeper, 1), deeper, ("cat",), path)
    assert report.reinitialized and all(".tower.1." in name for name in report.reinitialized)
    assert f"{len(report.reinitialized)} re-initialized" in caplog.text and "1 of 1 classes known (cat)" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": {"width": 1.0}}, "model.backbone.width is 0.5 in the file and 1.0 in the config"),
        ({"backbone": {"name": "mobilenet_v3_small"}}, "model.backbone.name is 'ghostnet' in the file"),
        ({"fpn_channels": 24}, "model.fpn_channels is 16 in the file and 24 in the config"),
        ({"detector": "retinanet"}, "model.detector is 'ghostdet' in the file"),
        ({"ghostify": {"min_channels": 8}}, "model.ghostify is None in the file"),
    ],
)
def test_another_network_is_an_error(tmp_path, changes, message):
    path, _ = save(tmp_path / "best.pt", config_for("ghostdet"), ("cat",))
    config = config_for(**{"detector": "ghostdet", **changes})
    with pytest.raises(UserError, match=message):
        load_initial_weights(nn.Module(), config, ("cat",), path)


def test_nan_is_an_error_and_changes_nothing(tmp_path):
    config = config_for("ghostdet")
    path, _ = save(tmp_path / "best.pt", config, ("cat",))
    content = read_checkpoint(path)
    content["model"]["backbone.body.bn1.weight"][0] = math.nan
    save_checkpoint(tmp_path / "best.pt", content)
    model = build_model(config, 1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match=r"bn1\.weight has numbers that are not finite"):
        load_initial_weights(model, config, ("cat",), path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_absent_file_is_an_error_before_the_data_are_read(tmp_path):
    write_coco(tmp_path / "set")
    raw = tiny_raw(tmp_path / "set", tmp_path / "run")
    raw["model"]["weights"] = str(tmp_path / "absent.pt")
    with pytest.raises(UserError, match=r"absent\.pt does not exist"):
        build_trainer(parse_config(raw, "test"))


# ---- Trainings


def fine_tuning(trained, tmp_path, name="run", **model):
    """A config that starts from the tiny run, on data with its classes renamed: disc stays, square becomes plate."""
    annotations = write_coco(tmp_path / "set", seed=5)
    content = json.loads(annotations.read_text())
    content["categories"] = [{"id": 3, "name": "plate"}, {"id": 7, "name": "disc"}]
    annotations.write_text(json.dumps(content))
    raw = tiny_raw(tmp_path / "set", tmp_path / name)
    raw["model"] |= {"weights": str(trained / "best.pt"), **model}
    return parse_config(raw, "test")


@pytest.mark.numeric
def test_a_fine_tuned_detector_begins_where_the_other_ended(trained, tmp_path):
    """Both classes are known: before the first step it detects as the trained run does."""
    raw = tiny_raw(trained.parent / "data", tmp_path / "run")
    raw["model"]["weights"] = str(trained / "best.pt")
    config = parse_config(raw, "test")
    trainer = build_trainer(config)
    numbers = trainer.task.score(trainer.task.predict(trainer.eval_model))
    assert numbers["AP"] == pytest.approx(read_checkpoint(trained / "best.pt")["numbers"]["AP"])


def test_frozen_parts_do_not_change(trained, tmp_path):
    config = fine_tuning(trained, tmp_path, freeze=["backbone", "neck"])
    assert run_training(config)
    before = read_checkpoint(trained / "best.pt")
    before = before.get("ema") or before["model"]
    after = read_checkpoint(tmp_path / "run" / "last.pt")["model"]
    changed = {key.partition(".")[0] for key in after if not torch.equal(after[key], before[key])}
    assert changed == {"head"}


def test_only_pretrained_parts_are_frozen(tmp_path, caplog):
    write_coco(tmp_path / "set")
    raw = tiny_raw(tmp_path / "set", tmp_path / "run")
    raw["model"]["freeze"] = ["backbone", "neck"]
    with caplog.at_level(logging.WARNING, "detection"):
        model = build_trainer(parse_config(raw, "test")).model
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert "model.freeze: the backbone has random weights" in caplog.text and "the neck has random" in caplog.text


def test_resume_of_a_fine_tuning_is_bit_exact(trained, tmp_path, monkeypatch):
    whole = fine_tuning(trained, tmp_path, "whole", freeze=["neck"])
    assert run_training(whole)
    config = fine_tuning(trained, tmp_path, "parts", freeze=["neck"])
    step, steps = loop.train_step, []

    def stopped_in_epoch_two(trainer, *args, **kwargs):
        steps.append(1)
        if len(steps) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *args, **kwargs)

    monkeypatch.setattr(loop, "train_step", stopped_in_epoch_two)
    assert not run_training(config)
    assert run_training(config, resume=True)
    one, two = (read_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("whole", "parts"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_resume_needs_the_same_frozen_parts(trained, tmp_path):
    config = fine_tuning(trained, tmp_path, freeze=["neck"])
    assert run_training(config)
    config.model.weights = None
    with pytest.raises(UserError, match=r"frozen because they have weights.*and the neck -> 0 stages"):
        run_training(config, resume=True)
