"""Detectors by name: what comes with the toolkit, the hub's cache, and .safetensors files as checkpoints."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_raw
from safetensors.torch import load_file, save_file

from detection import Predictor, UserError
from detection.checkpoint import read_checkpoint, weights_of
from detection.cli import detect, evaluate, export, models
from detection.config_io import parse_config
from detection.data.image_io import read_image
from detection.engine.detection_task import build_trainer
from detection.models.build import build_model
from detection.weights_file import read_weights_file, write_weights_file
from detection.zoo import names


def load_tool(name):
    """A program of tools/dev as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / "dev" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture()
def zoo(trained, tmp_path, monkeypatch):
    """A folder in place of the toolkit's own, with the tiny run as the detector `ghostdet_tiny`; work in another."""
    folder = tmp_path / "zoo"
    folder.mkdir()
    numbers = {
        "AP": 0.5, "AP50": 0.9, "evaluations": {"shapes/val": {"AP": 0.5, "AP50": 0.9, "AP75": 0.4}}, "size": 96,
        "parameters": 750_000, "multiply_adds": 12_000_000,
    }  # fmt: skip
    write_weights_file(
        folder / "ghostdet_tiny.safetensors", {**read_checkpoint(trained / "best.pt"), "numbers": numbers}
    )
    monkeypatch.setattr(names, "FOLDER", folder)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder


@pytest.mark.numeric
def test_half_precision_weights_detect_alike(zoo, trained, images):
    image = read_image(sorted(images.iterdir())[2])
    one, two = (Predictor(path, "cpu").predict(image) for path in (trained / "best.pt", "ghostdet_tiny"))
    assert one["names"] == two["names"] and one["names"]
    torch.testing.assert_close(one["boxes"], two["boxes"], atol=0.5, rtol=0)
    torch.testing.assert_close(one["scores"], two["scores"], atol=0.01, rtol=0)
    assert (zoo / "ghostdet_tiny.safetensors").stat().st_size < 0.6 * 4 * 750_000


def test_statistics_keep_full_precision_and_all_tensors_come_back(zoo, trained):
    content = read_checkpoint(trained / "best.pt")
    before = weights_of(content, "")
    after = read_checkpoint(zoo / "ghostdet_tiny.safetensors")
    assert after["classes"] == {"names": ["square", "disc"], "ids": [3, 7]} and after["config"] == content["config"]
    assert set(after["model"]) == set(before)
    for name, value in after["model"].items():
        if name.endswith(("running_mean", "running_var")):
            assert torch.equal(value, before[name])
        elif not name.endswith("num_batches_tracked"):
            assert value.dtype == torch.float32 and torch.equal(value, before[name].half().float()), name


