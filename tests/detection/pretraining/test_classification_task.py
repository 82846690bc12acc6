"""Pre-training: class folders and CIFAR-10, whole runs, resume, teachers, and the way into a detector."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from class_folders import CLASSES, assert_same, last, lines, tiny
from conftest import ROOT, assert_clear_error, run_seed
from torch.nn import functional as F

from backbones import NAMES, GhostNet, build_backbone, load_weights, read_weights
from backbones.classifier import backbone_state, build_classifier, normalize
from detection import UserError
from detection.checkpoint import read_checkpoint, save_checkpoint
from detection.config_io import parse_config, read_config
from detection.engine import loop
from detection.engine.loop import train_step
from detection.engine.resume import load_checkpoint
from detection.engine.run_folder import user_files
from detection.models.build import build_model
from detection.pretraining.classification_config import ClassificationConfig
from detection.pretraining.classification_task import FORMAT, build_trainer, dry_run, measure_accuracy, run_pretraining

# ---- whole runs, and what they are for


@pytest.mark.numeric
def test_a_run_learns_and_leaves_its_files(pretrained):
    records = lines(pretrained)
    assert [r["epoch"] for r in records] == list(range(1, 19))
    assert {"top1", "top5", "val_loss", "loss", "seconds", "step"} <= set(records[-1])
    assert records[-1]["loss"] < 0.6 * records[0]["loss"]
    best = read_checkpoint(pretrained / "best.pt", FORMAT)
    assert best["numbers"]["top1"] == max(r["top1"] for r in records) > 0.6  # chance is 0.33
    assert records[-1]["top5"] == 1  # of three classes
    assert tuple(best["classes"]["names"]) == CLASSES
    files = {p.name for p in pretrained.iterdir()}
    assert files >= {"config.yaml", "last.pt", "best.pt", "backbone.pth", "metrics.jsonl", "train.log"}
    assert list(pretrained.glob("events.out.tfevents*")) and not [name for name in files if name.startswith(".")]
    assert user_files(pretrained) == []
    assert read_config(ClassificationConfig, pretrained / "config.yaml").output_dir == str(pretrained)


@pytest.mark.parametrize("file", ["backbone.pth", "best.pt"])
def test_the_result_loads_into_a_detector(pretrained, file, caplog):
    """By the key that a user sets; every tensor of the detector's backbone comes out of the file."""
    raw = {
        "output_dir": "x",
        "model": {"backbone": {"name": "ghostnet", "width": 0.5, "weights": str(pretrained / file)}},
        "data": {split: {"images": "i", "annotations": "a"} for split in ("train", "val")},
    }
    import logging

    logging.getLogger("backbones").propagate = True
    with caplog.at_level("INFO", "backbones"):
        detector = build_model(parse_config(raw, "test"), 2)
    own = {k.removeprefix("backbone.body."): v for k, v in detector.state_dict().items() if ".body." in k}
    counts = f"{len(own)} matched, 0 missing, 0 unexpected, 0 shape-mismatched"
    assert counts in caplog.text
    state, _ = read_weights(pretrained / "best.pt", "ghostnet", 0.5)
    assert_same(own, {key: state[key] for key in own})


@pytest.mark.numeric
@pytest.mark.parametrize("name", NAMES)
def test_every_backbone_key_of_a_classifier_is_what_the_backbone_loads(name):
    model = build_classifier(name, num_classes=4)
    backbone = build_backbone(name)
    report = load_weights(backbone, backbone_state(model), "test")
    assert len(report.matched) == len(backbone.state_dict())
    assert not (report.missing or report.unexpected or report.mismatched or report.classifier)
    assert model.eval()(torch.zeros(2, 3, 64, 64)).shape == (2, 4)
    # Its mean and std go with it.
    images = torch.rand(1, 3, 8, 8)
    expected = (images - torch.tensor(backbone.mean)[:, None, None]) / torch.tensor(backbone.std)[:, None, None]
    torch.testing.assert_close(normalize(images, model), expected)


