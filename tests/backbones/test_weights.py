"""No weight is lost in silence."""

import logging
import os
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from backbones import GhostNet, WeightsError, build_backbone, load_weights, read_weights


@pytest.fixture(scope="module")
def published():
    """A state dict in the published layout, classifier included."""
    torch.manual_seed(1)
    return GhostNet(0.5).state_dict()


@pytest.mark.parametrize("kind", ["pth", "safetensors", "nested"])
def test_load_from_file(tmp_path, published, kind, caplog, monkeypatch):
    # The tools' logging, where a test before has set it up, keeps records to itself.
    monkeypatch.setattr(logging.getLogger("backbones"), "propagate", True)
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    if kind == "safetensors":
        save_file(published, path)
    elif kind == "nested":  # as saved by DataParallel training scripts
        torch.save({"state_dict": {f"module.{k}": v for k, v in published.items()}, "epoch": 3}, path)
    else:
        torch.save(published, path)
    with caplog.at_level("INFO", "backbones"):
        backbone = build_backbone("ghostnet", width=0.5, weights=str(path))
    assert backbone.pretrained
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, published[key]), key
    count = len(backbone.state_dict())
    assert f"{count} matched, 0 missing, 0 unexpected, 0 shape-mismatched" in caplog.text
    assert f"({512 - count} classifier tensors not needed here)" in caplog.text


def test_torchvision_weights_load(tmp_path):
    import torchvision

    network = torchvision.models.mobilenet_v3_large()
    torch.save(network.state_dict(), tmp_path / "v3.pth")
    backbone = build_backbone("mobilenet_v3_large", weights=str(tmp_path / "v3.pth"))
    assert torch.equal(backbone.state_dict()["features.15.block.0.0.weight"], network.features[15].block[0][0].weight)


def test_another_width_is_refused(published):
    with pytest.raises(WeightsError, match=r"another width.*model\.backbone\.width"):
        load_weights(build_backbone("ghostnet", width=1.0), published)


def test_nothing_matches_is_refused():
    with pytest.raises(WeightsError, match=r"0 matched.*Nothing matches"):
        load_weights(build_backbone("ghostnet"), nn.Linear(2, 2).state_dict())


def test_the_older_release_is_refused():
    old = {
        "features.0.0.weight": torch.zeros(16, 3, 3, 3),
        "features.1.conv.0.primary_conv.0.weight": torch.zeros(8, 16, 1, 1),
    }
    with pytest.raises(WeightsError, match=r"older ghostnet\.pytorch release.*different network"):
        load_weights(build_backbone("ghostnet"), old)


def test_missing_parts_are_refused_and_the_model_is_untouched(published):
    backbone = build_backbone("ghostnet", width=0.5)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    partial = {k: v for k, v in published.items() if not k.startswith("blocks.8.")}
    with pytest.raises(WeightsError, match=r"lacks parts of the network \(blocks\.8\.0"):
        load_weights(backbone, partial)
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


def test_old_files_without_step_counters_load(published):
    state = {k: v for k, v in published.items() if not k.endswith("num_batches_tracked")}
    report = load_weights(build_backbone("ghostnet", width=0.5), state)
    assert report.missing == [] and len(report.matched) > 300


class _Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile-was-here",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.pth", None, "does not exist"),
        ("text.pth", b"not a checkpoint", "cannot be read"),
        ("empty.pth", b"", "cannot be read"),
        ("text.safetensors", b"not safetensors", "cannot be read|not a safetensors"),
    ],
)
def test_unreadable_files(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=message) as error:
        read_weights(tmp_path / name, "ghostnet", 1.0)
    assert name in str(error.value)


def test_a_hostile_pickle_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": _Hostile()}, "hostile.pth")
    with pytest.raises(WeightsError, match="cannot be read"):
        read_weights("hostile.pth", "ghostnet", 1.0)
    assert not (tmp_path / "hostile-was-here").exists()


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}])
def test_files_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=re.escape(str(tmp_path / "w.pth"))):
        read_weights(tmp_path / "w.pth", "ghostnet", 1.0)


def test_timm_has_width_1_only():
    with pytest.raises(WeightsError, match=r"no ImageNet weights for ghostnet at width 1\.1"):
        build_backbone("ghostnet", width=1.1, weights="timm")


def test_timm_without_network_says_what_to_do():
    # HF_HUB_OFFLINE is set in conftest, so the hub's own client refuses.
    with pytest.raises(WeightsError, match=r"ghostnet_100\.in1k could not be fetched.*download the file"):
        build_backbone("ghostnet", weights="timm")


def test_timm_weights_come_through_its_client(monkeypatch):
    import timm

    network = timm.create_model("ghostnet_100")
    asked = []

    def create(name, pretrained):
        asked.append((name, pretrained))
        return network

    monkeypatch.setattr(timm, "create_model", create)
    backbone = build_backbone("ghostnet", weights="timm")
    assert asked == [("ghostnet_100.in1k", True)]
    assert torch.equal(backbone.conv_stem.weight, network.conv_stem.weight)


def test_freezing_random_layers_is_refused():
    backbone = build_backbone("ghostnet", width=0.5)
    with pytest.raises(ValueError, match="only pretrained layers"):
        backbone.freeze(1)
    # build_backbone ignores it without weights: nothing may be frozen then.
    backbone = build_backbone("ghostnet", width=0.5, frozen_stages=2, freeze_bn=True)
    assert all(p.requires_grad for p in backbone.parameters())


@pytest.mark.parametrize(
    ("stages", "frozen"),
    [
        (0, ()),
        (1, ("conv_stem", "bn1", "blocks.0.", "blocks.1.", "blocks.2.")),
        (2, ("conv_stem", "bn1", *(f"blocks.{i}." for i in range(5)))),
        (4, ("conv_stem", "bn1", "blocks.")),
    ],
)
def test_frozen_stages_do_not_move(tmp_path, published, stages, frozen):
    torch.save(published, tmp_path / "w.pth")
    backbone = build_backbone("ghostnet", width=0.5, weights=str(tmp_path / "w.pth"), frozen_stages=stages)
    backbone.train()
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad] or [torch.zeros(1)], 0.1)
    loss = sum(x.square().mean() for x in backbone(torch.randn(2, 3, 64, 64)).values())
    if loss.requires_grad:
        loss.backward()
        optimizer.step()
    for key, value in backbone.state_dict().items():
        if key.endswith(("num_batches_tracked", "running_mean")):
            assert torch.equal(value, published[key]) == key.startswith(frozen or "-"), key
        elif key.startswith(frozen or "-"):
            assert torch.equal(value, published[key]), key


def test_frozen_bn_keeps_its_statistics_and_leaves_convolutions_free(tmp_path, published):
    torch.save(published, tmp_path / "w.pth")
    backbone = build_backbone("ghostnet", width=0.5, weights=str(tmp_path / "w.pth"), freeze_bn=True).train()
    backbone(torch.randn(2, 3, 64, 64))
    for key, value in backbone.state_dict().items():
        if "running" in key:
            assert torch.equal(value, published[key])
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert not module.training and not module.weight.requires_grad
        if isinstance(module, nn.Conv2d):
            assert module.weight.requires_grad
