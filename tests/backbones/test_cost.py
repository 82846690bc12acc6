"""Costs against arithmetic by hand and against published counts."""

import pytest
import torch
from torch import nn
from torchvision import models

from backbones import GhostNet
from backbones.cost import Cost, measure_cost, measure_memory


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.shared = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.shared(self.shared(self.body(x)))
        return self.head(x.mean((2, 3)))


def test_costs_by_hand_with_a_layer_that_is_called_twice():
    with torch.device("meta"):
        costs = measure_cost(Twice(), torch.zeros(1, 3, 10, 10))
    assert costs["body.0"] == Cost(3 * 8 * 9, 3 * 8 * 9 * 100, 800)
    assert costs["body"] == Cost(3 * 8 * 9 + 16, 3 * 8 * 9 * 100, 800)
    assert costs["shared"] == Cost(8 * 9 + 8, 2 * 8 * 9 * 100, 1600)
    assert costs["head"] == Cost(45, 40, 5)
    assert costs[""].macs == 21600 + 14400 + 40
    assert costs[""].parameters == 216 + 16 + 80 + 45


def test_measure_cost_removes_its_hooks():
    model = Twice()
    measure_cost(model, torch.zeros(1, 3, 8, 8))
    assert not any(m._forward_hooks for m in model.modules())


def small_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        nn.Conv2d(8, 4, 1),
        nn.Sigmoid(),
    )


def test_memory_by_hand():
    model = small_network()
    memory = measure_memory(model, torch.zeros(2, 3, 10, 10))
    image, wide, narrow = (4 * 2 * 100 * channels for channels in (3, 8, 4))
    # The convolution keeps its input, the batch norm its own, the ReLU its output (in place of the batch norm's),
    # which is also what the second convolution keeps; the sigmoid keeps its output.
    assert memory["0.0"] == image and memory["0.1"] == wide and memory["0.2"] == wide
    assert memory["1"] == 0 and memory["2"] == narrow
    assert memory["0"] == image + 2 * wide and memory[""] == image + 2 * wide + narrow


def test_memory_on_the_meta_device_matches_the_cpu():
    real = measure_memory(GhostNet(0.5), torch.zeros(1, 3, 64, 64))
    with torch.device("meta"):
        meta = measure_memory(GhostNet(0.5), torch.zeros(1, 3, 64, 64))
    # There batch norms keep two numbers a channel more, as they do when they train.
    channels = sum(m.num_features for m in GhostNet(0.5).modules() if isinstance(m, nn.BatchNorm2d))
    assert meta[""] == real[""] + 2 * 4 * channels


def test_measure_memory_does_not_change_the_model():
    model = small_network().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measure_memory(model, torch.rand(2, 3, 8, 8))
    assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("build", "weights"),
    [
        (models.resnet50, models.ResNet50_Weights.IMAGENET1K_V1),
        (models.mobilenet_v2, models.MobileNet_V2_Weights.IMAGENET1K_V1),
        (models.mobilenet_v3_large, models.MobileNet_V3_Large_Weights.IMAGENET1K_V1),
    ],
)
def test_counts_match_torchvision(build, weights):
    with torch.device("meta"):
        total = measure_cost(build().eval(), torch.zeros(1, 3, 224, 224))[""]
    assert total.parameters == weights.meta["num_params"]
    assert round(total.macs / 1e9, 3) == weights.meta["_ops"]