@pytest.mark.numeric
def test_weights_to_start_from(tmp_path):
    """The published head stays where the classes are as many, and starts anew where they are not."""
    published = GhostNet(0.5, num_classes=6)
    torch.save(published.state_dict(), tmp_path / "w.pth")
    same = build_classifier("ghostnet", num_classes=6, width=0.5, weights=str(tmp_path / "w.pth"))
    assert_same(dict(same.state_dict()), dict(published.state_dict()))
    other = build_classifier("ghostnet", num_classes=5, width=0.5, weights=str(tmp_path / "w.pth"))
    assert_same(backbone_state(other), backbone_state(published))
    assert other.classifier.weight.shape == (5, 1280)
    torch.save(backbone_state(published), tmp_path / "body.pth")
    other = build_classifier("ghostnet", num_classes=5, width=0.5, weights=str(tmp_path / "body.pth"))
    assert_same(backbone_state(other), backbone_state(published))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "ghostnte", "num_classes": 3}, "did you mean 'ghostnet'"),
        ({"name": "ghostnet", "num_classes": 1}, "at least two classes"),
        ({"name": "ghostnet", "num_classes": 3, "ratio": 2}, "no ratio and kernel_size to set"),
        ({"name": "ghost_vgg16", "num_classes": 3, "width": 0.5}, "has only width 1"),
    ],
)
def test_classifier_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_classifier(**arguments)


# ---- stopping and going on


@pytest.mark.numeric
@pytest.mark.slow  # the engine is that of the detectors, whose test of it is not
@pytest.mark.parametrize("how", ["signal in the middle of an epoch", "crash"])
def test_a_stopped_run_resumes_to_the_same_weights(folders, tmp_path, monkeypatch, how):
    """With everything that draws random numbers: dropout, augmentation, mixing; and a teacher's regressors."""
    torch.manual_seed(run_seed(5))
    torch.save(GhostNet(0.5, num_classes=3).state_dict(), tmp_path / "teacher.pth")
    options = [
        "data.augment.mixup=0.2",
        "data.augment.cutmix=1.0",
        "data.batch_size=6",
        "train.accumulate=2",
        f"teacher={{name: ghostnet, width: 0.5, weights: {tmp_path / 'teacher.pth'}, features: 1}}",
    ]
    assert run_pretraining(tiny(folders, tmp_path / "whole", *options))

    config = tiny(folders, tmp_path / "parts", *options)
    steps = []
    step = train_step

    def disturbed(trainer, *args, **kwargs):
        steps.append(1)
        if how == "crash" and len(steps) == 6:  # in the second epoch, after which nothing was saved
            raise RuntimeError("crash")
        if how != "crash" and len(steps) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *args, **kwargs)

    monkeypatch.setattr(loop, "train_step", disturbed)
    if how == "crash":
        with pytest.raises(RuntimeError, match="crash"):
            run_pretraining(config)
        assert last(tmp_path / "parts")["progress"]["epoch"] == 1
    else:
        assert not run_pretraining(config)
        assert last(tmp_path / "parts")["progress"]["batch"] == 2
    monkeypatch.undo()
    assert run_pretraining(config, resume=True)

    expected, found = last(tmp_path / "whole"), last(tmp_path / "parts")
    assert any(key.startswith("regressors.c4.") for key in expected["model"])
    assert_same(expected["model"], found["model"])
    assert_same(expected["ema"], found["ema"])
    numbers = [[{k: v for k, v in r.items() if k not in ("seconds", "loss")} for r in lines(tmp_path / n)]
               for n in ("whole", "parts")]  # fmt: skip
    assert numbers[0] == numbers[1] and len(numbers[0]) == 2


@pytest.mark.slow
def test_an_earlier_run_is_moved_aside_and_time_budgets_hold(folders, tmp_path):
    config = tiny(folders, tmp_path / "run", "train.minutes=0.03", "train.eval_every=100")
    assert run_pretraining(config)
    assert len(lines(tmp_path / "run")) == 1
    first = (tmp_path / "run" / "best.pt").read_bytes()
    assert run_pretraining(config)
    assert (tmp_path / "run.old1" / "best.pt").read_bytes() == first


