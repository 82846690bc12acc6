"""GhostNet against the paper's numbers and, block by block, against timm's independent implementation."""

from collections import OrderedDict

import pytest
import timm
import torch
from conftest import run_seed
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from backbones import GhostBottleneck, GhostModule, GhostNet, build_backbone
from backbones.ghost import make_divisible

pytestmark = pytest.mark.numeric

TIMM_NAMES = {0.5: "ghostnet_050", 1.0: "ghostnet_100", 1.3: "ghostnet_130"}


def parameters(model: nn.Module) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6


@pytest.mark.parametrize(
    ("width", "classifier", "trunk"),
    [(0.5, 2.587, 0.651), (1.0, 5.183, 2.516), (1.1, 5.856, 3.034), (1.3, 7.359, 4.217)],
)
def test_parameter_counts(width, classifier, trunk):
    assert parameters(GhostNet(width)) == pytest.approx(classifier, abs=6e-4)
    assert parameters(build_backbone("ghostnet", width=width)) == pytest.approx(trunk, abs=6e-4)


def test_multiply_adds_of_the_papers_coco_backbone():
    model = GhostNet(1.1).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    # FlopCounterMode counts a multiply-add as two.
    assert 164e6 <= counter.get_total_flops() / 2 <= 167e6


@pytest.mark.parametrize(
    ("width", "channels"),
    [(0.5, [12, 20, 56, 80]), (1.0, [24, 40, 112, 160]), (1.1, [28, 44, 124, 176]), (1.3, [32, 52, 144, 208])],
)
def test_channels_and_strides(width, channels):
    backbone = build_backbone("ghostnet", width=width)
    assert list(backbone.channels.values()) == channels
    assert backbone.strides == {"c2": 4, "c3": 8, "c4": 16, "c5": 32}


def test_zero_init_residual_starts_as_identity_and_learns():
    backbone = build_backbone("ghostnet", width=0.5)
    plain = [m for m in backbone.modules() if isinstance(m, GhostBottleneck) and len(m.shortcut) == 0]
    assert len(plain) == 11
    x = torch.rand(2, plain[-1].ghost2.out_channels, 4, 4)
    assert torch.equal(plain[-1](x), x)
    optimizer = torch.optim.SGD(backbone.parameters(), 0.1)
    before = [p.clone() for p in plain[-1].parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        backbone(torch.rand(2, 3, 64, 64))["c5"].square().sum().backward()
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, plain[-1].parameters(), strict=True))


@pytest.mark.parametrize("width", TIMM_NAMES)
def test_features_match_timm(width):
    reference = timm.create_model(TIMM_NAMES[width]).eval()
    backbone = build_backbone("ghostnet", width=width).eval()
    torch.manual_seed(run_seed())
    for module in reference.modules():  # statistics as after training, not the neutral ones
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)

    def reference_features(x):
        taps = OrderedDict()
        x = reference.act1(reference.bn1(reference.conv_stem(x)))
        for i, stage in enumerate(reference.blocks):
            x = stage(x)
            if i in (2, 4, 6, 8):
                taps[f"c{i // 2 + 1}"] = x
        return taps

    own = {k: v for k, v in reference.state_dict().items() if k in backbone.state_dict()}
    assert len(own) == len(backbone.state_dict())
    backbone.load_state_dict(own)
    image = torch.randn(2, 3, 97, 131)
    with torch.no_grad():
        for (level, expected), (name, found) in zip(
            reference_features(image).items(), backbone(image).items(), strict=True
        ):
            assert level == name
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    # And the other way round: random weights of ours in timm's network, classifier included.
    classifier = GhostNet(width).eval()
    reference.load_state_dict(classifier.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(reference(image), classifier(image), rtol=0, atol=1e-5)
        expected = classifier.extract(image)
        for level, found in reference_features(image).items():
            torch.testing.assert_close(found, expected[level], rtol=0, atol=1e-5)


def test_state_dict_is_the_published_layout():
    assert list(GhostNet().state_dict()) == list(timm.create_model("ghostnet_100").state_dict())
    assert len(GhostNet().state_dict()) == 512


def test_backbone_has_no_classifier():
    keys = build_backbone("ghostnet").state_dict()
    assert not [k for k in keys if k.startswith(("blocks.9", "conv_head", "classifier"))]
    assert [k for k in keys if k.startswith("blocks.8.3.")]


@pytest.mark.parametrize(("ratio", "out"), [(2, 16), (2, 15), (3, 16), (4, 10), (5, 7)])
def test_ghost_module_channels(ratio, out):
    module = GhostModule(8, out, 3, ratio=ratio, cheap_kernel_size=5, stride=2)
    assert module(torch.zeros(1, 8, 9, 9)).shape == (1, out, 5, 5)
    assert module.primary_conv[0].out_channels == -(-out // ratio)


@pytest.mark.parametrize(("value", "expected"), [(16 * 1.1, 16), (24 * 1.1, 28), (40 * 0.5, 20), (3, 4), (5.9, 8)])
def test_make_divisible(value, expected):
    assert make_divisible(value, 4) == expected
    assert make_divisible(value, 4) >= 0.9 * value
