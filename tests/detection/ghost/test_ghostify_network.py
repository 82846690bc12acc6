"""Ghosted detectors: the config section, weights of ghosted backbones, and the tools ghostify and redundancy."""

import csv
import math

import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import assert_clear_error, run_seed, tiny_raw

from backbones import build_backbone
from backbones.ghost_conv import GhostConv2d
from backbones.ghost_conversion import PREDICTIONS, load_ghosted
from detection import UserError, build_model
from detection.checkpoint import read_checkpoint
from detection.config import GhostifyConfig
from detection.config_io import parse_config
from detection.engine.train_detector import run_training
from detection.evaluation.score import score_checkpoint
from detection.ghost.ghostify_network import ghostify_network
from detection.ghost.redundancy_report import list_layers_table, redundancy_report
from detection.inference.predictor import Predictor
from detection.models.ghost_recipe import part_of

SOURCE = {"images": "i", "annotations": "a"}


def config(detector="retinanet", ghostify=None, **backbone):
    model = {
        "detector": detector,
        "backbone": {"name": "mobilenet_v2", "width": 0.25, **backbone},
        "fpn_channels": 32,
        "head_channels": 32,
        "ghostify": ghostify,
    }
    return parse_config({"output_dir": "x", "model": model, "data": {"train": SOURCE, "val": SOURCE}}, "test")


def ghosts(model):
    return [name for name, module in model.named_modules() if isinstance(module, GhostConv2d)]


def parts(model):
    return {part_of(name) for name in ghosts(model)}


