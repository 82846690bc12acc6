"""What keeps a training going, or ends it well: losses that are not finite, parameter groups, patience."""

import importlib.util
import json
import math

import cv2
import numpy as np
import pytest
import torch
from conftest import assert_clear_error
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from detection.checkpoint import read_checkpoint
from detection.config import OptimConfig
from detection.config_io import parse_config
from detection.core.errors import UserError
from detection.data.dataset import build_dataset
from detection.data.loader import iterate
from detection.engine import loop
from detection.engine.auto_batch import largest_fitting, with_largest_batch
from detection.engine.detection_task import DetectionTask, build_trainer
from detection.engine.image_grids import detections_grid
from detection.engine.loop import optimizer_step, train_step
from detection.engine.optimizer import parameter_groups
from detection.engine.resume import compare_configs
from detection.engine.run_logger import RunLogger
from detection.engine.schedule import lr_factor
from detection.engine.train_detector import run_training

# ---- losses that are not finite


def poisoned(trainer, batch, value=math.nan):
    """Make the losses of the `batch`th batch from now on `value`, as the result of a computation on the weights."""
    plain, seen = trainer.task.losses, []

    def losses(objective, images, targets):
        seen.append([target["image_id"] for target in targets])
        found = plain(objective, images, targets)
        return {k: v * value for k, v in found.items()} if len(seen) == batch else found

    trainer.task.losses = losses
    return seen


@pytest.mark.numeric
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_gpu_is_not_asked_and_its_weights_stay_as_they_were(tiny_config, value, optimizer):
    """The way of a GPU, on the CPU: the loss is looked at one step late, the optimizer itself leaves out the update."""
    trainer = build_trainer(tiny_config.with_overrides([f"optim.name={optimizer}", "train.ema=0"]))
    trainer.guard.late = True
    seen = poisoned(trainer, 2, value)
    batches = list(trainer.train_loader)
    trainer.model.train()
    assert train_step(trainer, *batches[0], group=1) == {}
    optimizer_step(trainer)
    before = {k: p.clone() for k, p in trainer.model.named_parameters()}
    first = train_step(trainer, *batches[1], group=1)
    assert set(first) == {"classification", "bbox_regression"} and all(math.isfinite(v) for v in first.values())
    optimizer_step(trainer)
    assert all(torch.equal(p, before[k]) for k, p in trainer.model.named_parameters())
    with pytest.raises(UserError) as error:
        train_step(trainer, *batches[2], group=1)
    assert str(seen[1][0]) in str(error.value) and "step 1 " in str(error.value)


def test_the_last_batch_of_an_epoch_is_looked_at_too(tiny_config):
    trainer = build_trainer(tiny_config)
    trainer.guard.late = True
    poisoned(trainer, 1)
    trainer.model.train()
    train_step(trainer, *next(iter(trainer.train_loader)), group=1)
    with pytest.raises(UserError, match="not finite"):
        trainer.guard.flush()


@pytest.mark.numeric
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_bad_step_is_left_out_whole(tiny_config, caplog, late, accumulate):
    trainer = build_trainer(
        tiny_config.with_overrides(["train.non_finite=skip", f"train.accumulate={accumulate}", "train.ema=0"])
    )
    trainer.guard.late = late
    poisoned(trainer, 2 if accumulate > 1 else 1)
    trainer.model.train()
    before = {k: v.clone() for k, v in trainer.model.state_dict().items() if v.is_floating_point()}
    for images, targets in list(trainer.train_loader)[:accumulate]:
        train_step(trainer, images, targets, group=accumulate)
        trainer.progress.batch += 1
    optimizer_step(trainer)
    trainer.guard.flush()
    after = trainer.model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items()), "weights and the averages of batch norms"
    assert trainer.guard.skipped == 1


@pytest.mark.numeric
def test_skipping_goes_on_to_the_end_and_has_a_limit(tiny_config, tmp_path, monkeypatch):
    plain = DetectionTask.losses
    count = [0]

    def sometimes(task, objective, images, targets):
        count[0] += 1
        losses = plain(task, objective, images, targets)
        return {k: v * math.nan for k, v in losses.items()} if count[0] % 3 == 2 else losses

    monkeypatch.setattr(DetectionTask, "losses", sometimes)
    config = tiny_config.with_overrides(["train.non_finite=skip", "train.max_skipped_steps=2"])
    assert run_training(config)
    content = read_checkpoint(tmp_path / "run" / "last.pt")
    assert content["progress"]["step"] == 4  # of six, two left out
    assert all(torch.isfinite(v).all() for v in content["model"].values())
    with pytest.raises(UserError, match=r"It happened 3 times \(train\.max_skipped_steps\)"):
        run_training(config.with_overrides(["train.epochs=4"]))


# ---- what learns how fast


