"""Training: whole runs, resume, failures."""

import json
import math
import os
import signal

import pytest
import torch

from detection import UserError
from detection.checkpoint import read_checkpoint
from detection.core.outputs import NOTES
from detection.data.dataset import SampleKey
from detection.engine import detection_task, loop
from detection.engine.detection_task import build_trainer
from detection.engine.loop import train, train_step
from detection.engine.run_folder import append_metrics, user_files
from detection.engine.run_logger import RunLogger, start_logging
from detection.engine.signals import StopSignal
from detection.engine.train_detector import dry_run, run_training
from detection.engine.trainer import Trainer


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return read_checkpoint(folder / "last.pt")["model"]


# ---- whole runs


@pytest.mark.numeric
def test_a_run_learns_and_leaves_its_files(trained):
    records = lines(trained)
    assert [r["epoch"] for r in records] == [6, 12, 18, 24]
    for key in ("AP", "AP50", "AP75", "APs", "APm", "APl", "loss", "seconds"):
        assert key in records[-1]
    assert records[-1]["loss"] < 0.7 * records[0]["loss"]
    best = read_checkpoint(trained / "best.pt")
    assert best["numbers"]["AP"] == pytest.approx(max(r["AP"] for r in records)) and best["numbers"]["AP50"] > 0.8
    assert best["classes"] == {"names": ["square", "disc"], "ids": [3, 7]}
    assert {p.name for p in trained.iterdir()} >= {
        "config.yaml",
        "last.pt",
        "best.pt",
        "predictions.json",
        "metrics.jsonl",
        "train.log",
        "previous.pt",
        "train_batch.jpg",
        "val_detections.jpg",
    }
    assert list(trained.glob("events.out.tfevents*"))
    assert [p.name for p in trained.iterdir() if p.name.startswith(".")] == [NOTES] and user_files(trained) == []
    ids = {r["category_id"] for r in json.loads((trained / "predictions.json").read_text())}
    assert ids <= {3, 7} and ids


@pytest.mark.numeric
def test_same_seed_same_weights_other_seed_others(tiny_config, tmp_path):
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = tiny_config.with_overrides([f"output_dir={tmp_path / name}", f"seed={seed}", "train.epochs=1"])
        assert run_training(config)
        found.append(weights(tmp_path / name))
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])
    assert not all(torch.equal(found[0][k], found[2][k]) for k in found[0])


@pytest.mark.numeric
@pytest.mark.parametrize("when", ["mid-epoch", pytest.param("in evaluation", marks=pytest.mark.slow)])
def test_a_stopped_run_resumes_to_the_same_weights(tiny_config, tmp_path, monkeypatch, when):
    whole = tiny_config.with_overrides([f"output_dir={tmp_path / 'whole'}"])
    assert run_training(whole)

    config = tiny_config.with_overrides([f"output_dir={tmp_path / 'parts'}"])
    steps = []
    if when == "mid-epoch":
        step = train_step

        def counted(trainer, *args, **kwargs):
            steps.append(1)
            if len(steps) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(trainer, *args, **kwargs)

        monkeypatch.setattr(loop, "train_step", counted)
        assert not run_training(config)
        assert read_checkpoint(tmp_path / "parts" / "last.pt")["progress"]["batch"] == 2
    else:

        def interrupted(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr(detection_task, "detect_dataset", interrupted)
        assert not run_training(config)
    monkeypatch.undo()
    assert run_training(config, resume=True)

    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(expected[k], found[k]) for k in expected)
    ema = [read_checkpoint(tmp_path / n / "last.pt")["ema"] for n in ("whole", "parts")]
    assert all(torch.equal(ema[0][k], ema[1][k]) for k in ema[0])
    records = lines(tmp_path / "parts")
    assert [r["epoch"] for r in records] == [1, 2]
    assert [r["AP"] for r in records] == [r["AP"] for r in lines(tmp_path / "whole")]


@pytest.mark.numeric
@pytest.mark.slow
def test_resuming_a_finished_run_changes_nothing_and_more_epochs_go_on(tiny_config, tmp_path):
    assert run_training(tiny_config)
    before = weights(tmp_path / "run")
    assert run_training(tiny_config, resume=True)
    after = weights(tmp_path / "run")
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert run_training(tiny_config.with_overrides(["train.epochs=3"]), resume=True)
    assert [r["epoch"] for r in lines(tmp_path / "run")] == [1, 2, 3]


def test_a_killed_run_leaves_no_line_twice(tmp_path):
    for epoch, ap in ((1, 0.1), (2, 0.2), (2, 0.25)):
        append_metrics(tmp_path, {"epoch": epoch, "step": epoch, "AP": ap})
    assert [(r["epoch"], r["AP"]) for r in lines(tmp_path)] == [(1, 0.1), (2, 0.25)]


