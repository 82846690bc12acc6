"""All backbones: levels, strides, gradients, freezing, and that no layer is lost."""

import copy
import sys

import pytest
import timm
import torch
import torchvision
from conftest import run_seed
from torch import nn

from backbones import build_backbone
from backbones.features import torchvision_names
from backbones.sequential_features import SequentialFeatures

QUICK = [
    "ghostnet",
    "ghostnetv2",
    "mobilenet_v3_large",
    "resnet18",
    "shufflenet_v2_x0_5",
    "timm/ghostnetv3_050",
    "timm/repghostnet_050",
    "timm/tf_efficientnet_lite0",
    "timm/convnext_atto",
]
SLOW = [
    "mobilenet_v2",
    "mobilenet_v3_small",
    "resnet50",
    "vgg16",
    "vgg11_bn",
    "densenet121",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "googlenet",
    "mnasnet0_5",
    "regnet_y_400mf",
    "convnext_tiny",
    "timm/ghostnet_050",
    "timm/ghostnetv2_100",
    "timm/ghostnetv3_100",
    "timm/repghostnet_100",
    "timm/mobilenetv3_large_100",
    "timm/mobilenetv4_conv_small",
    "timm/mobileone_s0",
    "timm/resnet18",
    "timm/resnetv2_50",
    "timm/repvgg_a0",
    "timm/regnety_002",
    "timm/densenet121",
    "timm/vgg11",
    "timm/edgenext_xx_small",
]
EVERY = QUICK + [pytest.param(name, marks=pytest.mark.slow) for name in SLOW]


@pytest.fixture(scope="module", params=EVERY)
def backbone(request):
    torch.manual_seed(run_seed())
    built = build_backbone(request.param)
    built.asked = request.param
    return built


def reference(name):
    """The whole network from its original package."""
    own = {"ghostnet": "timm/ghostnet_100", "ghostnetv2": "timm/ghostnetv2_100"}
    name = own.get(name, name)
    if name.startswith("timm/"):
        return timm.create_model(name.removeprefix("timm/"))
    return torchvision.models.get_model(name, weights=None)


