"""Pre-training: images, teachers, configs and crops."""

import hashlib
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import yaml
from class_folders import CLASSES, assert_same, last, lines, tiny
from conftest import ROOT, assert_clear_error, run_seed, write_coco
from PIL import Image
from torch.nn import functional as F

from backbones import GhostNet
from backbones.classifier import build_classifier, normalize
from detection import UserError
from detection.config_check import valid_keys
from detection.config_io import read_config
from detection.data.formats.coco import read_coco
from detection.data.prepare.crops import make_crops, square_around
from detection.engine import loop
from detection.engine.loop import train_step
from detection.pretraining.classification_config import ClassificationConfig, TeacherConfig
from detection.pretraining.classification_task import build_trainer, run_pretraining
from detection.pretraining.distillation import DistillationObjective, distillation_loss, relative_mse
from detection.pretraining.image_folders import batch_mixing, build_datasets
from detection.pretraining.teacher import Teacher, build_teacher, find_taps, logits_and_maps

RECIPES = [*sorted((ROOT / "configs" / "pretrain").glob("*.yaml")), ROOT / "configs" / "zoo" / "ghostnet.yaml"]


# ---- data


@pytest.mark.numeric
def test_samples_depend_on_seed_epoch_and_index_alone(folders, tmp_path):
    train, val = build_datasets(tiny(folders, tmp_path / "run"))
    torch.manual_seed(run_seed())
    before = torch.get_rng_state()
    first, target = train.load(3, 10)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(run_seed(1))
    assert torch.equal(train.load(3, 10)[0], first) and not torch.equal(train.load(4, 10)[0], first)
    assert first.dtype == torch.uint8 and first.shape == (3, 32, 32)
    assert CLASSES[target["label"]] in target["name"] and Path(target["name"]).is_file()
    assert torch.equal(val.load(0, 2)[0], val.load(5, 2)[0])


@pytest.mark.numeric
def test_mixed_labels_are_shares(folders, tmp_path):
    config = tiny(folders, tmp_path / "run", "data.augment.mixup=1")
    mixing = batch_mixing(config.data.augment, 3)
    images, labels = mixing(torch.rand(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2]))
    assert labels.shape == (6, 3) and torch.allclose(labels.sum(1), torch.ones(6)) and images.shape == (6, 3, 8, 8)


@pytest.mark.numeric
def test_cifar10_in_its_published_format(tmp_path, monkeypatch):
    """A small one; torchvision's check of the files' sums is told theirs, and is at work."""
    root = tmp_path / "cifar"
    base = root / "cifar-10-batches-py"
    base.mkdir(parents=True)
    rng = np.random.default_rng(run_seed())
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
        ClassificationConfig,
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


def test_a_loss_that_is_not_finite_names_the_images(folders, tmp_path):
    trainer = build_trainer(tiny(folders, tmp_path / "run"))
    with torch.no_grad():
        trainer.model.classifier.bias.fill_(float("nan"))
    images, targets = next(iter(trainer.train_loader))
    with pytest.raises(UserError, match=r"not finite at epoch 1.*label nan.*images .*\.jpg, … *\."):
        train_step(trainer, images, targets, group=1)


# ---- teachers


def teacher_config(**values) -> TeacherConfig:
    return TeacherConfig(**{"name": "ghostnet", "width": 0.5, "weights": "w.pth", **values})