def test_an_earlier_run_is_moved_aside(tiny_config, tmp_path):
    config = tiny_config.with_overrides(["train.epochs=1"])
    assert run_training(config)
    first = (tmp_path / "run" / "best.pt").read_bytes()
    assert run_training(config)
    assert (tmp_path / "run.old1" / "best.pt").read_bytes() == first
    assert (tmp_path / "run" / "last.pt").exists()


def test_a_failing_start_leaves_the_earlier_run_in_place(tiny_config, tmp_path):
    assert run_training(tiny_config.with_overrides(["train.epochs=1"]))
    with pytest.raises(UserError):
        run_training(tiny_config.with_overrides(["data.val.annotations=nowhere.json"]))
    assert (tmp_path / "run" / "best.pt").exists() and not (tmp_path / "run.old1").exists()


def test_a_time_budget_that_ends_while_saving_still_ends_with_an_evaluation(tiny_config, tmp_path, monkeypatch):
    """Seen once: the epoch ended just inside the budget, the save went past it, and nothing was evaluated."""
    save = Trainer.save

    def slow(self):
        save(self)
        self.progress.seconds += 100

    monkeypatch.setattr(Trainer, "save", slow)
    assert run_training(tiny_config.with_overrides(["train.minutes=1", "train.eval_every=100"]))
    assert len(lines(tmp_path / "run")) == 1 and (tmp_path / "run" / "best.pt").exists()


@pytest.mark.numeric
def test_time_budget(tiny_config, tmp_path):
    assert run_training(tiny_config.with_overrides(["train.minutes=0.05", "train.eval_every=100"]))
    records = lines(tmp_path / "run")
    assert len(records) == 1 and 3 <= records[0]["seconds"] < 30
    lr = read_checkpoint(tmp_path / "run" / "last.pt")["optimizer"]["param_groups"][0]["lr"]
    assert lr < 0.3 * tiny_config.optim.lr


def test_a_signal_in_the_very_step_that_ends_the_budget(tiny_config, tmp_path, monkeypatch):
    """The resumed run was over, but not at the end of an epoch: its last evaluation was left out."""
    step = loop.train_step

    def last(trainer, *args, **kwargs):
        trainer.progress.seconds += 100
        os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *args, **kwargs)

    monkeypatch.setattr(loop, "train_step", last)
    config = tiny_config.with_overrides(["train.minutes=1", "train.eval_every=100"])
    assert not run_training(config)
    monkeypatch.undo()
    assert run_training(config, resume=True)
    assert len(lines(tmp_path / "run")) == 1 and (tmp_path / "run" / "best.pt").exists()


@pytest.mark.numeric
def test_accumulated_gradients_equal_those_of_one_batch(tiny_config):
    """With batch norm out of play, two batches of 2 add up to the mean of their losses."""
    trainer = build_trainer(tiny_config)
    for module in trainer.model.modules():
        module.training = module is trainer.model
    # Images of one shape, so that padding is the same in both.
    samples = [trainer.train_loader.dataset.load(SampleKey(0, i)) for i in (0, 3, 6, 9)]
    images, targets = [image for image, _ in samples], [target for _, target in samples]
    assert len({image.shape for image in images}) == 1
    train_step(trainer, images, targets, group=1)
    whole = {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
    trainer.optimizer.zero_grad()
    for half in (slice(0, 2), slice(2, 4)):
        train_step(trainer, images[half], targets[half], group=2)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-3, atol=1e-5)


def test_accumulation_steps_also_at_the_end_of_an_epoch(tiny_config, tmp_path):
    assert run_training(tiny_config.with_overrides(["train.accumulate=2", "train.epochs=1"]))  # 3 batches: 2 + 1
    assert read_checkpoint(tmp_path / "run" / "last.pt")["progress"]["step"] == 2


@pytest.mark.numeric
@pytest.mark.parametrize(
    "overrides",
    [
        ["train.amp=bf16"],
        ["optim.name=sgd", "optim.lr=0.01", "optim.clip_grad_norm=1", "train.ema=0"],
        ["train.channels_last=false", "data.workers=2", "train.accumulate=3"],
        pytest.param(["model.detector=faster_rcnn", "eval.score_threshold=0.05"], marks=pytest.mark.slow),
        # On a CPU without bf16 it takes half a minute.
        pytest.param(
            ["model.detector=faster_rcnn", "eval.score_threshold=0.05", "train.amp=bf16"], marks=pytest.mark.slow
        ),
    ],
)
def test_options_run(tiny_config, overrides):
    config = tiny_config.with_overrides(["train.epochs=1", *overrides])
    assert run_training(config)
    assert math.isfinite(lines(build_trainer(config).folder)[0]["loss"])


@pytest.mark.numeric
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_options_run_on_a_gpu(tiny_config, amp):
    assert run_training(tiny_config.with_overrides(["device=cuda", f"train.amp={amp}"]))


