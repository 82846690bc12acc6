"""Pre-training: class folders and CIFAR-10, whole runs, resume, teachers, and the way into a detector."""

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import yaml
from conftest import ROOT, assert_clear_error, write_coco
from PIL import Image
from torch.nn import functional as F

from backbones import NAMES, GhostNet, build_backbone, load_weights, read_weights
from backbones.classifier import backbone_state, build_classifier, normalize
from detection import UserError
from detection.checkpoint import read_checkpoint, save_checkpoint
from detection.config import check, parse_config, read_config, valid_keys
from detection.data.crops import make_crops, square_around
from detection.data.index import read_coco
from detection.models import build_model
from detection.pretraining.config import PretrainConfig, TeacherConfig
from detection.pretraining.data import batch_mixing, build_datasets
from detection.pretraining.objective import Objective, soft_answer_loss, unexplained
from detection.pretraining.run import FORMAT, build_run, dry_run, measure_accuracy, run_pretraining
from detection.pretraining.teacher import Teacher, build_teacher, find_taps, logits_and_maps
from detection.training import loop
from detection.training.loop import train_step

RECIPES = sorted((ROOT / "configs" / "pretrain").glob("*.yaml"))
CLASSES = ("disc", "plain", "stripes")


def draw(kind: str, rng: np.random.Generator) -> Image.Image:
    """A 40x36 picture that even a tiny network can tell."""
    picture = rng.integers(60, 120, (36, 40, 3), dtype=np.uint8)
    if kind == "disc":
        y, x = np.ogrid[:36, :40]
        picture[(y - 18) ** 2 + (x - 20) ** 2 < 120] = (230, 40, 40)
    elif kind == "stripes":
        picture[:, ::8] = picture[:, 1::8] = picture[:, 2::8] = (40, 40, 240)
    return Image.fromarray(picture)


def write_folders(root: Path, train: int = 8, val: int = 4) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for kind in CLASSES:
            folder = root / split / kind
            folder.mkdir(parents=True)
            for i in range(count):
                draw(kind, rng).save(folder / f"{i}.jpg", quality=95)
    return root


@pytest.fixture()
def folders(tmp_path):
    return write_folders(tmp_path / "pictures")


def tiny(folders: Path, out: Path, *overrides: str) -> PretrainConfig:
    """GhostNet 0.5 at 32 px: 3 steps an epoch."""
    raw = {
        "output_dir": str(out),
        "device": "cpu",
        "model": {"name": "ghostnet", "width": 0.5},
        "data": {
            "train": str(folders / "train"),
            "val": str(folders / "val"),
            "size": 32,
            "val_crop": 1.0,
            "batch_size": 8,
            "workers": 0,
            "augment": {"random_resized_crop": [0.5, 1.0], "brightness": 0.1},
        },
        "optim": {"name": "adamw", "lr": 0.003, "lr_batch": None, "schedule": "cosine", "warmup_steps": 2},
        "train": {"epochs": 2, "ema": 0.9},
    }
    return check(PretrainConfig, raw, "test").with_overrides(overrides)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def last(folder):
    return read_checkpoint(folder / "last.pt", FORMAT)


def assert_same(a: dict, b: dict) -> None:
    assert list(a) == list(b)
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different, different[:3]


# ---- whole runs, and what they are for


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """The folder of a finished run; not to be changed."""
    root = tmp_path_factory.mktemp("pretrained")
    folders = write_folders(root / "pictures")
    assert run_pretraining(tiny(folders, root / "run", "train.epochs=18", "train.ema=0", "train.label_smoothing=0"))
    return root / "run"


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
    assert read_config(PretrainConfig, pretrained / "config.yaml").output_dir == str(pretrained)


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
        ({"name": "ghostnet", "num_classes": 3, "ratio": 2}, "no choice of ratio"),
        ({"name": "ghost_vgg16", "num_classes": 3, "width": 0.5}, "width 1 alone"),
    ],
)
def test_classifier_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_classifier(**arguments)


# ---- stopping and going on