def sides(x, stride):
    """The allowed roundings of H / stride, for networks with and without padding."""
    return [(side // stride, -(-side // stride)) for side in x.shape[2:]]


def test_levels_and_strides(backbone):
    assert backbone.out_levels == ("c2", "c3", "c4", "c5")
    assert backbone.strides == {"c2": 4, "c3": 8, "c4": 16, "c5": 32}
    backbone.eval()
    for height, width in [(64, 96), (97, 131)]:
        images = torch.randn(2, 3, height, width)
        with torch.no_grad():
            features = backbone(images)
        assert list(features) == ["c2", "c3", "c4", "c5"]
        for level, x in features.items():
            assert x.shape[:2] == (2, backbone.channels[level])
            for side, (low, high) in zip(x.shape[2:], sides(images, backbone.strides[level]), strict=True):
                assert low <= side <= high, (level, x.shape)


@pytest.mark.numeric
def test_every_parameter_learns(backbone):
    backbone.train().zero_grad()
    sum(x.square().mean() for x in backbone(torch.randn(2, 3, 97, 131)).values()).backward()
    assert [name for name, p in backbone.named_parameters() if p.grad is None] == []


@pytest.mark.numeric
def test_each_level_is_the_last_module_of_its_stride(backbone, as_trained):
    """In the network as its authors run it, each level goes straight into a module that shrinks it, and after c5
    comes no convolution that looks further than one place."""
    network = as_trained(reference(backbone.asked))
    weights = network.state_dict()
    own = copy.deepcopy(backbone).eval()
    own.load_state_dict({key: weights[key] for key in own.state_dict()})
    calls, spatial = [], []

    def watch(module, args, output):
        if isinstance(output, torch.Tensor) and args and isinstance(args[0], torch.Tensor):
            calls.append((args[0].clone(), output.clone()))

    def watch_convolution(module, args, output):
        if max(module.kernel_size) > 1 and output.shape[2:].numel() > 1:
            spatial.append(len(calls))

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(watch_convolution)
        module.register_forward_hook(watch)
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        features = own(images)
        network(images)

    def same(x, y):
        return x.shape == y.shape and torch.allclose(x, y, atol=1e-5)

    for level, x in features.items():
        assert x.std() > 1e-2  # else anything would be close to it
        if level == "c5":
            # Not a shortcut, which hands on what it takes.
            makers = [i for i, (taken, given) in enumerate(calls) if same(given, x) and not same(taken, x)]
            assert max(spatial) <= makers[-1]
        else:
            half = (x.shape[2] // 2, x.shape[3] // 2)
            assert any(same(taken, x) and tuple(given.shape[2:]) == half for taken, given in calls), level


@pytest.mark.numeric
def test_freezing_by_stage(backbone):
    frozen = copy.deepcopy(backbone)
    frozen.pretrained = True
    frozen.freeze(2)
    before = {key: value.clone() for key, value in frozen.state_dict().items()}
    stages = [part for level, parts in frozen.stage_modules() if level <= "c3" for part in parts]
    early = {id(p) for part in stages for p in part.parameters()}
    assert early and all(p.requires_grad == (id(p) not in early) for p in frozen.parameters())
    frozen.train()(torch.randn(2, 3, 64, 96))
    names = {id(module): name for name, module in frozen.named_modules()}
    for level, modules in frozen.stage_modules():
        for module in (m for part in modules for m in part.modules() if isinstance(m, nn.BatchNorm2d)):
            for statistic in ("running_mean", "num_batches_tracked") if level <= "c3" else ():
                assert torch.equal(getattr(module, statistic), before[f"{names[id(module)]}.{statistic}"])
            assert module.num_batches_tracked > 0 or level <= "c3"


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("mobilenet_v2", [24, 32, 96, 320]),
        ("mobilenet_v3_large", [24, 40, 112, 160]),
        ("timm/ghostnet_100", [24, 40, 112, 160]),
        ("timm/repghostnet_100", [24, 40, 112, 160]),
        ("timm/mobilenetv3_large_100", [24, 40, 112, 160]),
        ("timm/mobileone_s0", [48, 128, 256, 1024]),
    ],
)
def test_classifier_convolution_is_removed(name, channels):
    """… but not the 1x1 half of a separable convolution, as MobileOne's last one."""
    assert list(build_backbone(name).channels.values()) == channels


def test_out_levels_and_order():
    backbone = build_backbone("ghostnet", out_levels=("c5", "c3")).eval()
    assert list(backbone(torch.zeros(1, 3, 32, 32))) == ["c3", "c5"]
    assert backbone.channels == {"c3": 40, "c5": 160}
    assert build_backbone("resnet18", out_levels=("c1",)).channels == {"c1": 64}


def test_widths():
    assert list(build_backbone("mobilenet_v2", width=0.5).channels.values()) == [16, 16, 48, 160]
    assert list(build_backbone("ghostnetv2", width=1.6).channels.values()) == [40, 64, 180, 256]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "ghostnett"}, r"unknown backbone 'ghostnett' \(did you mean 'ghostnet'\?\)"),
        ({"name": "resnet5"}, "did you mean 'resnet50'"),
        ({"name": "timm/ghostnetv3_10"}, r"has no network 'ghostnetv3_10'; did you mean timm/ghostnetv3_1"),
        (
            {"name": "timm/resnet18.best"},
            r"timm/resnet18\.best: Invalid pretrained tag.*published: .*timm/resnet18\.a1_in1k",
        ),
        ({"name": "ghostnet", "width": 0}, "width must be positive"),
        ({"name": "resnet18", "width": 0.5}, "resnet18 has no width to set; mobilenet_v2"),
        ({"name": "timm/ghostnet_100", "width": 0.5}, "timm has a name for each width"),
        ({"name": "ghostnet", "out_levels": ("c6",)}, "unknown feature level 'c6'"),
        ({"name": "resnet18", "out_levels": ("c6",)}, "unknown feature level 'c6'; this backbone has c1, c2"),
        ({"name": "vit_b_32"}, "vit_b_32 cannot be a backbone: it does not take images of any size"),
        ({"name": "swin_t"}, "only these strides were found.*: 4. Vision transformers"),
        ({"name": "squeezenet1_1"}, "of strides 4, 8, 16 and 32 .*: none"),
        ({"name": "timm/test_vit"}, "timm/test_vit cannot be a backbone"),
        ({"name": "timm/csatv2"}, "only these strides were found.*: 8, 16, 32"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(**arguments)


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"timm/resnet18 needs the package timm: pip install -e '\.\[timm\]'"):
        build_backbone("timm/resnet18")