@pytest.mark.numeric
@pytest.mark.parametrize("detector", ["retinanet", "faster_rcnn"])
def test_a_ghosted_detector_trains_and_detects(detector):
    model = build_model(config(detector, {}), 3)
    assert parts(model) == {"backbone", "neck", "head"}
    assert not [name for name in ghosts(model) if name.endswith(("cls_logits", "bbox_reg", "bbox_pred"))]
    target = {"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([3])}
    losses = model.train()([torch.rand(3, 64, 96)], [target])
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(p.grad is not None for name, p in model.named_parameters() if ".cheap." in name)
    with torch.no_grad():
        assert set(model.eval()([torch.rand(3, 64, 96)])[0]) == {"boxes", "labels", "scores"}


@pytest.mark.numeric
def test_a_ghosted_resnet18_trains_and_is_evaluated(coco_set, tmp_path):
    raw = tiny_raw(coco_set, tmp_path / "run")
    raw["model"] |= {"backbone": {"name": "resnet18"}, "ghostify": {"ratio": 2}}
    raw["train"]["epochs"] = 1
    assert run_training(parse_config(raw, "test"))
    evaluation = score_checkpoint(tmp_path / "run" / "best.pt")
    assert 0 <= evaluation.numbers["AP"] <= 1
    state = read_checkpoint(tmp_path / "run" / "best.pt")["model"]
    assert "backbone.body.layer4.1.conv2.cheap.weight" in state and "backbone.body.conv1.weight" in state


@pytest.mark.parametrize("chosen", [["backbone"], ["neck"], ["head"], ["neck", "head"]])
def test_parts(chosen):
    assert parts(build_model(config(ghostify={"parts": chosen}), 2)) == set(chosen)


def test_patterns_ratio_and_kernel():
    model = build_model(config(ghostify={"include": ["*layer_blocks*"], "ratio": 4, "kernel_size": 5}), 2)
    assert ghosts(model) == [f"backbone.fpn.layer_blocks.{i}.0" for i in range(3)]
    layer = model.backbone.fpn.layer_blocks[0][0]
    assert layer.primary.out_channels == 8 and layer.cheap.kernel_size == (5, 5)
    with pytest.raises(UserError, match=r"model\.ghostify: no convolution's name matches 'layer9'"):
        build_model(config(ghostify={"include": ["layer9"]}), 2)
    with pytest.raises(UserError, match="replaces no convolution in neck, head"):
        build_model(config(ghostify={"parts": ["neck", "head"], "min_channels": 64}), 2)


def test_config_mistakes():
    assert config().model.ghostify is None
    with pytest.raises(
        UserError, match=r"unknown key 'model\.ghostify\.ratoi' \(did you mean 'model\.ghostify\.ratio'"
    ):
        config(ghostify={"ratoi": 2})
    with pytest.raises(UserError, match=r"model\.ghostify\.kernel_size"):
        config(ghostify={"kernel_size": 4})
    assert config().with_overrides(["model.ghostify.ratio=3"]).model.ghostify.ratio == 3
    assert set(GhostifyConfig().exclude) <= set(PREDICTIONS)


# ---- tools


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Smooth noise: seven images."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(run_seed())
    for i in range(7):
        noise = rng.integers(0, 256, (10, 14, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{i}.png"), cv2.resize(noise, (140, 100), interpolation=cv2.INTER_CUBIC))
    return folder


def numbers(text, row):
    line = next(line for line in text.splitlines() if line.startswith(row))
    return [float(word) for word in line.removeprefix(row).split()]


@pytest.mark.numeric
@pytest.mark.slow
def test_backbone_ghosted_by_the_tool_starts_a_detector(tool, images, coco_set, tmp_path):
    plain = build_backbone("mobilenet_v2", width=0.25)
    for module in plain.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    out = tmp_path / "ghosted.pth"
    network = ["mobilenet_v2", "--width", 0.25, "--weights", tmp_path / "plain.pth"]
    done = tool("ghostify", *network, "--images", images, "--size", 96, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "kept: first convolution" in done.stdout and "kept: depthwise" in done.stdout
    assert "Fitted to 6 images, measured on 1 images that were held out from the fit" in done.stdout
    random, fitted = numbers(done.stdout, "mean of layers")
    assert fitted < 0.7 < 1 < random and len(numbers(done.stdout, "network output")) == 2

    ghosted = build_backbone("mobilenet_v2", width=0.25)
    load_ghosted(ghosted, out)
    report_name = ghosts(ghosted)[0]
    original = plain.get_submodule(report_name).weight
    primary = ghosted.get_submodule(report_name).primary.weight
    assert all((original == row).flatten(1).all(1).any() for row in primary)  # each is one of the original's filters

    raw = tiny_raw(coco_set, tmp_path / "run")
    raw["model"]["backbone"] = {"name": "mobilenet_v2", "width": 0.25, "weights": str(out), "frozen_stages": 1}
    raw["model"]["ghostify"] = {"parts": ["backbone"]}
    raw["train"]["epochs"] = 1
    model = build_model(parse_config(raw, "test"), 2)
    for key, value in ghosted.state_dict().items():
        assert torch.equal(model.backbone.body.state_dict()[key], value)
    assert not next(model.backbone.body.parameters()).requires_grad
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(raw))
    done = tool("train", tmp_path / "tiny.yaml")
    assert done.returncode == 0 and "0 missing" in done.stdout, done.stdout + done.stderr
    assert math.isfinite(score_checkpoint(tmp_path / "run" / "best.pt").numbers["AP"])

    # Plain weights in a ghosted backbone are refused with what to do.
    raw["model"]["backbone"]["weights"] = str(tmp_path / "plain.pth")
    with pytest.raises(UserError, match=r"of a plain mobilenet_v2.*ghostdet ghostify mobilenet_v2 --weights"):
        build_model(parse_config(raw, "test"), 2)


@pytest.mark.numeric
@pytest.mark.slow
def test_ghosted_checkpoint_can_be_evaluated(tool, trained, coco_set, tmp_path):
    out = tmp_path / "ghosted.pt"
    done = tool(
        "ghostify",
        trained / "best.pt",
        "--parts",
        "neck",
        "head",
        "--images",
        coco_set / "images",
        "--size",
        96,
        "--out",
        out,
    )
    assert done.returncode == 0, done.stderr
    random, fitted = numbers(done.stdout, "network output")
    assert fitted < random
    evaluation = score_checkpoint(out, annotations=str(coco_set / "annotations.json"))
    assert 0 <= evaluation.numbers["AP"] <= 1
    predictor = Predictor(out, "cpu", score_threshold=0.0)
    assert len(ghosts(predictor.model)) > 3 and len(predictor.predict(coco_set / "images" / "image 3.jpg")["names"])
    state, before = read_checkpoint(out)["model"], read_checkpoint(trained / "best.pt")["model"]
    kept = [key for key in before if key.startswith("backbone.body.")]
    assert kept and all(torch.equal(state[key], before[key]) for key in kept)
    assert [key for key in state if key.startswith("head.") and ".cheap." in key]
    assert_clear_error(tool("ghostify", out), "is ghosted already")


def test_report_of_a_config():
    text = ghostify_network("configs/retina_ghost_320.yaml", GhostifyConfig(parts=["head"], ratio=4), size=64)
    assert "kept: excluded" in text and "-74%" in text and "whole network" in text and "fitted" not in text


@pytest.mark.parametrize(
    ("network", "arguments", "message"),
    [
        ("mobilenet_v9", {}, "unknown backbone 'mobilenet_v9' .did you mean"),
        ("mobilenet_v2", {"weights": "no.pth"}, "no.pth does not exist"),
        ("mobilenet_v2", {"spec": {"include": ["layr*"]}}, r"no convolution's name matches 'layr\*'"),
        ("mobilenet_v2", {"spec": {"min_channels": 9999}}, "no convolution is left to replace"),
        ("mobilenet_v2", {"out": "x.pth"}, "--init fit needs images"),
        ("mobilenet_v2", {"images": ["none"]}, "source none does not exist"),
        ("mobilenet_v2", {"init": "random", "out": "none/x.pth"}, "folder none does not exist"),
        ("no.pt", {}, "checkpoint no.pt does not exist"),
        ("no.yaml", {}, "config no.yaml does not exist"),
        ("configs/retina_ghost_320.yaml", {"init": "random", "out": "x.pt"}, "is a config and has no weights"),
    ],
)
def test_ghostify_mistakes(network, arguments, message):
    spec = GhostifyConfig(**arguments.pop("spec", {}))
    with pytest.raises(UserError, match=message):
        ghostify_network(network, spec, size=64, **arguments)


@pytest.mark.numeric
@pytest.mark.slow
def test_redundancy(tool, images, tmp_path):
    torch.save(build_backbone("ghostnet", width=0.5).state_dict(), tmp_path / "w.pth")
    done = tool(
        "redundancy", "ghostnet", "--width", 0.5, "--weights", tmp_path / "w.pth", "--images", images,
        "--size", 96, "--pairs", 3, "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "ghostnet, layer blocks.1.0.ghost1 (24x48x48), 7 images" in done.stdout
    with open(tmp_path / "out" / "ghostnet_blocks.1.0.ghost1.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 and len({row[key] for row in rows for key in ("source", "target")}) == 24
    for row in rows:
        assert float(row["mse_d1"]) >= float(row["mse_d3"]) >= float(row["mse_d5"]) >= float(row["mse_d7"]) >= 0
    assert [float(row["mse_d3"]) for row in rows] == sorted(float(row["mse_d3"]) for row in rows)
    image = cv2.imread(str(tmp_path / "out" / "ghostnet_blocks.1.0.ghost1.png"))
    assert image.shape[0] > 600 and image.shape[1] > 1000 and image.std() > 20

    table = list_layers_table("ghostnet", size=224)
    assert "blocks.2.0.ghost1 " in table and "24x56x56" in table


def test_redundancy_mistakes(images, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    for arguments, message in (
        ({"layer": "blocks.2.0.ghost3"}, r"has no layer 'blocks\.2\.0\.ghost3'; nearest: .*blocks\.2\.0\.ghost2"),
        ({"layer": "blocks.3.0.se.conv_reduce"}, "12x1x1"),
        ({"kernel_sizes": (2, 3)}, "must be odd"),
        ({"out": tmp_path / "file" / "x"}, "cannot be written to"),
    ):
        with pytest.raises(UserError, match=message):
            redundancy_report("ghostnet", [str(images)], **{"width": 0.5, "size": 64, "out": tmp_path, **arguments})
    with pytest.raises(UserError, match=r"broken\.jpg is not an image"):
        redundancy_report("ghostnet", [str(tmp_path / "broken.jpg")])
