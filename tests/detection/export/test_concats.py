"""Removal of concatenations from ONNX graphs: same outputs, fewer operators."""

import collections
import copy

import numpy as np
import onnx
import pytest
import torch
from onnx_graphs import exported, outputs
from torch import nn

from backbones import build_backbone
from backbones.ghost import GhostBottleneck
from detection.export.concats import remove_concats

# The exporter's, of itself.
pytestmark = [pytest.mark.numeric, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def operators(model: onnx.ModelProto) -> collections.Counter:
    return collections.Counter(node.op_type for node in model.graph.node)


def assert_same_without(network: nn.Module, x: torch.Tensor, tmp_path, left: int) -> onnx.ModelProto:
    plain = exported(network, x, tmp_path)
    changed = remove_concats(copy.deepcopy(plain))
    assert operators(changed)["Concat"] == left < operators(plain)["Concat"]
    for a, b in zip(outputs(changed, x), outputs(plain, x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    return changed


class Parts(nn.Module):
    """Three parts of different widths, a dense 3x3 convolution with a bias, and one of stride 2 without."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Conv2d(4, n, 1) for n in (4, 8, 12))
        self.dense = nn.Conv2d(24, 7, 3, padding=1)
        self.strided = nn.Conv2d(24, 9, 3, stride=2, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        joined = torch.cat([part(x) for part in self.parts], dim=1)
        return self.dense(joined).relu(), self.strided(joined)


def test_dense_convolutions_are_split(tmp_path):
    model = assert_same_without(Parts(), torch.randn(2, 4, 9, 8), tmp_path, left=0)
    assert operators(model)["Conv"] == 3 + 2 * 3 and operators(model)["Add"] == 2 * 2


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 8, 1)
        self.depthwise = nn.Conv2d(12, 12, 5, stride=2, padding=2, groups=12)
        self.dense = nn.Conv2d(12, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense(self.depthwise(torch.cat([self.a(x), self.b(x)], dim=1)))


def test_depthwise_convolutions_move_the_concatenation(tmp_path):
    assert_same_without(Depthwise(), torch.randn(1, 4, 9, 8), tmp_path, left=0)


class Kept(nn.Module):
    """Also read by another node; groups across the parts; a graph output; parts that are not aligned."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(4, 6, 1)
        self.dense, self.grouped = nn.Conv2d(12, 12, 1), nn.Conv2d(12, 12, 1, groups=2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first = torch.cat([self.a(x), self.b(x)], dim=1)
        second = torch.cat([self.b(x), self.a(x)], dim=1)
        third = torch.cat([self.a(x), self.b(x) * 2], dim=1)
        fourth = torch.cat([self.c(x), self.c(x) * 2], dim=1)
        return self.dense(first) + first, self.grouped(second), self.dense(third), third, self.dense(fourth)


def test_other_concatenations_are_kept(tmp_path):
    x = torch.randn(1, 4, 9, 8)
    plain = exported(Kept(), x, tmp_path)
    changed = remove_concats(copy.deepcopy(plain))
    assert [n.op_type for n in changed.graph.node] == [n.op_type for n in plain.graph.node]
    assert operators(plain)["Concat"] == 4


def test_ghost_bottleneck_keeps_one_of_two_concatenations(tmp_path):
    assert_same_without(GhostBottleneck(24, 72, 24), torch.randn(1, 24, 12, 10), tmp_path, left=1)


def test_ghostnet(tmp_path, as_trained):
    """Blocks with a gate keep their concatenation, because the gate reads it."""
    network = as_trained(build_backbone("ghostnet"))
    assert_same_without(network, torch.randn(1, 3, 64, 96), tmp_path, left=16 + 7)