def test_resume_refuses_other_classes_and_other_networks(folders, tmp_path):
    config = tiny(folders, tmp_path / "run", "train.epochs=1")
    assert run_pretraining(config)
    with pytest.raises(UserError, match=r"these keys cannot change: model\.width: 0\.5 -> 1\.0"):
        run_pretraining(config.with_overrides(["model.width=1"]), resume=True)
    for split in ("train", "val"):
        (folders / split / "plain").rename(folders / split / "plane")
    with pytest.raises(UserError, match="trained on other classes: disc, plain, stripes"):
        run_pretraining(config, resume=True)
    save_checkpoint(tmp_path / "run" / "last.pt", {"model": {}})  # a detector's
    with pytest.raises(UserError, match=r"not a checkpoint.*ghostnet-classification"):
        run_pretraining(config, resume=True)


@pytest.mark.numeric
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["train.amp=bf16", "train.channels_last=false", "data.augment.erasing=1"], marks=pytest.mark.slow),
        ["optim.name=sgd", "optim.decay_norms=false", "train.ema=0", "data.workers=2", "data.augment.rand_augment=2"],
        pytest.param(
            ["model.name=mobilenet_v3_large", "data.augment.random_resized_crop=null", "data.augment.pad_crop=4"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["model.name=ghost_resnet56", "model.width=1", "model.ratio=4", "train.epochs=1"], marks=pytest.mark.slow
        ),
    ],
)
def test_options_run(folders, tmp_path, options):
    assert run_pretraining(tiny(folders, tmp_path / "run", "train.epochs=1", *options))
    assert np.isfinite(lines(tmp_path / "run")[0]["loss"])


