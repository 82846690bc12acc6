"""`train.teacher`: a detector annotates, in each augmented batch, what the annotations lack."""

import json

import numpy as np
import pytest
import torch
from conftest import tiny_raw
from torchvision.ops import box_iou

from detection import UserError
from detection.checkpoint import read_checkpoint
from detection.config_io import parse_config
from detection.engine.detection_task import build_trainer
from detection.engine.train_detector import run_training
from detection.models.task_aligned import aligned_losses, assign


def config_with_teacher(trained, tmp_path, *, complete=("square",), **teacher):
    """GhostDet on the tiny run's data, whose discs are not annotated; the tiny run, a RetinaNet, is the teacher."""
    content = json.loads((trained.parent / "data" / "annotations.json").read_text())
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 3]
    (tmp_path / "squares.json").write_text(json.dumps(content))
    raw = tiny_raw(trained.parent / "data", tmp_path / "run")
    raw["model"]["detector"] = "ghostdet"
    raw["data"]["train"] = {
        "annotations": str(tmp_path / "squares.json"),
        "images": str(trained.parent / "data" / "images"),
        "complete_classes": list(complete),
    }
    raw["train"]["teacher"] = {"detector": str(trained / "best.pt"), "score_threshold": 0.2, **teacher}
    return parse_config(raw, "test")


@pytest.mark.numeric
def test_the_teacher_adds_what_the_annotations_lack(trained, tmp_path):
    trainer = build_trainer(config_with_teacher(trained, tmp_path))
    images, targets = next(iter(trainer.train_loader))
    before = [{k: v.clone() if torch.is_tensor(v) else v for k, v in t.items()} for t in targets]
    completed = trainer.task.teacher(images, targets)
    found = trainer.task.teacher.predictor.predict_batch(images)
    added = 0
    for old, kept, new, detections in zip(before, targets, completed, found, strict=True):
        own = len(old["boxes"])
        assert torch.equal(kept["boxes"], old["boxes"]) and "scores" not in kept  # the loader's targets stay
        assert torch.equal(new["boxes"][:own], old["boxes"]) and torch.equal(new["scores"][:own], torch.ones(own))
        assert new["labels"][own:].eq(2).all()  # discs alone: squares are annotated
        discs = detections["labels"] == 2
        # A disc in the place of an annotated square is a mistake of the teacher.
        discs &= (box_iou(torch.from_numpy(detections["boxes"]), old["boxes"]) <= 0.8).all(dim=1).numpy()
        assert len(new["boxes"]) - own == discs.sum()
        np.testing.assert_array_equal(new["scores"][own:], detections["scores"][discs])
        assert new["complete_classes"].all()
        added += int(discs.sum())
    assert added > 0


def test_complete_sets_get_nothing(trained, tmp_path):
    trainer = build_trainer(config_with_teacher(trained, tmp_path, complete=("square", "disc")))
    images, targets = next(iter(trainer.train_loader))
    completed = trainer.task.teacher(images, targets)
    assert all(new is old for new, old in zip(completed, targets, strict=True))


def test_certainty_scales_quality_and_box_losses():
    points, strides = torch.tensor([[8.0, 8.0], [24.0, 8.0]]), torch.tensor([16.0, 16.0])
    boxes, labels, real = torch.tensor([[[0.0, 0, 16, 16]]]), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1) > 0
    found = torch.tensor([[[1.0, 1, 15, 15], [17, 1, 31, 15]]])
    scores = torch.full((1, 2, 2), 0.3)
    sure, half = (assign(scores, found, points, strides, boxes, labels, real, c) for c in (None, torch.tensor([[0.5]])))
    assert torch.equal(half.quality, 0.5 * sure.quality) and torch.equal(half.weight, sure.weight)
    distances = torch.zeros(1, 2, 4, 8)
    one, two = (
        aligned_losses(torch.zeros(1, 2, 2), distances, found, points, strides, target) for target in (sure, half)
    )
    for name in ("bbox_regression", "distances"):
        torch.testing.assert_close(two[name], 0.5 * one[name])
    # Certain boxes: the same bits as without a teacher.
    ones = assign(scores, found, points, strides, boxes, labels, real, torch.ones(1, 1))
    three = aligned_losses(torch.zeros(1, 2, 2), distances, found, points, strides, ones)
    assert all(torch.equal(one[name], three[name]) for name in one)


@pytest.mark.numeric
def test_a_class_is_learned_from_the_teacher_alone(trained, tmp_path):
    config = config_with_teacher(trained, tmp_path)
    config.train.epochs = 40
    config.train.eval_every = 40
    assert run_training(config)
    trainer = build_trainer(config)
    trainer.model.load_state_dict(read_checkpoint(tmp_path / "run" / "best.pt")["model"])
    names = {"disc": 0, "square": 0}
    for result in trainer.task.predict(trainer.model):
        names["disc" if result["category_id"] == 7 else "square"] += result["score"] > 0.3
    assert min(names.values()) > 5


def test_mistakes(trained, tmp_path):
    config = config_with_teacher(trained, tmp_path)
    config.model.detector = "retinanet"
    with pytest.raises(UserError, match=r"train\.teacher: only ghostdet learns from scores of boxes, not retinanet"):
        build_trainer(config)
    config = config_with_teacher(trained, tmp_path, detector=str(tmp_path / "absent.pt"))
    with pytest.raises(UserError, match=r"absent\.pt does not exist"):
        build_trainer(config)
    content = json.loads((tmp_path / "squares.json").read_text())
    content["categories"] = [{"id": 3, "name": "house"}, {"id": 7, "name": "tree"}]
    (tmp_path / "squares.json").write_text(json.dumps(content))
    config = config_with_teacher(trained, tmp_path, complete=())
    (tmp_path / "squares.json").write_text(json.dumps(content))
    config.data.val = config.data.train.model_copy()
    with pytest.raises(UserError, match=r"train\.teacher: .*best\.pt knows none of the classes house, tree"):
        build_trainer(config)
