"""ghostify: the convolutions that it replaces, and that the rest of the network does not change."""

import copy
import warnings

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from backbones import GhostModule
from backbones.ghost_conv import GhostConv2d
from backbones.ghost_conversion import PREDICTIONS, ghostify, load_ghosted


def conv(*args, **kwargs):
    return nn.Conv2d(*args, **kwargs)


def reasons(report):
    return {layer.name: layer.reason for layer in report.skipped}


def ghosts(model):
    return [name for name, module in model.named_modules() if isinstance(module, GhostConv2d)]


@settings(max_examples=60, deadline=None)
@given(
    channels=st.tuples(st.integers(1, 6), st.integers(2, 23)),
    kernel=st.sampled_from([1, 2, 3, (1, 5), 7]),
    stride=st.integers(1, 3),
    padding=st.sampled_from([0, 1, (2, 0), "valid", "same"]),
    dilation=st.integers(1, 2),
    bias=st.booleans(),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    ratio=st.integers(2, 30),
    cheap=st.sampled_from([1, 3, 5]),
)
def test_drop_in_has_the_shape_of_the_convolution(
    channels, kernel, stride, padding, dilation, bias, mode, ratio, cheap
):
    stride = 1 if padding == "same" else stride
    host = nn.Sequential(conv(*channels, kernel, stride, padding, dilation, bias=bias, padding_mode=mode))
    x = torch.rand(2, channels[0], 15, 17)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch tells of a copy that "same" with an even kernel costs
        expected = host(x).shape, host(x[0]).shape
        report = ghostify(host, ratio, cheap, min_channels=2, skip_first=False)
        found = host(x).shape, host(x[0]).shape
    assert found == expected
    if report.replaced:
        ghost = host[0]
        assert ghost.primary.out_channels == -(-channels[1] // min(ratio, channels[1]))
        assert (ghost.primary.bias is None) == (ghost.cheap.bias is None) == (not bias)
        assert ghost.primary.padding_mode == mode and ghost.cheap.padding_mode == "zeros"
    else:
        assert "cheap filter" in report.layers[0].reason


def test_paper_arithmetic_and_report():
    model = nn.Sequential(conv(3, 16, 3, padding=1), nn.ReLU(), conv(16, 64, 3, padding=1, bias=False), nn.ReLU())
    report = ghostify(model, 2, 3, example=torch.zeros(1, 3, 10, 12))
    assert ghosts(model) == ["2"] and reasons(report) == {"0": "first convolution"}
    layer = report.replaced[0]
    assert (layer.parameters_before, layer.parameters_after) == (16 * 64 * 9, 16 * 32 * 9 + 32 * 9)
    assert (layer.before.macs, layer.after.macs) == (120 * 16 * 64 * 9, 120 * (16 * 32 * 9 + 32 * 9))
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    assert report.before.macs - report.after.macs == layer.before.macs - layer.after.macs
    lines = str(report).splitlines()
    assert "kept: first convolution" in lines[1] and "9.22 k" in lines[2] and "-47%" in lines[2]
    assert "1 of 2 replaced" in lines[-1]


@pytest.mark.numeric
def test_random_weights_keep_the_standard_deviation_and_the_variance_of_maps():
    head = conv(64, 256, 3, padding=1)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.constant_(head.bias, -2.0)
    model = nn.Sequential(head)
    ghostify(model, skip_first=False)
    assert float(model[0].primary.weight.detach().std()) == pytest.approx(0.01, rel=0.05)
    assert (model[0].primary.bias == -2).all() and (model[0].cheap.bias == -2).all()
    maps = torch.randn(1, 128, 64, 64)
    ghost = nn.functional.conv2d(maps, model[0].cheap.weight, padding=1, groups=128)
    assert float((ghost.var() / maps.var()).detach()) == pytest.approx(1, abs=0.1)


def test_kept_layers_and_reasons():
    class Zoo(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = conv(3, 32, 3)
            self.narrow = conv(32, 8, 3)
            self.depthwise = conv(32, 32, 3, groups=32)
            self.grouped = conv(32, 32, 3, groups=4)
            self.up = nn.ConvTranspose2d(32, 32, 2)
            self.line = nn.Conv1d(32, 32, 3)
            self.lazy = nn.LazyConv2d(32, 3)
            self.normed = nn.utils.parametrizations.weight_norm(conv(32, 32, 3))
            self.pruned = prune.l1_unstructured(conv(32, 32, 3), "weight", 0.5)
            self.hooked = conv(32, 32, 3)
            self.hooked.register_forward_hook(lambda *args: None)
            self.tied1, self.tied2 = conv(32, 32, 3), conv(32, 32, 3)
            self.tied2.weight = self.tied1.weight
            self.subclass = torchvision.ops.misc.Conv2dNormActivation(3, 32)[0].__class__(32, 32, 3)
            self.qat = type("Special", (nn.Conv2d,), {})(32, 32, 3)
            self.se = nn.Sequential(conv(32, 32, 1))
            self.excite = torchvision.ops.SqueezeExcitation(32, 32)
            self.ghost = GhostModule(32, 32, 3)
            self.dear = conv(4, 32, 1)
            self.cls_logits = conv(32, 32, 3)
            self.plain = conv(32, 32, 3)

    model = Zoo()
    found = reasons(ghostify(model))
    assert ghosts(model) == ["subclass", "plain"]
    expected = {
        "stem": "first",
        "narrow": "8 channels, fewer than 16",
        "depthwise": "depthwise",
        "grouped": "4 groups",
        "up": "ConvTranspose2d",
        "line": "Conv1d",
        "lazy": "not initialized",
        "normed": "parametrized",
        "pruned": "parametrized",
        "hooked": "hooks",
        "tied1": "also that of tied2",
        "tied2": "also that of tied1",
        "qat": "a Special",
        "se.0": "maps are 1x1",
        "excite.fc1": "maps are 1x1",
        "ghost.primary_conv.0": "part of a ghost module",
        "dear": "a cheap filter has 9 weights, its own have 4",
        "cls_logits": "excluded",
    }
    for name, words in expected.items():
        assert words in found[name], (name, found[name])
    assert not ghostify(model).replaced  # a second call finds nothing more to do


def test_layers_with_1x1_maps_are_kept():
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Sequential(conv(32, 32, 1)), nn.ReLU())
    model = nn.Sequential(conv(3, 32, 3), pooled, nn.Sequential(nn.AdaptiveAvgPool2d(4), conv(32, 32, 1)))
    found = reasons(ghostify(model))
    assert "maps are 1x1" in found["1.1.0"] and ghosts(model) == ["2.1"]
    # A small image changes nothing: what is replaced depends on the network alone.
    recipes = []
    for size in (32, 64):
        network = torchvision.models.mobilenet_v3_small()
        recipes.append(ghostify(network, example=torch.rand(1, 3, size, size)).recipe)
        assert not [name for name in ghosts(network) if ".fc" in name]
    assert recipes[0] == recipes[1]


def test_patterns():
    def model():
        return nn.Sequential(*[nn.Sequential(conv(16, 16, 3), conv(16, 16, 3)) for _ in range(3)])

    host = model()
    ghostify(host, include=["1.*", "*.0"], exclude=["2.*"])
    assert ghosts(host) == ["1.0", "1.1"]
    host = model()
    ghostify(host, include=["0.*"], skip_first=False)
    assert ghosts(host) == ["0.0", "0.1"]
    for wrong in ({"include": ["layr.*"]}, {"exclude": ["layr.*"]}):
        with pytest.raises(ValueError, match=r"no convolution's name matches 'layr\.\*'; the first are 0\.0, 0\.1"):
            ghostify(model(), **wrong)


def test_bad_arguments():
    host = nn.Sequential(conv(16, 16, 3))
    with pytest.raises(ValueError, match="ratio must be at least 2"):
        ghostify(host, 1)
    with pytest.raises(ValueError, match="must be odd, not 4"):
        ghostify(host, 2, 4)
    with pytest.raises(ValueError, match=r"wrap it in nn\.Sequential"):
        ghostify(host[0])
    with pytest.raises(ValueError, match="Linear has no convolutions"):
        ghostify(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no calibration inputs"):
        ghostify(host, skip_first=False, calibration=[])
    with pytest.raises(ValueError, match="do not reach 1"):
        branch = nn.ModuleDict({"0": conv(16, 16, 3), "1": conv(16, 16, 3)})
        branch.forward = lambda x: branch["0"](x)
        ghostify(branch, calibration=[torch.rand(1, 16, 8, 8)])
    assert ghosts(host) == []


def test_a_shared_module_is_replaced_everywhere():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = conv(3, 16, 1)
            self.a = conv(16, 16, 3, padding=1)
            self.inner = nn.ModuleDict({"b": self.a})

        def forward(self, x):
            return self.inner["b"](self.a(self.stem(x)))

    model = Twice()
    x = torch.rand(1, 3, 6, 6)
    report = ghostify(model, example=x, calibration=[x])
    assert model.a is model.inner["b"] and isinstance(model.a, GhostConv2d)
    assert len(report.replaced) == 1
    assert model(x).shape == (1, 16, 6, 6)


def test_state_is_kept():
    model = nn.Sequential(conv(3, 16, 3), conv(16, 32, 3), nn.BatchNorm2d(32), nn.Dropout()).to(torch.bfloat16)
    model[1].weight.requires_grad_(False)
    model.train()
    model[1].eval()
    statistics = copy.deepcopy(model[2].state_dict())
    x = torch.rand(2, 3, 9, 9).bfloat16()
    ghostify(model, example=x, calibration=[x])
    ghost = model[1]
    assert {p.dtype for p in ghost.parameters()} == {torch.bfloat16}
    assert not ghost.primary.weight.requires_grad and not ghost.cheap.weight.requires_grad
    assert ghost.primary.bias.requires_grad and ghost.cheap.bias.requires_grad
    assert not ghost.training and not ghost.cheap.training and model[2].training and model[3].training
    for key, value in statistics.items():  # nothing ran in training mode
        assert torch.equal(model[2].state_dict()[key], value)
    assert not any(m._forward_hooks for m in model.modules())


def test_meta_device():
    with torch.device("meta"):
        model = torchvision.models.resnet18()
        report = ghostify(model, example=torch.zeros(1, 3, 224, 224))
    assert len(report.replaced) == 19 and all(p.is_meta for p in model.parameters())
    assert report.before.macs == pytest.approx(1.814e9, rel=1e-3) and report.after.macs < 0.56 * report.before.macs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu():
    model = nn.Sequential(conv(3, 16, 3), conv(16, 32, 3)).cuda()
    x = torch.rand(2, 3, 12, 12, device="cuda")
    ghostify(model, example=x, calibration=[x])
    assert {t.device.type for t in model.state_dict().values()} == {"cuda"}
    assert model(x).shape == (2, 32, 8, 8)


@pytest.mark.numeric
def test_copies_state_dicts_and_compilation():
    model = nn.Sequential(conv(3, 16, 3), conv(16, 33, 3), nn.ReLU()).eval()
    plain = copy.deepcopy(model)
    x = torch.rand(2, 3, 16, 16)
    report = ghostify(model, ratio=3, calibration=[x])
    assert model[1].permuted
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        # Another of the same build, with random weights and so in plain order, takes weights and order.
        ghostify(plain, **report.recipe)
        assert not plain[1].permuted
        plain.load_state_dict(model.state_dict())
        assert torch.equal(plain(x), expected)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)


@pytest.mark.numeric
def test_a_file_of_the_tool(tmp_path):

    def plain():
        return nn.Sequential(conv(3, 16, 3), conv(16, 32, 3))

    model, x = plain(), torch.rand(1, 3, 12, 12)
    report = ghostify(model, calibration=[x])
    path = tmp_path / "ghosted.pth"
    torch.save({"network": "mine", "ghostify": report.recipe, "state_dict": model.state_dict()}, path)
    other = plain()
    load_ghosted(other, path)
    assert torch.equal(other(x), model(x))
    with pytest.raises(ValueError, match=r"of another network \(mine\)"):
        load_ghosted(nn.Sequential(conv(3, 16, 3), conv(16, 48, 3)), path)
    torch.save(model.state_dict(), path)
    with pytest.raises(ValueError, match=r"was not written by the command ghostify"):
        load_ghosted(plain(), path)
    path.write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot be read"):
        load_ghosted(plain(), path)


@pytest.mark.parametrize(
    ("name", "replaced", "size"),
    [("resnet18", 19, 32), ("resnet50", 52, 32), ("vgg16", 12, 32), ("mobilenet_v3_small", 22, 64)],
)
def test_torchvisions_networks(name, replaced, size):
    model = torchvision.models.get_model(name).eval()
    if name == "vgg16":
        model.classifier = nn.Linear(25088, 10)  # half a gigabyte of weights that are not the matter here
    x = torch.rand(2, 3, size, size)
    expected = model(x).shape
    report = ghostify(model, example=x)
    assert len(report.replaced) == replaced == len(ghosts(model))
    assert report.after.macs < 0.8 * report.before.macs and report.after.parameters == report.parameters_after
    y = model.train()(x)
    assert y.shape == expected
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_torchvision_detector_keeps_its_prediction_layers():
    model = torchvision.models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=20)
    found = reasons(ghostify(model, include=["head.*", "backbone.fpn.*"]))
    assert found["head.classification_head.cls_logits"] == found["head.regression_head.bbox_reg"] == "excluded"
    assert len([n for n in ghosts(model) if n.startswith("head.")]) == 8
    assert len([n for n in ghosts(model) if n.startswith("backbone.fpn.")]) == 8
    with_logits = ghostify(model, include=["head.*"], exclude=())
    assert "head.classification_head.cls_logits" in [layer.name for layer in with_logits.replaced]
    assert all(isinstance(pattern, str) for pattern in PREDICTIONS)