class Odd(nn.Module):
    """resnet18 with one operation in its forward pass that is not a module."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.body = torchvision.models.resnet18()
        for name, child in self.body.named_children():
            self.add_module(name, child)
        del self.body

    def forward(self, x):
        x = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        if self.kind == "in place between layers":
            x.mul_(0.5)
        x = self.layer3(self.layer2(x))
        y = self.layer4[0](x)
        if self.kind == "skips":
            y = y + nn.functional.avg_pool2d(x, 2).repeat(1, 2, 1, 1)
        y = self.layer4[1](y)
        if self.kind == "stride 64":
            y = nn.functional.conv2d(self.conv1(y[:, :3]), self.layer1[0].conv1.weight)
        return y.mean((2, 3))


def test_sequential_forward_pass_is_found():
    backbone = SequentialFeatures(Odd("none"), "odd").eval()
    assert list(backbone.state_dict()) == [k for k in Odd("none").state_dict() if not k.startswith("fc.")]


@pytest.mark.parametrize("kind", ["in place between layers", "skips"])
def test_network_that_is_not_sequential_raises(kind):
    with pytest.raises(ValueError, match="odd cannot be a backbone"):
        SequentialFeatures(Odd(kind), "odd")


@pytest.mark.parametrize("name", ["ghostnetv2", "convnext_tiny", "timm/ghostnetv2_100"])
def test_images_too_small_for_the_network(name):
    backbone = build_backbone(name).eval()
    with pytest.raises(ValueError, match=r"images of 16x40 pixels are too small .*enlarge them to 64"):
        backbone(torch.zeros(1, 3, 16, 40))


def test_other_errors_keep_their_names():
    with pytest.raises(RuntimeError, match="channels"):
        build_backbone("ghostnetv2").eval()(torch.zeros(1, 1, 64, 64))


@pytest.mark.parametrize("name", ["ghostnet", "mobilenet_v2", "timm/repghostnet_050"])
@pytest.mark.parametrize("size", [(33, 47), (1, 1)])
def test_networks_that_pad_take_any_image(name, size):
    backbone = build_backbone(name).eval()
    with torch.no_grad():
        for level, x in backbone(torch.zeros(1, 3, *size)).items():
            assert tuple(x.shape[2:]) == tuple(-(-side // backbone.strides[level]) for side in size)


@pytest.mark.numeric
@pytest.mark.parametrize("name", ["timm/repghostnet_050", "timm/ghostnetv3_050", "ghostnet", "resnet18"])
def test_fused_for_inference(name, as_trained):
    backbone = as_trained(build_backbone(name))
    images = torch.randn(2, 3, 97, 131)
    before = sum(p.numel() for p in backbone.parameters())
    with torch.no_grad():
        expected = backbone(images)
        fused = backbone.fuse()
        found = fused(images)
    assert fused is backbone and not fused.training
    after = sum(p.numel() for p in fused.parameters())
    assert after < before if name.startswith("timm/") else after == before
    for level, x in found.items():
        assert x.std() > 1e-2  # else anything would be close to it
        assert (x - expected[level]).abs().max() <= 1e-5 * expected[level].abs().max()


REFUSED = {"alexnet", "inception_v3", "maxvit_t", "squeezenet1_0", "squeezenet1_1"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_of_torchvision():
    """Every classifier works or raises an error; the list of the latter is known."""
    names = [name for name in torchvision_names() if not name.startswith(("regnet_y_128gf", "vit_", "swin_"))]
    refused = set()
    for name in names:
        try:
            backbone = build_backbone(name)
        except ValueError as error:
            assert f"{name} cannot be a backbone" in str(error)
            refused.add(name)
        else:
            assert backbone.strides == {"c2": 4, "c3": 8, "c4": 16, "c5": 32}
    assert refused == REFUSED