@pytest.mark.parametrize("how", ["signal in the middle of an epoch", pytest.param("crash", marks=pytest.mark.slow)])
def test_a_stopped_run_resumes_to_the_same_weights(folders, tmp_path, monkeypatch, how):
    """With everything that draws random numbers: dropout, augmentation, mixing; and a teacher's regressors."""
    torch.manual_seed(5)
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

    def disturbed(run, *args, **kwargs):
        steps.append(1)
        if how == "crash" and len(steps) == 6:  # in the second epoch, after which nothing was saved
            raise MemoryError
        if how != "crash" and len(steps) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(run, *args, **kwargs)

    monkeypatch.setattr(loop, "train_step", disturbed)
    if how == "crash":
        with pytest.raises(MemoryError):
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


@pytest.mark.parametrize(
    "options",
    [
        ["train.amp=bf16", "train.channels_last=false", "data.augment.erasing=1"],
        ["optim.name=sgd", "optim.decay_norms=false", "train.ema=0", "data.workers=2", "data.augment.rand_augment=2"],
        ["model.name=mobilenet_v3_large", "data.augment.random_resized_crop=null", "data.augment.pad_crop=4"],
        pytest.param(
            ["model.name=ghost_resnet56", "model.width=1", "model.ratio=4", "train.epochs=1"], marks=pytest.mark.slow
        ),
    ],
)
def test_options_run(folders, tmp_path, options):
    assert run_pretraining(tiny(folders, tmp_path / "run", "train.epochs=1", *options))
    assert np.isfinite(lines(tmp_path / "run")[0]["loss"])


def test_norms_and_biases_are_spared_weight_decay(folders, tmp_path):
    run = build_run(tiny(folders, tmp_path / "run", "optim.decay_norms=false", "optim.weight_decay=0.3"))
    decays = {p.ndim > 1: group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
    assert decays == {True: 0.3, False: 0.0}
    assert sum(len(g["params"]) for g in run.optimizer.param_groups) == len(list(run.model.parameters()))


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


def test_accuracy_is_the_share_of_right_guesses(folders, tmp_path):
    run = build_run(tiny(folders, tmp_path / "run", "data.batch_size=5"))
    data = run.val_loader.dataset
    samples = [data.load(0, i) for i in range(len(data))]
    images = torch.stack([image for image, _ in samples]) / 255
    labels = torch.tensor([target["label"] for _, target in samples])
    run.model.eval()
    with torch.no_grad():
        logits = run.model(normalize(images, run.model))
    numbers = measure_accuracy(run.model, run.val_loader, run.device)
    assert numbers["top1"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert numbers["val_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)


# ---- data


def test_samples_depend_on_seed_epoch_and_index_alone(folders, tmp_path):
    train, val = build_datasets(tiny(folders, tmp_path / "run"))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, target = train.load(3, 10)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(train.load(3, 10)[0], first) and not torch.equal(train.load(4, 10)[0], first)
    assert first.dtype == torch.uint8 and first.shape == (3, 32, 32)
    assert CLASSES[target["label"]] in target["name"] and Path(target["name"]).is_file()
    assert torch.equal(val.load(0, 2)[0], val.load(5, 2)[0])


def test_mixed_labels_are_shares(folders, tmp_path):
    config = tiny(folders, tmp_path / "run", "data.augment.mixup=1")
    mixing = batch_mixing(config.data.augment, 3)
    images, labels = mixing(torch.rand(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2]))
    assert labels.shape == (6, 3) and torch.allclose(labels.sum(1), torch.ones(6)) and images.shape == (6, 3, 8, 8)


def test_cifar10_in_its_published_format(tmp_path, monkeypatch):
    """A small one; torchvision's check of the files' sums is told theirs, and is at work."""
    root = tmp_path / "cifar"
    base = root / "cifar-10-batches-py"
    base.mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

    def write(file, content):
        (base / file).write_bytes(pickle.dumps(content))
        return [file, hashlib.md5((base / file).read_bytes()).hexdigest()]

    def batch(count):
        data = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        return {"data": data, "labels": [i % 10 for i in range(count)]}

    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "train_list", [write(f"data_batch_{i}", batch(10)) for i in range(1, 6)])
    monkeypatch.setattr(cifar, "test_list", [write("test_batch", batch(20))])
    meta = write("batches.meta", {"label_names": names})
    monkeypatch.setattr(cifar, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    recipe = read_config(
        PretrainConfig,
        ROOT / "configs/pretrain/ghost_vgg16_cifar10.yaml",
        [
            f"data.train={root}",
            f"data.val={root}",
            "data.workers=0",
            "data.batch_size=25",
            "train.epochs=1",
            "device=cpu",
        ],
    ).with_overrides([f"output_dir={tmp_path / 'run'}"])
    assert run_pretraining(recipe)
    record = lines(tmp_path / "run")[0]
    assert record["step"] == 2 and 0 <= record["top1"] <= record["top5"] <= 1
    assert last(tmp_path / "run")["classes"]["names"] == names
    (base / "data_batch_3").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"data\.train: .* holds no whole CIFAR-10: expected is .*cifar-10-batches-py"):
        build_datasets(recipe)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f / "val"), r"data\.val: folder .*val does not exist"),
        (lambda f: [shutil.rmtree(f / "val" / c) for c in CLASSES], r"data\.val: .* has no class folders; expected"),
        (lambda f: [p.unlink() for p in f.glob("train/*/*")], r"data\.train: no images in the 3 class folders"),
        (lambda f: [p.unlink() for p in f.glob("val/plain/*")], r"1 of the 3 class folders of .*hold no image: plain"),
        (lambda f: shutil.rmtree(f / "val" / "plain"), r"different class folders: plain only in .*train"),
        (lambda f: shutil.copytree(f / "val/disc", f / "val/extra"), r"different class folders: extra only in .*val"),
        (
            lambda f: [shutil.rmtree(f / s / c) for s in ("train", "val") for c in CLASSES[1:]],
            r"one class alone \(disc\)",
        ),
        (lambda f: (f / "train/disc/2.jpg").write_bytes(b"hello"), r"image .*disc/2\.jpg cannot be read: "),
        (
            lambda f: (f / "train/disc/2.jpg").write_bytes((f / "train/disc/2.jpg").read_bytes()[:400]),
            r"image .*disc/2\.jpg cannot be read: .*[Tt]runcated",
        ),
    ],
)
def test_data_mistakes_are_named(folders, tmp_path, damage, message):
    damage(folders)
    with pytest.raises(UserError, match=message):
        run_pretraining(tiny(folders, tmp_path / "run", "data.batch_size=24"))