def test_norms_and_biases_are_spared_weight_decay(folders, tmp_path):
    trainer = build_trainer(tiny(folders, tmp_path / "run", "optim.decay_norms=false", "optim.weight_decay=0.3"))
    decays = {p.ndim > 1: group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert decays == {True: 0.3, False: 0.0}
    assert sum(len(g["params"]) for g in trainer.optimizer.param_groups) == len(list(trainer.model.parameters()))


def test_dry_run_shows_and_writes_nothing(folders, tmp_path):
    text = dry_run(tiny(folders, tmp_path / "run"))
    for word in (
        "classifier ghostnet 0.5, 3 classes",
        "0.65 M of them in the backbone",
        "train batch",
        "expected time",
    ):
        assert word in text
    assert not (tmp_path / "run").exists()


@pytest.mark.numeric
def test_accuracy_is_the_share_of_right_guesses(folders, tmp_path):
    trainer = build_trainer(tiny(folders, tmp_path / "run", "data.batch_size=5"))
    data = trainer.task.val_loader.dataset
    samples = [data.load(0, i) for i in range(len(data))]
    images = torch.stack([image for image, _ in samples]) / 255
    labels = torch.tensor([target["label"] for _, target in samples])
    trainer.model.eval()
    with torch.no_grad():
        logits = trainer.model(normalize(images, trainer.model))
    numbers = measure_accuracy(trainer.model, trainer.task.val_loader, trainer.device)
    assert numbers["top1"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert numbers["val_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)


# ---- the tool


@pytest.fixture()
def config_file(folders, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny(folders, tmp_path / "run").model_dump()))
    return path


@pytest.mark.slow
def test_pretrain_and_resume(tool, config_file, folders, tmp_path):
    done = tool("pretrain", config_file, "train.epochs=1", "data.workers=1")
    assert done.returncode == 0 and "backbone.pth" in done.stdout, done.stdout + done.stderr
    done = tool("pretrain", config_file, "--resume")
    assert done.returncode == 0 and "resumed after epoch 1" in done.stdout, done.stderr
    assert [r["epoch"] for r in lines(tmp_path / "run")] == [1, 2]
    # An image that only a worker meets, and a misspelt key.
    (folders / "train" / "disc" / "2.jpg").write_bytes(b"hello")
    assert_clear_error(
        tool("pretrain", config_file, "--resume", "train.epochs=3", "data.workers=1"), "2.jpg cannot be read"
    )
    assert_clear_error(tool("pretrain", config_file, "optim.lrr=1"), "did you mean 'optim.lr'")


@pytest.mark.numeric
@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_weights(config_file, tool, tmp_path):
    """SIGKILL, as the kernel does it when memory is short."""
    options = ["train.epochs=6", "data.workers=1"]
    done = tool("pretrain", config_file, *options, f"output_dir={tmp_path / 'whole'}")
    assert done.returncode == 0, done.stderr
    command = [sys.executable, str(ROOT / "tools" / "pretrain.py"), str(config_file), *options]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "last.pt").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    done = tool("pretrain", config_file, *options, "--resume")
    assert done.returncode == 0, done.stderr
    assert_same(last(tmp_path / "whole")["model"], last(tmp_path / "run")["model"])
    assert_same(last(tmp_path / "whole")["ema"], last(tmp_path / "run")["ema"])


# ---- several processes

WORKER = """
import sys, torch
from detection.core import distributed
from detection.config_io import read_config
from detection.pretraining.classification_config import ClassificationConfig
from detection.pretraining.classification_task import build_trainer, run_pretraining
from detection.engine.loop import train, train_step
from detection.engine.run_logger import RunLogger

path, out = sys.argv[1:]
config = read_config(ClassificationConfig, path)
with distributed.session("cpu") as device:
    # Gradients of two half batches are those of the whole one. Batch norm, which sees its half alone, is out of play.
    trainer = build_trainer(config.with_overrides(["model.dropout=0"]), device)
    trainer.model.eval()
    images, targets = next(iter(trainer.train_loader))
    train_step(trainer, images, targets, group=1)
    grads = {n: p.grad for n, p in trainer.model.named_parameters()}
    assert distributed.gather(distributed.rank()) == [0, 1]
    assert distributed.reduce_max([distributed.rank() + 0.5]) == [1.5] and distributed.reduce_sum([1, 2]) == [2, 4]
    if distributed.is_main():
        torch.save({"grads": grads}, out + "/grads.pt")
    assert run_pretraining(config)
    assert run_pretraining(config.with_overrides(["train.epochs=3"]), resume=True)
    # All processes hold the same weights after a training, and saw other images.
    trainer = build_trainer(config.with_overrides(["train.epochs=1", f"output_dir={out}/again"]), device)
    trainer.folder.mkdir(exist_ok=True)
    assert train(trainer, RunLogger(trainer.folder, 0))
    for state in (trainer.model.state_dict(), trainer.eval_model.state_dict()):
        states = distributed.gather({k: v.double().sum().item() for k, v in state.items()})
        assert states[0] == states[1]
    names = distributed.gather([target["name"] for _, targets in trainer.train_loader for target in targets])
    assert len(set(names[0] + names[1])) == 24 == 2 * len(names[0])
"""


@pytest.mark.numeric
@pytest.mark.slow
def test_two_processes(folders, tmp_path):
    """Under torchrun, with gloo: the gradients of one process with the same batch, each image evaluated once."""
    config = tiny(folders, tmp_path / "run", "data.batch_size=4", "data.augment.brightness=0")
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(config.model_dump()))
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "worker.py"), str(tmp_path / "two.yaml"), str(tmp_path)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert [r["epoch"] for r in lines(tmp_path / "run")] == [1, 2, 3]
    assert lines(tmp_path / "run")[-1]["step"] == 9  # 24 images, 8 a step
    assert done.stdout.count("best top-1") == 2  # two runs, one process that talks
    assert len(last(tmp_path / "run")["rng"]) == 2

    whole = build_trainer(config.with_overrides(["data.batch_size=8", "model.dropout=0"]))
    whole.model.eval()
    images, targets = next(iter(whole.train_loader))
    train_step(whole, images, targets, group=1)
    grads = torch.load(tmp_path / "grads.pt", weights_only=True)["grads"]
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-3, atol=1e-5)

    # The evaluation of two processes is that of one.
    trainer = build_trainer(config)
    load_checkpoint(trainer, tmp_path / "run" / "last.pt")
    numbers = measure_accuracy(trainer.eval_model, trainer.task.val_loader, trainer.device, channels_last=True)
    record = lines(tmp_path / "run")[-1]
    assert {k: record[k] for k in numbers} == pytest.approx(numbers, rel=1e-4)
