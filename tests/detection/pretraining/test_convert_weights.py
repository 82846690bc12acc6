"""Converted weights: the tool, and a detector that is trained from them and rebuilt without the file."""

import hashlib

import numpy as np
import pytest
import torch
from conftest import assert_clear_error, run_seed
from foreign.twins import PaddleGhostNet, mindcv_entries, unsettle, write_mindspore, write_pdparams
from PIL import Image
from safetensors import safe_open
from torch import nn

from backbones import GhostNet, build_backbone
from detection import Predictor, UserError
from detection.engine.train_detector import run_training
from detection.pretraining.weight_conversion import accuracy, convert, name_image, write


@pytest.fixture(scope="module")
def paddle_file(tmp_path_factory):
    network = unsettle(PaddleGhostNet(0.5, classes=7), seed=run_seed())
    path = tmp_path_factory.mktemp("weights") / "GhostNet_x0_5_pretrained.pdparams"
    return write_pdparams(path, network.arrays())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_converted_file_is_an_ordinary_one(paddle_file, tmp_path, suffix):
    converted = convert(paddle_file)
    assert converted.width == 0.5 and converted.network.classifier.out_features == 7
    out = tmp_path / f"ghostnet{suffix}"
    write(converted, out)
    again = convert(out)
    # 512 keys with the step counters of batch norm, which neither framework has.
    assert len(again.report.matched) == 512 and not again.report.unexpected
    for key, value in converted.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[key], value), key
    if suffix == ".safetensors":
        with safe_open(out, "pt") as file:
            assert file.metadata()["source_sha256"] == hashlib.sha256(paddle_file.read_bytes()).hexdigest()


def test_the_tool_says_what_it_is_and_converts(tool, paddle_file, tmp_path):
    out = tmp_path / "ghostnet.safetensors"
    done = tool("convert_weights", paddle_file, "--out", out)
    assert done.returncode == 0, done.stderr
    digest = hashlib.sha256(paddle_file.read_bytes()).hexdigest()
    for words in (
        f"sha256 {digest}",
        "ghostnet, width 0.5, 7 classes: 1.315 M parameters; channels c2 12, c3 20, c4 56, c5 80",
        "PaddleClas's layout, converted): 432 matched, 0 missing, 0 unexpected, 0 shape-mismatched",
        f"model.backbone.width=0.5 model.backbone.weights={out}",
    ):
        assert words in done.stdout, done.stdout
    assert build_backbone("ghostnet", width=0.5, weights=str(out)).pretrained


def test_a_mistake_is_one_line(tool, tmp_path):
    assert_clear_error(tool("convert_weights", tmp_path / "no.pdparams"), "no.pdparams does not exist")


def test_where_it_cannot_be_written(paddle_file, tmp_path):
    converted = convert(paddle_file)
    with pytest.raises(UserError, match=r"x\.onnx must end in \.safetensors or \.pth"):
        write(converted, tmp_path / "x.onnx")
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        write(converted, tmp_path / "nowhere" / "x.pth")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "w.pdparams").write_bytes(b"hello")
    with pytest.raises(UserError, match=r"w\.pdparams cannot be read: it is not a file of paddle\.save"):
        convert(tmp_path / "w.pdparams")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"not of a GhostNet classifier \(it has weight, bias"):
        convert(tmp_path / "w.pth")


def test_the_digits_in_a_name_of_mindcv_are_checked(tmp_path):
    path = write_mindspore(tmp_path / "plain.ckpt", mindcv_entries(GhostNet(0.5).state_dict()))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for name in (f"ghostnet_050-{digest[:8]}.ckpt", f"ghostnet_050-{digest[:8]}-910v2.ckpt"):
        right = tmp_path / name
        right.write_bytes(path.read_bytes())
        assert convert(right).sha256 == digest
    wrong = path.rename(tmp_path / "ghostnet_050-01234567.ckpt")
    with pytest.raises(UserError, match=f"damaged: its sha256 begins with {digest[:8]}, not with 01234567"):
        convert(wrong)


@pytest.mark.numeric
def test_accuracy_against_the_ranks_of_single_images(paddle_file, tmp_path):
    network = convert(paddle_file).network
    generator = np.random.default_rng(run_seed())
    ranks = []
    for label in range(7):
        (tmp_path / f"n{label}").mkdir()
        image = tmp_path / f"n{label}" / "image.png"
        Image.fromarray(generator.integers(0, 256, (300, 260 + 20 * label, 3), dtype=np.uint8)).save(image)
        names = [name for name, _ in name_image(network, image, count=7)]
        ranks.append(names.index(f"class {label}"))
    top1, top5, count = accuracy(network, tmp_path)
    assert count == 7
    assert top1 == pytest.approx(100 * sum(rank == 0 for rank in ranks) / 7)
    assert top5 == pytest.approx(100 * sum(rank < 5 for rank in ranks) / 7)
    (tmp_path / "n7").mkdir()
    (tmp_path / "n7" / "image.png").write_bytes(image.read_bytes())
    with pytest.raises(UserError, match="has 8 class folders, the network 7 classes"):
        accuracy(network, tmp_path)
    with pytest.raises(UserError, match="no/where"):
        accuracy(network, "no/where")


@pytest.mark.numeric
def test_an_image_is_named_with_imagenets_classes(coco_set):
    found = name_image(GhostNet(0.5).eval(), coco_set / "images" / "image 3.jpg")
    assert len(found) == 5 and not any(name.startswith("class ") for name, _ in found)
    assert [p for _, p in found] == sorted((p for _, p in found), reverse=True)


@pytest.mark.numeric
def test_a_detector_trained_from_paddles_weights_is_rebuilt_without_them(tiny_config, paddle_file, coco_set, tmp_path):
    weights = tmp_path / "weights.pdparams"
    weights.write_bytes(paddle_file.read_bytes())
    config = tiny_config.with_overrides(
        [
            f"model.backbone.weights={weights}",
            "model.backbone.frozen_stages=4",
            "model.backbone.freeze_bn=true",
            "train.epochs=1",
            "train.ema=0",
        ]
    )
    assert run_training(config)
    weights.unlink()
    predictor = Predictor(tmp_path / "run" / "best.pt", "cpu", score_threshold=0.0)
    # Nothing of the frozen backbone moved, so its features are still those of the file.
    body = predictor.model.backbone.body.eval()
    fresh = build_backbone("ghostnet", width=0.5, weights=str(paddle_file)).eval()
    image = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        for level, expected in fresh(image).items():
            torch.testing.assert_close(body(image)[level], expected, rtol=1e-4, atol=1e-4)
    assert len(predictor.predict(coco_set / "images" / "image 3.jpg")["boxes"])