def test_a_loss_that_is_not_finite_names_the_pictures(folders, tmp_path):
    run = build_run(tiny(folders, tmp_path / "run"))
    with torch.no_grad():
        run.model.classifier.bias.fill_(float("nan"))
    images, targets = next(iter(run.train_loader))
    with pytest.raises(UserError, match=r"not finite at epoch 1.*label nan.*images .*\.jpg, … *\."):
        train_step(run, images, targets, group=1)


# ---- teachers


def teacher_config(**values) -> TeacherConfig:
    return TeacherConfig(**{"name": "ghostnet", "width": 0.5, "weights": "w.pth", **values})


def test_a_teacher_is_frozen_and_sees_its_own_mean_and_std(tmp_path):
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=3)
    network.mean, network.std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    teacher = Teacher(network.train(), find_taps(network))
    images = torch.rand(2, 3, 64, 64)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    lesson = teacher(images)
    assert not network.training and not lesson.logits.requires_grad
    assert_same(before, dict(network.state_dict()))
    x = (images - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.5, 0.6, 0.7])[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(lesson.logits, network(x))


def test_taps_are_the_last_maps_of_their_strides():
    taps = find_taps(torchvision.models.resnet50())
    assert {level: (tap.module, tap.channels) for level, tap in taps.items()} == {
        "c3": ("layer2", 512),
        "c4": ("layer3", 1024),
        "c5": ("layer4", 2048),
    }
    network = GhostNet(0.5, num_classes=3).eval()
    taps = find_taps(network)
    assert not any(module._forward_hooks for module in network.modules())
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        logits, maps = logits_and_maps(network, images, taps)
        features = network.extract(images)
        torch.testing.assert_close(logits, network(images))
    for level in ("c3", "c4", "c5"):
        torch.testing.assert_close(maps[level], features[level])


def test_what_is_learned_from_a_teacher():
    logits = torch.randn(4, 5)
    assert soft_answer_loss(logits, logits, 3.0).item() == pytest.approx(0, abs=1e-6)
    # By hand: KL divergence of softened answers, times T².
    other = torch.randn(4, 5)
    p, q = (F.softmax(x / 2, 1) for x in (other, logits))
    assert soft_answer_loss(logits, other, 2.0).item() == pytest.approx(
        4 * (p * (p / q).log()).sum(1).mean().item(), rel=1e-4
    )
    maps = torch.randn(2, 3, 4, 4)
    assert unexplained(maps, maps).item() == 0 and unexplained(0 * maps, 7 * maps).item() == pytest.approx(1)
    assert unexplained(torch.zeros(2, 3, 3, 3), maps).item() == pytest.approx(1)


def test_a_student_comes_near_its_teacher(folders, tmp_path):
    """Labels aside: the error on the teacher's maps and answers falls, and gradients reach the student by both."""
    torch.manual_seed(1)
    teacher_network = GhostNet(0.5, num_classes=3)
    torch.save(teacher_network.state_dict(), tmp_path / "t.pth")
    option = f"teacher={{name: ghostnet, width: 0.5, weights: {tmp_path / 't.pth'}, logits: 1, features: 1}}"
    run = build_run(tiny(folders, tmp_path / "run", option))
    images, targets = next(iter(run.train_loader))
    found = [train_step(run, images, targets, group=1)]
    assert all(p.grad is not None for p in run.objective.parameters())
    for _ in range(12):
        loop.optimizer_step(run)
        found.append(train_step(run, images, targets, group=1))
    assert set(found[0]) == {"label", "logits", "features"}
    assert found[-1]["features"] < 0.8 * found[0]["features"]
    assert_same(dict(run.teacher.network.state_dict()), dict(teacher_network.state_dict()))


def test_teacher_mistakes(tmp_path, pretrained):
    cpu = torch.device("cpu")
    torch.save(GhostNet(0.5, num_classes=7).state_dict(), tmp_path / "seven.pth")
    torch.save(torch.nn.Linear(3, 3).state_dict(), tmp_path / "other.pth")
    seven = str(tmp_path / "seven.pth")

    def build(classes=CLASSES, size=64, **values):
        return build_teacher(teacher_config(**values), classes, size, cpu)

    with pytest.raises(UserError, match=r"tells 7 classes, the data have 3: set teacher\.logits=0"):
        build(weights=seven)
    assert set(build(weights=seven, logits=0, features=1).taps) == {"c3", "c4", "c5"}
    with pytest.raises(UserError, match=r"teacher\.weights: weights file .*nowhere\.pth does not exist"):
        build(weights=str(tmp_path / "nowhere.pth"))
    with pytest.raises(UserError, match=r"teacher\.weights: .*Nothing matches"):
        build(weights=str(tmp_path / "other.pth"))
    with pytest.raises(UserError, match="teacher: unknown backbone 'ghostnte'"):
        build(name="ghostnte", weights=seven)
    with pytest.raises(UserError, match="torchvision has no classifier 'resnet17'"):
        build(name="torchvision/resnet17", weights=seven)
    # One of this tool: its classes are compared by name.
    assert build(weights=str(pretrained / "best.pt")).taps == {}
    with pytest.raises(UserError, match="was trained on other classes"):
        build(classes=("a", "b", "c"), weights=str(pretrained / "best.pt"))
    vit = torchvision.models.vit_b_32(num_classes=3)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    with pytest.raises(UserError, match="cannot take pictures of 64 px"):
        build(name="torchvision/vit_b_32", weights=str(tmp_path / "vit.pth"))
    with pytest.raises(UserError, match="no maps of the strides that the teacher has"):
        Objective(build_classifier("ghost_resnet56", num_classes=3), 0, teacher_config(), find_taps(GhostNet(0.5)))


def test_a_timm_teacher(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model("test_resnet.r160_in1k", num_classes=3)
    torch.save(network.state_dict(), tmp_path / "t.pth")
    spec = teacher_config(name="timm/test_resnet.r160_in1k", weights=str(tmp_path / "t.pth"), features=1)
    teacher = build_teacher(spec, CLASSES, 64, torch.device("cpu"))
    images = torch.rand(2, 3, 64, 64)
    own = timm.data.resolve_model_data_config(network)
    x = (images - torch.tensor(own["mean"])[:, None, None]) / torch.tensor(own["std"])[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(teacher(images).logits, network.eval()(x))
    with pytest.raises(UserError, match=r"timm has no model 'resnet_17'"):
        build_teacher(teacher_config(name="timm/resnet_17"), CLASSES, 64, torch.device("cpu"))


# ---- configs


def test_the_recipes_of_the_issue_are_there():
    names = {path.stem for path in RECIPES}
    assert names >= {"ghostnet_imagenet", "ghost_vgg16_cifar10", "ghost_resnet56_cifar10", "ghostnet_crops"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipes_build_and_learn(path):
    config = read_config(PretrainConfig, path)
    spec = config.model
    network = build_classifier(spec.name, num_classes=10, **spec.model_dump(exclude={"name"}))
    size = min(64, config.data.size)
    losses = Objective(network, config.train.label_smoothing)(torch.rand(2, 3, size, size), torch.tensor([3, 9]))
    assert torch.isfinite(losses["label"])
    assert yaml.safe_load(path.read_text())["train"]["amp"] in ("off", "bf16", "fp16")
    assert "not yet measured" in path.read_text() or "measured" in path.read_text()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.nmae=x", r"unknown key 'model\.nmae' \(did you mean 'model\.name'\?\)"),
        (
            "teacher={name: a, weights: b, logit: 1}",
            r"unknown key 'teacher\.logit' \(did you mean 'teacher\.logits'\?\)",
        ),
        ("teacher={name: a, weights: b, logits: 0}", "needs logits or features above 0"),
        ("teacher={name: a}", r"key 'teacher\.weights' is missing"),
        ("data.format=tar", "'imagefolder' or 'cifar10'"),
        ("data.augment.random_resized_crop=[0.9, 0.1]", "low <= high"),
        ("model.num_classes=3", "number of classes comes from the data"),
        ("train.label_smoothing=1", "less than 1"),
    ],
)
def test_config_mistakes(folders, tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        tiny(folders, tmp_path / "run", override)
    assert {"teacher.temperature", "data.augment.cutmix", "train.label_smoothing"} <= set(valid_keys(PretrainConfig))


# ---- crops


def test_crops_share_no_picture_and_hold_their_objects(tmp_path):
    path = write_coco(tmp_path / "set", images=40)
    report = make_crops([path], tmp_path / "crops", min_examples=3, min_side=10, size=24)
    files = list((tmp_path / "crops").glob("*/*/*.jpg"))
    assert {p.parent.name for p in files} == {"square", "disc"} and {p.parent.parent.name for p in files} == {
        "train",
        "val",
    }
    assert len(files) == sum(map(sum, report.kept.values())) == 39 + 38  # each picture's two, less one crowd region
    pictures = {split: {p.stem.rpartition("_")[0] for p in files if p.parts[-3] == split} for split in ("train", "val")}
    assert pictures["train"] and pictures["val"] and not pictures["train"] & pictures["val"]
    hits = []
    for p in files:
        picture = np.asarray(Image.open(p).convert("L"), float)
        assert max(picture.shape) == 24
        middle = picture[9:15, 9:15].mean()
        hits.append(middle > 180 if p.parent.name == "square" else middle < 90)
    assert np.mean(hits) > 0.8  # some discs lie on squares
    # The same pictures under another file's name are no new ones, and cannot come into the other split.
    shutil.copytree(tmp_path / "set", tmp_path / "copy")
    again = make_crops([path, tmp_path / "copy" / "annotations.json"], tmp_path / "two", min_examples=3, min_side=10)
    assert again.kept == report.kept and again.repeated_pictures == 40
    assert len(read_coco(path)) == 40


def test_squares_lie_in_the_picture():
    assert square_around(np.array([10, 20, 30, 30], np.float32), 0, 100, 80) == (10, 15, 30, 35)
    assert square_around(np.array([0, 0, 30, 10], np.float32), 0, 100, 80) == (0, 0, 30, 30)
    assert square_around(np.array([60, 70, 100, 80], np.float32), 0.5, 100, 80) == (20, 0, 100, 80)


def test_make_crops_tool(tool, coco_set, tmp_path):
    options = ("--min-examples", 2, "--min-side", 10, "--val-share", 0.4)
    done = tool("make_crops", coco_set / "annotations.json", "--out", tmp_path / "crops", *options)
    assert done.returncode == 0 and "square" in done.stdout and "train" in done.stdout, done.stderr
    assert (tmp_path / "crops" / "val" / "disc").is_dir()
    done = tool("make_crops", coco_set / "annotations.json", "--out", tmp_path / "crops")
    assert_clear_error(done, "is there already and not empty")
    with pytest.raises(UserError, match=r"0 classes are left with 500 objects or more: lower --min-examples"):
        make_crops([coco_set / "annotations.json"], tmp_path / "c", min_examples=500)
    with pytest.raises(UserError, match="2 annotation files need as many --images"):
        make_crops([coco_set / "annotations.json"] * 2, tmp_path / "c", images=[coco_set / "images"])


# ---- the tool


@pytest.fixture()
def config_file(folders, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny(folders, tmp_path / "run").model_dump()))
    return path


def test_pretrain_and_resume(tool, config_file, folders, tmp_path):
    done = tool("pretrain", config_file, "train.epochs=1", "data.workers=1")
    assert done.returncode == 0 and "backbone.pth" in done.stdout, done.stdout + done.stderr
    done = tool("pretrain", config_file, "--resume")
    assert done.returncode == 0 and "resumed after epoch 1" in done.stdout, done.stderr
    assert [r["epoch"] for r in lines(tmp_path / "run")] == [1, 2]
    # A picture that only a worker meets, and a misspelt key.
    (folders / "train" / "disc" / "2.jpg").write_bytes(b"hello")
    assert_clear_error(
        tool("pretrain", config_file, "--resume", "train.epochs=3", "data.workers=1"), "2.jpg cannot be read"
    )
    assert_clear_error(tool("pretrain", config_file, "optim.lrr=1"), "did you mean 'optim.lr'")


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
from detection import distributed
from detection.config import read_config
from detection.pretraining.config import PretrainConfig
from detection.pretraining.run import build_run, evaluate, run_pretraining
from detection.training.loop import train, train_step
from detection.training.monitor import Monitor

path, out = sys.argv[1:]
config = read_config(PretrainConfig, path)
with distributed.session("cpu") as device:
    # Gradients of two half batches are those of the whole one. Batch norm, which sees its half alone, is out of play.
    run = build_run(config.with_overrides(["model.dropout=0"]), device)
    run.model.eval()
    images, targets = next(iter(run.train_loader))
    train_step(run, images, targets, group=1)
    grads = {n: p.grad for n, p in run.model.named_parameters()}
    assert distributed.gather(distributed.rank()) == [0, 1]
    assert distributed.reduce_max([distributed.rank() + 0.5]) == [1.5] and distributed.reduce_sum([1, 2]) == [2, 4]
    if distributed.is_main():
        torch.save({"grads": grads}, out + "/grads.pt")
    assert run_pretraining(config)
    assert run_pretraining(config.with_overrides(["train.epochs=3"]), resume=True)
    # All processes hold the same weights after a training, and saw other pictures.
    run = build_run(config.with_overrides(["train.epochs=1", f"output_dir={out}/again"]), device)
    run.folder.mkdir(exist_ok=True)
    assert train(run, Monitor(run.folder, 0), evaluate)
    for state in (run.model.state_dict(), run.eval_model.state_dict()):
        states = distributed.gather({k: v.double().sum().item() for k, v in state.items()})
        assert states[0] == states[1]
    names = distributed.gather([target["name"] for _, targets in run.train_loader for target in targets])
    assert len(set(names[0] + names[1])) == 24 == 2 * len(names[0])
"""


@pytest.mark.slow
def test_two_processes(folders, tmp_path):
    """Under torchrun, with gloo: the gradients of one process with the same batch, each picture evaluated once."""
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
    assert lines(tmp_path / "run")[-1]["step"] == 9  # 24 pictures, 8 a step
    assert done.stdout.count("best top-1") == 2  # two runs, one process that talks
    assert len(last(tmp_path / "run")["rng"]) == 2

    whole = build_run(config.with_overrides(["data.batch_size=8", "model.dropout=0"]))
    whole.model.eval()
    images, targets = next(iter(whole.train_loader))
    train_step(whole, images, targets, group=1)
    grads = torch.load(tmp_path / "grads.pt", weights_only=True)["grads"]
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-3, atol=1e-5)

    # The evaluation of two processes is that of one.
    run = build_run(config)
    run.load(tmp_path / "run" / "last.pt")
    numbers = measure_accuracy(run.eval_model, run.val_loader, run.device, channels_last=True)
    record = lines(tmp_path / "run")[-1]
    assert {k: record[k] for k in numbers} == pytest.approx(numbers, rel=1e-4)