def test_commands_take_a_name(zoo, trained, images, capsys):
    data = trained.parent / "data" / "annotations.json"
    assert detect.main(["ghostdet_tiny", str(sorted(images.iterdir())[1]), "--device", "cpu", "--out", "found"]) == 0
    assert evaluate.main(["ghostdet_tiny", "--data", str(data), "device=cpu", "data.workers=0"]) == 0
    assert Path("predictions.json").is_file() or Path("predictions_annotations.json").is_file()
    assert export.main(["ghostdet_tiny", "--format", "torchscript"]) == 0
    assert Path("ghostdet_tiny.torchscript").is_file()
    assert sorted(path.name for path in zoo.iterdir()) == ["ghostdet_tiny.safetensors"]
    capsys.readouterr()
    assert models.main([]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert "AP shapes/val" in header and row.split()[0] == "ghostdet_tiny" and row.split()[-1] == "0.500"
    assert models.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["classes"] == ["square", "disc"]


def test_a_training_starts_from_a_name(zoo, trained, tmp_path):
    raw = tiny_raw(trained.parent / "data", tmp_path / "run")
    raw["model"]["weights"] = "ghostdet_tiny"
    model = build_trainer(parse_config(raw, "test")).model
    theirs = read_checkpoint(zoo / "ghostdet_tiny.safetensors")["model"]
    assert torch.equal(model.state_dict()["backbone.body.bn1.weight"], theirs["backbone.body.bn1.weight"])


def test_a_backbone_of_the_zoo(zoo, trained, tmp_path):
    prefix = "backbone.body."
    state = read_checkpoint(trained / "best.pt")["model"]
    body = {
        k.removeprefix(prefix): v.half().contiguous()
        for k, v in state.items()
        if k.startswith(prefix) and v.is_floating_point()
    }
    save_file(body, zoo / "ghostnet_050.safetensors")
    raw = tiny_raw(trained.parent / "data", tmp_path / "run")
    raw["model"]["backbone"]["weights"] = "zoo"
    config = parse_config(raw, "test")
    model = build_model(config, 2)
    assert torch.equal(model.backbone.body.bn1.weight, body["bn1.weight"].float())
    config.model.backbone.width = 1.3
    with pytest.raises(
        UserError, match=r"no weights of ghostnet at width 1\.3 come with the toolkit \(known: ghostnet_"
    ):
        build_model(config, 2)


def test_a_name_that_is_not_known(zoo, tmp_path):
    with pytest.raises(UserError, match=r"ghostdet_tin is neither a file nor.*did you mean 'ghostdet_tiny'"):
        Predictor("ghostdet_tin")
    with pytest.raises(UserError, match=r"yolo is neither a file nor.*\(known: ghostdet_tiny\)"):
        names.find_detector("yolo")
    # A file of that name comes first.
    shutil.copy(zoo / "ghostdet_tiny.safetensors", "ghostdet_tiny")
    assert names.find_detector("ghostdet_tiny") == "ghostdet_tiny"
    with pytest.raises(UserError, match="hf:owner is not of the form hf:OWNER/NAME"):
        names.find_detector("hf:owner")


def test_a_detector_of_the_hubs_cache(zoo, tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    repository = tmp_path / "hub" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    shutil.copy(zoo / "ghostdet_tiny.safetensors", snapshot / "model.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    found = names.find_detector("hf:owner/name")
    assert Path(found) == snapshot / "model.safetensors" and names.output_folder(found) == Path()
    assert Predictor("hf:owner/name", "cpu").classes.names == ("square", "disc")
    with pytest.raises(UserError, match=r"hf:owner/absent: model\.safetensors could not be fetched"):
        names.find_detector("hf:owner/absent")


def test_damaged_files(zoo, tmp_path):
    path = zoo / "ghostdet_tiny.safetensors"
    whole = path.read_bytes()
    for content in (b"", whole[:1000], whole[: len(whole) // 2], b"\xff" * 8 + whole[8:]):
        (tmp_path / "bad.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.safetensors is not a readable checkpoint"):
            read_checkpoint(tmp_path / "bad.safetensors")
    save_file(load_file(path), tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match="not a checkpoint of this toolkit"):
        read_checkpoint(tmp_path / "bare.safetensors")
    save_file(load_file(path), tmp_path / "odd.safetensors", {"format": "{"})
    with pytest.raises(UserError, match="its section 'format' is not JSON"):
        read_weights_file(tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match="cannot represent"):
        write_weights_file(tmp_path / "large.safetensors", {"model": {"w": torch.tensor([1e6])}})


def test_packed_weights_say_what_they_were_measured_to_be(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = trained.parent / "data" / "annotations.json"
    load_tool("pack_weights").main([str(trained / "best.pt"), "packed.safetensors", "--data", f"shapes={data}"])
    numbers = read_checkpoint("packed.safetensors")["numbers"]
    best = read_checkpoint(trained / "best.pt")["numbers"]
    assert numbers["evaluations"]["shapes"]["AP"] == pytest.approx(best["AP"], abs=0.01)
    assert numbers["AP"] == numbers["evaluations"]["shapes"]["AP"]
    assert 0.6e6 < numbers["parameters"] < 0.9e6 and numbers["multiply_adds"] > 1e6 and numbers["size"] == 96
