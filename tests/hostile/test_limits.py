"""Numbers in a config that would fill the memory: an error that names the key, with next to nothing allocated."""

import resource
import time

import pytest
import torch
import yaml
from PIL import Image
from run_tool import run
from torch import nn

from detection import UserError
from detection.core.limits import INPUT_PIXELS, MAX_TENSORS, PARAMETERS, parameter_limit
from detection.models.build import build_model

HUGE = 2**31 - 1
NETWORKS = {
    "width": ("model.backbone.width=1000", "model.backbone.width=1000"),
    "width beyond 64 bits": ("model.backbone.width=1e300", "model.backbone.width=1e+300"),
    "width of a GhostNetV2": ("model.backbone={name: ghostnetv2, width: 300}", "model.backbone.width=300"),
    "width of a MobileNet": ("model.backbone={name: mobilenet_v2, width: 500}", "model.backbone.width=500"),
    "fpn_channels": (f"model.fpn_channels={HUGE}", f"model.fpn_channels={HUGE}"),
    "head_channels": ("model.head_channels=30000", "model.head_channels=30000"),
    "head_channels, beyond": (f"model.head_channels={HUGE}", f"model.head_channels={HUGE}"),
    "head_depth": (f"model.head_depth={HUGE}", f"model.head_depth={HUGE}"),
}
DETECTORS = ("retinanet", "faster_rcnn", "ghostdet")


SLOW = ("width of a GhostNetV2", "width of a MobileNet", "head_channels")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in NETWORKS]
)
def test_networks_that_are_too_large(tiny_config, name):
    override, words = NETWORKS[name]
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(UserError, match=r"has more than [\d,]+ (parameters.*GHOSTNET_MAX_PARAMETERS|layers)") as error:
        build_model(tiny_config.with_overrides([override]), 2)
    assert words in str(error.value)
    # A limit's worth of weights at most, and no more of it than was initialised.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000
    assert time.process_time() - start < 15


@pytest.mark.parametrize("detector", DETECTORS)
def test_channels_of_every_detector(tiny_config, detector):
    config = tiny_config.with_overrides([f"model.detector={detector}", "model.fpn_channels=1000000"])
    with pytest.raises(UserError, match=r"model\.fpn_channels=1000000.*has more than"):
        build_model(config, 2)


def test_the_limit_can_be_raised_and_is_gone_afterwards(tiny_config, monkeypatch):
    monkeypatch.setenv(PARAMETERS[0], "1000")
    with pytest.raises(UserError, match="more than 1,000 parameters"):
        build_model(tiny_config, 2)
    nn.Linear(100, 100)
    monkeypatch.setenv(PARAMETERS[0], "2000000")
    build_model(tiny_config, 2)
    monkeypatch.setenv(PARAMETERS[0], "many")
    with pytest.raises(UserError, match="GHOSTNET_MAX_PARAMETERS must be a whole number above 0, not 'many'"):
        build_model(tiny_config, 2)


def test_other_errors_and_many_layers():
    with pytest.raises(TypeError, match="mine"), parameter_limit({"a": 1}):
        raise TypeError("mine")
    with pytest.raises(UserError, match="a=1: the network has more than 5,000 layers"), parameter_limit({"a": 1}):
        for _ in range(MAX_TENSORS + 1):
            nn.Module().register_parameter("x", nn.Parameter(torch.empty(1)))


SIZES = {
    "short_side": ("data.short_side=30000", "data.long_side=30000"),
    "long_side": (f"data.long_side={HUGE}",),
    "multi_scale": ("data.multi_scale=[96, 200000]",),
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("option", ["--dry-run", "--profile", None])
def test_images_that_are_too_large(tiny_file, name, option):
    outcome = run("train", tiny_file, *SIZES[name], *([option] if option else []))
    outcome.assert_error("data", name, "pixels an image, and the limit is 36,000,000", INPUT_PIXELS[0])


def test_images_that_are_too_large_for_pretraining(tmp_path):
    raw = {"output_dir": str(tmp_path / "run"), "data": {"train": "a", "val": "b", "size": 50_000}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    run("pretrain", tmp_path / "config.yaml").assert_error("data", "size", "pixels an image", INPUT_PIXELS[0])


def test_the_limit_of_images_can_be_raised(tiny_config, monkeypatch):
    monkeypatch.setenv(INPUT_PIXELS[0], "1000000000")
    assert tiny_config.with_overrides(["data.short_side=30000", "data.long_side=30000"]).data.short_side == 30000


def test_widths_of_a_pretraining(tmp_path):
    for i in range(4):
        path = tmp_path / ("train", "val")[i % 2] / "ab"[i // 2] / "1.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(path)
    raw = {
        "output_dir": str(tmp_path / "run"),
        "model": {"name": "ghostnet", "width": 1000},
        "data": {"train": str(tmp_path / "train"), "val": str(tmp_path / "val"), "size": 32, "workers": 0},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    run("pretrain", tmp_path / "config.yaml").assert_error("model.width=1000", PARAMETERS[0])
    assert not (tmp_path / "run").exists()
