"""Costs against arithmetic by hand."""

import torch
from torch import nn

from backbones.cost import Cost, measure_cost


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


def test_counting_leaves_no_hooks():
    model = Twice()
    measure_cost(model, torch.zeros(1, 3, 8, 8))
    assert not any(m._forward_hooks for m in model.modules())