def test_parameter_groups(tiny_config):
    trainer = build_trainer(tiny_config)
    assert len(parameter_groups(OptimConfig(), trainer.model)) == 1
    spec = OptimConfig(backbone_lr=0.5, layer_decay=0.8, decay_norms=False, weight_decay=0.1)
    groups = parameter_groups(spec, trainer.model)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    found = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(found) == len(list(trainer.model.parameters())) == sum(len(g["params"]) for g in groups)
    assert found["head.classification_head.cls_logits.weight"] == (1.0, 0.1)
    assert found["head.classification_head.cls_logits.bias"] == (1.0, 0.0)
    body = "backbone.body."
    assert found[body + "blocks.8.0.ghost1.primary_conv.0.weight"] == (0.5, 0.1)
    assert found[body + "blocks.8.0.ghost1.primary_conv.1.weight"] == (0.5, 0.0)
    assert found[body + "blocks.6.0.ghost1.primary_conv.0.weight"] == (0.5 * 0.8, 0.1)
    assert found[body + "conv_stem.weight"] == (pytest.approx(0.5 * 0.8**4), 0.1)


def test_the_step_uses_the_scales(tiny_config):
    trainer = build_trainer(tiny_config.with_overrides(["optim.backbone_lr=0.1", "optim.warmup_steps=0"]))
    trainer.model.train()
    train_step(trainer, *next(iter(trainer.train_loader)), group=1)
    optimizer_step(trainer)
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert rates == pytest.approx([0.1 * trainer.current_lr, trainer.current_lr])


@pytest.mark.numeric
def test_one_cycle_is_torchs():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], 1.0)
    steps = 101
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1.0, total_steps=steps, pct_start=0.3, final_div_factor=1e4
    )
    config = OptimConfig(schedule="onecycle", warmup_steps=50)
    for step in range(steps):
        # torch's phases end one step before the share says: total * share - 1.
        assert lr_factor(config, step, step / (steps - 1)) == pytest.approx(scheduler.get_last_lr()[0], abs=0.04)
        optimizer.step()
        scheduler.step()
    assert lr_factor(config, 0, 0.0) == pytest.approx(1 / 25) and lr_factor(config, 9, 0.3) == pytest.approx(1.0)
    assert lr_factor(config, 9, 1.0) == pytest.approx(1 / 25e4)


def test_patience_ends_a_run_that_no_longer_gets_better(tiny_config, tmp_path, monkeypatch):
    def score(task, predictions):
        return {"AP": 0.5 if trainer.progress.epoch == 2 else 0.1, "AP50": 0.6, "AP75": None}

    monkeypatch.setattr(DetectionTask, "score", score)
    trainer = build_trainer(tiny_config.with_overrides(["train.epochs=20", "train.patience=3"]))
    trainer.folder.mkdir()
    assert loop.train(trainer, RunLogger(trainer.folder, 0))
    assert trainer.progress.epoch == 5


def test_the_closing_phase_starts_where_the_config_says(tiny_config):
    trainer = build_trainer(tiny_config.with_overrides(["train.epochs=10", "data.augment.no_mixing_last=0.3"]))
    mixes = []
    for epoch in range(10):
        trainer.progress.epoch, trainer.progress.batch = epoch, 2  # resumed inside the epoch: the same
        trainer.begin_epoch()
        mixes.append(trainer.sampler.mix)
    assert mixes == [True] * 7 + [False] * 3


def test_images_grow_as_the_config_says(tiny_config):
    trainer = build_trainer(tiny_config.with_overrides(["train.epochs=10", "data.progressive=[[0.3, 64], [0.6, 80]]"]))
    sides = []
    for epoch in range(10):
        trainer.progress.epoch, trainer.progress.batch = epoch, 2  # resumed inside the epoch: the same
        trainer.begin_epoch()
        images, _ = next(iterate(trainer.train_loader))
        sides.append({max(image.shape[1:]) for image in images})
    assert sides == [{64}] * 3 + [{80}] * 3 + [{96}] * 4


def test_deterministic_and_compiled_runs_are_accepted(tiny_config, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *a, **k: compiled.append(type(self).__name__))
    try:
        build_trainer(tiny_config.with_overrides(["train.compile=true", "train.deterministic=true"]))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert compiled == ["BackboneWithFPN", "GhostRetinaNetHead"]


# ---- going on with another config


def test_what_may_change_between_stop_and_resume():
    old = {
        "seed": 0,
        "optim": {"lr": 0.1, "name": "sgd"},
        "data": {"batch_size": 4},
        "model": {"backbone": {"weights": "a"}},
    }
    new = {
        "seed": 0,
        "optim": {"lr": 0.2, "name": "sgd"},
        "data": {"batch_size": 8},
        "model": {"backbone": {"weights": None}},
    }
    messages = compare_configs(old, new, in_epoch=False)
    assert messages == ["data.batch_size: 4 -> 8", "model.backbone.weights: 'a' -> None", "optim.lr: 0.1 -> 0.2"]
    with pytest.raises(UserError, match=r"stopped inside an epoch.*data\.batch_size: 4 -> 8"):
        compare_configs(old, new, in_epoch=True)
    with pytest.raises(UserError, match=r"cannot change: optim\.name: 'sgd' -> 'adamw'; seed: 0 -> 1"):
        compare_configs(old, {**new, "seed": 1, "optim": {"lr": 0.1, "name": "adamw"}}, in_epoch=False)