def test_dry_run_shows_and_writes_nothing(tiny_config, tmp_path):
    text = dry_run(tiny_config)
    for word in ("train batch", "4 images", "losses", "val batch", "peak memory", "expected time"):
        assert word in text
    assert not (tmp_path / "run").exists()


def test_from_scratch_is_said_once_and_frozen_stages_are_ignored_aloud(tiny_config, capsys):
    start_logging()
    trainer = build_trainer(tiny_config.with_overrides(["model.backbone.frozen_stages=1"]))
    out = capsys.readouterr().out
    assert out.count("TRAINING FROM SCRATCH") == 1 and "frozen_stages is ignored" in out
    assert all(p.requires_grad for p in trainer.model.parameters())


@pytest.mark.numeric
def test_pretrained_backbone_is_loaded_and_frozen_in_a_run(tiny_config, tmp_path):
    from backbones import GhostNet

    published = GhostNet(0.5).state_dict()
    torch.save(published, tmp_path / "w.pth")
    overrides = [f"model.backbone.weights={tmp_path / 'w.pth'}", "model.backbone.frozen_stages=4", "train.epochs=1"]
    assert run_training(tiny_config.with_overrides(overrides))
    trained = weights(tmp_path / "run")
    own = [k for k in trained if k.startswith("backbone.body.")]
    assert len(own) > 300
    assert all(torch.equal(trained[k], published[k.removeprefix("backbone.body.")]) for k in own)
    # Without the weights nothing would be frozen, and the optimizer's state would not fit.
    with pytest.raises(
        UserError, match=r"frozen .*: 4 stages -> 0 stages .*model\.backbone\.weights=.*w\.pth; give it"
    ):
        run_training(tiny_config.with_overrides(["model.backbone.frozen_stages=4"]), resume=True)


# ---- what goes wrong


@pytest.mark.numeric
def test_non_finite_loss_stops_before_the_weights_and_names_the_images(tiny_config):
    trainer = build_trainer(tiny_config)
    images, targets = next(iter(trainer.train_loader))
    before = {k: v.clone() for k, v in trainer.model.state_dict().items() if "running" not in k and "num_b" not in k}
    targets[2]["boxes"] = torch.tensor([[1.0, 1.0, float("nan"), 20.0]])
    targets[2]["labels"] = torch.tensor([1])
    with pytest.raises(UserError) as error:
        train_step(trainer, images, targets, group=1)
    for word in ("not finite", "bbox_regression nan", str(targets[2]["image_id"]), "optim.lr"):
        assert word in str(error.value)
    assert all(p.grad is None for p in trainer.model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items() if k in before)


def test_no_ground_truth_in_val_never_wins_best(tiny_config, tmp_path, coco_set):
    content = json.loads((coco_set / "annotations.json").read_text())
    empty = coco_set / "empty.json"
    empty.write_text(json.dumps({**content, "annotations": []}))
    assert run_training(tiny_config.with_overrides([f"data.val.annotations={empty}", "train.epochs=1"]))
    assert lines(tmp_path / "run")[0]["AP"] is None
    assert read_checkpoint(tmp_path / "run" / "last.pt")["progress"]["best"] is None
    assert (tmp_path / "run" / "best.pt").exists()


def test_resume_refuses_another_model_and_other_classes(tiny_config, coco_set):
    config = tiny_config.with_overrides(["train.epochs=1"])
    assert run_training(config)
    with pytest.raises(
        UserError, match=r"cannot change: model\.backbone\.width: 0\.5 -> 1\.0; model\.fpn_channels: 32 -> 48"
    ):
        run_training(config.with_overrides(["model.fpn_channels=48", "model.backbone.width=1.0"]), resume=True)
    content = json.loads((coco_set / "annotations.json").read_text())
    content["categories"][0]["name"] = "renamed"
    (coco_set / "annotations.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="trained on other classes: square, disc"):
        run_training(config, resume=True)


def test_resume_without_a_run(tiny_config):
    with pytest.raises(UserError, match=r"there is no .*last\.pt to go on from"):
        run_training(tiny_config, resume=True)


def test_cuda_where_there_is_none(tiny_config):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(UserError, match="no CUDA; use device=auto or cpu"):
        build_trainer(tiny_config.with_overrides(["device=cuda"]))


def test_a_second_signal_acts_at_once():
    # Not always Python's own: a shell starts background jobs with SIGINT ignored.
    before = signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), stop.interruptible():
            pass
    with StopSignal() as stop, pytest.raises(KeyboardInterrupt), stop.interruptible():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is before


def test_train_is_what_the_run_calls(tiny_config, tmp_path):
    """The loop alone, on a run built by hand, as in the README's Python example."""
    trainer = build_trainer(tiny_config.with_overrides(["train.epochs=1"]))
    trainer.folder.mkdir()
    logger = RunLogger(trainer.folder, 0)
    assert train(trainer, logger)
    logger.close()
    assert trainer.progress.epoch == 1 and trainer.progress.step == 3