@pytest.mark.numeric
def test_a_teacher_is_frozen_and_sees_its_own_mean_and_std(tmp_path):
    network = torchvision.models.resnet18(num_classes=3)
    network.mean, network.std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    teacher = Teacher(network.train(), find_taps(network))
    images = torch.rand(2, 3, 64, 64)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    output = teacher(images)
    assert not network.training and not output.logits.requires_grad
    assert_same(before, dict(network.state_dict()))
    x = (images - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.5, 0.6, 0.7])[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(output.logits, network(x))


@pytest.mark.numeric
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


@pytest.mark.numeric
def test_what_is_learned_from_a_teacher():
    logits = torch.randn(4, 5)
    assert distillation_loss(logits, logits, 3.0).item() == pytest.approx(0, abs=1e-6)
    # By hand: KL divergence of softened answers, times T².
    other = torch.randn(4, 5)
    p, q = (F.softmax(x / 2, 1) for x in (other, logits))
    assert distillation_loss(logits, other, 2.0).item() == pytest.approx(
        4 * (p * (p / q).log()).sum(1).mean().item(), rel=1e-4
    )
    maps = torch.randn(2, 3, 4, 4)
    assert relative_mse(maps, maps).item() == 0 and relative_mse(0 * maps, 7 * maps).item() == pytest.approx(1)
    assert relative_mse(torch.zeros(2, 3, 3, 3), maps).item() == pytest.approx(1)


@pytest.mark.numeric
def test_a_student_comes_near_its_teacher(folders, tmp_path):
    """Labels aside: the error on the teacher's maps and answers falls, and gradients reach the student by both."""
    torch.manual_seed(run_seed(1))
    teacher_network = GhostNet(0.5, num_classes=3)
    torch.save(teacher_network.state_dict(), tmp_path / "t.pth")
    option = f"teacher={{name: ghostnet, width: 0.5, weights: {tmp_path / 't.pth'}, logits: 1, features: 1}}"
    trainer = build_trainer(tiny(folders, tmp_path / "run", option))
    images, targets = next(iter(trainer.train_loader))
    found = [train_step(trainer, images, targets, group=1)]
    assert all(p.grad is not None for p in trainer.objective.parameters())
    for _ in range(12):
        loop.optimizer_step(trainer)
        found.append(train_step(trainer, images, targets, group=1))
    assert set(found[0]) == {"label", "logits", "features"}
    assert found[-1]["features"] < 0.8 * found[0]["features"]
    assert_same(dict(trainer.task.teacher.network.state_dict()), dict(teacher_network.state_dict()))


@pytest.mark.numeric
def test_images_without_labels_take_the_teachers_classes(folders, pretrained, tmp_path):
    for split in ("train", "val"):
        for file in (folders / split).glob("*/*.jpg"):
            target = tmp_path / split / "any" / "folder" / f"{file.parent.name}_{file.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    teacher = f"{{name: ghostnet, width: 0.5, weights: {pretrained / 'best.pt'}, amp: bf16}}"
    overrides = ("data.format=unlabelled", f"teacher={teacher}", "train.epochs=18", "train.ema=0")
    config = tiny(tmp_path, tmp_path / "run", *overrides, "train.label_smoothing=0")
    trainer = build_trainer(config)
    assert trainer.task.classes.names == CLASSES and len(trainer.task.val_loader.dataset) == 12
    images = torch.cat([images for images, _ in trainer.task.val_loader]) / 255
    theirs = trainer.task.teacher(images).logits.argmax(1)
    assert len(theirs.unique()) > 1
    own = trainer.model.eval()(normalize(images, trainer.model)).argmax(1)
    agreement = (own == theirs).float().mean().item()
    assert trainer.task.predict(trainer.model)["top1"] == pytest.approx(agreement)
    assert run_pretraining(config)
    assert lines(tmp_path / "run")[-1]["top1"] > max(0.6, agreement)


def test_mistakes_with_images_without_labels(folders, pretrained, tmp_path):
    with pytest.raises(UserError, match="unlabelled needs a teacher"):
        tiny(folders, tmp_path / "run", "data.format=unlabelled")
    (tmp_path / "empty").mkdir()
    teacher = f"teacher={{name: ghostnet, width: 0.5, weights: {pretrained / 'best.pt'}}}"
    for folder, message in (("empty", "no images below"), ("absent", "does not exist")):
        overrides = ("data.format=unlabelled", teacher, f"data.train={tmp_path / folder}")
        with pytest.raises(UserError, match=f"data.train: .*{message}"):
            build_trainer(tiny(folders, tmp_path / "run", *overrides))


def test_teacher_mistakes(tmp_path, pretrained):
    cpu = torch.device("cpu")
    torch.save(GhostNet(0.5, num_classes=7).state_dict(), tmp_path / "seven.pth")
    torch.save(torch.nn.Linear(3, 3).state_dict(), tmp_path / "other.pth")
    seven = str(tmp_path / "seven.pth")

    def build(classes=CLASSES, size=64, **values):
        return build_teacher(teacher_config(**values), classes, size, cpu)

    with pytest.raises(UserError, match=r"has 7 classes, the data have 3: set teacher\.logits=0"):
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
    squeezenet = torchvision.models.squeezenet1_1(num_classes=3)
    torch.save(squeezenet.state_dict(), tmp_path / "squeezenet.pth")
    with pytest.raises(UserError, match="cannot take images of 8 px"):
        build(name="torchvision/squeezenet1_1", weights=str(tmp_path / "squeezenet.pth"), size=8)
    with pytest.raises(UserError, match="no maps of the strides that the teacher has"):
        DistillationObjective(
            build_classifier("ghost_resnet56", num_classes=3), 0, teacher_config(), find_taps(GhostNet(0.5))
        )


@pytest.mark.numeric
def test_a_timm_teacher(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(run_seed())
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


@pytest.mark.numeric
@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipes_build_and_learn(path):
    config = read_config(ClassificationConfig, path)
    spec = config.model
    network = build_classifier(spec.name, num_classes=10, **spec.model_dump(exclude={"name"}))
    size = min(64, config.data.size)
    losses = DistillationObjective(network, config.train.label_smoothing)(
        torch.rand(2, 3, size, size), torch.tensor([3, 9])
    )
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
        ("data.format=tar", "'imagefolder', 'cifar10' or 'unlabelled'"),
        ("data.augment.random_resized_crop=[0.9, 0.1]", "low <= high"),
        ("model.num_classes=3", "number of classes comes from the data"),
        ("train.label_smoothing=1", "less than 1"),
    ],
)
def test_config_mistakes(folders, tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        tiny(folders, tmp_path / "run", override)
    assert {"teacher.temperature", "data.augment.cutmix", "train.label_smoothing"} <= set(
        valid_keys(ClassificationConfig)
    )


# ---- crops


def test_crops_share_no_image_and_hold_their_objects(tmp_path):
    path = write_coco(tmp_path / "set", images=40)
    report = make_crops([path], tmp_path / "crops", min_examples=3, min_side=10, size=24)
    files = list((tmp_path / "crops").glob("*/*/*.jpg"))
    assert {p.parent.name for p in files} == {"square", "disc"} and {p.parent.parent.name for p in files} == {
        "train",
        "val",
    }
    assert len(files) == sum(map(sum, report.kept.values())) == 39 + 38  # each image's two, less one crowd region
    images = {split: {p.stem.rpartition("_")[0] for p in files if p.parts[-3] == split} for split in ("train", "val")}
    assert images["train"] and images["val"] and not images["train"] & images["val"]
    hits = []
    for p in files:
        image = np.asarray(Image.open(p).convert("L"), float)
        assert max(image.shape) == 24
        middle = image[9:15, 9:15].mean()
        hits.append(middle > 180 if p.parent.name == "square" else middle < 90)
    assert np.mean(hits) > 0.8  # some discs lie on squares
    # The same images under another file's name are no new ones, and cannot come into the other split.
    shutil.copytree(tmp_path / "set", tmp_path / "copy")
    again = make_crops([path, tmp_path / "copy" / "annotations.json"], tmp_path / "two", min_examples=3, min_side=10)
    assert again.kept == report.kept and again.repeated_images == 40
    assert len(read_coco(path)) == 40


def test_squares_lie_in_the_image():
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