def test_a_resumed_run_says_what_changed_and_refuses_the_rest(tiny_config, tmp_path):
    assert run_training(tiny_config)
    last = (tmp_path / "run" / "last.pt").read_bytes()
    with pytest.raises(UserError, match=r"model\.head_channels: 32 -> 64"):
        run_training(tiny_config.with_overrides(["model.head_channels=64", "train.epochs=3"]), resume=True)
    assert (tmp_path / "run" / "last.pt").read_bytes() == last
    assert run_training(tiny_config.with_overrides(["optim.lr=0.001", "train.epochs=3"]), resume=True)
    log = (tmp_path / "run" / "train.log").read_text()
    assert "changed since the run was stopped: optim.lr: 0.002 -> 0.001" in log


def test_wandb_is_an_extra(tiny_config):
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    with pytest.raises(UserError, match=r"pip install -e '\.\[wandb\]'"):
        run_training(tiny_config.with_overrides(["train.wandb=mine"]))


@pytest.mark.numeric
def test_all_new_keys_stand_in_a_config_of_one_run(tiny_config, tmp_path):
    """Everything together, trained for real."""
    raw = tiny_config.model_dump()
    raw["data"] |= {"multi_scale": [64, 96]}
    raw["data"]["augment"] |= {"mosaic": 0.5, "mixup": 0.3, "copy_paste": 0.3, "no_mixing_last": 0.5}
    raw["optim"] |= {"schedule": "onecycle", "layer_decay": 0.9, "decay_norms": False}
    raw["train"] |= {"cache": "ram", "accumulate": 2, "non_finite": "skip", "patience": 5}
    assert run_training(parse_config(raw, "test"))
    assert (tmp_path / "run" / "best.pt").exists()


# ---- looking at it


def test_a_run_leaves_images_of_what_it_saw_and_found(trained):
    for name in ("train_batch.jpg", "val_detections.jpg"):
        image = cv2.imread(str(trained / name))
        assert image is not None and image.shape[1] > 320
    # Boxes in the colours of their classes lie on the first, not on grey images alone.
    hue = cv2.cvtColor(cv2.imread(str(trained / "train_batch.jpg")), cv2.COLOR_BGR2HSV)
    assert (hue[..., 1] > 200).mean() > 0.005
    # TensorBoard shows the same.
    events = EventAccumulator(str(trained), size_guidance={"images": 0}).Reload()
    for name in ("train_batch", "val_detections"):
        shown = events.Images(name)
        assert len(shown) > 1
        image = cv2.imread(str(trained / f"{name}.jpg"))
        decoded = cv2.imdecode(np.frombuffer(shown[-1].encoded_image_string, np.uint8), cv2.IMREAD_COLOR)
        assert np.array_equal(decoded, image) and (shown[-1].height, shown[-1].width) == image.shape[:2]


def test_images_of_detections_are_drawn_where_they_were_found(tiny_config):
    dataset = build_dataset(tiny_config, "val")
    image_id = int(dataset.annotations.image_ids[0])
    results = [{"image_id": image_id, "category_id": 7, "bbox": [10.0, 20.0, 40.0, 30.0], "score": 0.9}]
    low = [{**results[0], "score": 0.2}]
    plain, none, one = (detections_grid(dataset, r, [3, 7], ["square", "disc"], count=1) for r in ([], low, results))
    assert np.array_equal(plain, none)
    scale = plain.shape[0] / 96
    changed = np.abs(one.astype(int) - plain).max(2) > 60
    rows, columns = np.nonzero(changed)
    assert abs(columns.min() - 10 * scale) < 8 and abs(rows.max() - 50 * scale) < 8


@pytest.mark.slow
def test_profile(tool, tiny_file):
    done = tool("train", tiny_file, "--profile")
    assert done.returncode == 0, done.stderr
    assert "convolution_backward" in done.stdout and "wait for data" in done.stdout
    trace = json.loads((tiny_file.parent / "run" / "trace.json").read_text())
    assert len(trace["traceEvents"]) > 1000
    (tiny_file.parent / "run" / "trace.json").write_text("the user's own")
    assert_clear_error(tool("train", tiny_file, "--profile"), "trace.json", "this toolkit did not write it")


def test_the_largest_batch_is_found_with_few_trials():
    for limit in range(0, 40):
        trials = []
        assert largest_fitting(lambda n, limit=limit, trials=trials: trials.append(n) or n <= limit, most=32) == min(
            limit, 32
        )
        assert len(trials) <= 13 and len(set(trials)) == len(trials)


def test_auto_batch_needs_a_gpu(tiny_config):
    with pytest.raises(UserError, match="--auto-batch measures GPU memory"):
        with_largest_batch(tiny_config)
