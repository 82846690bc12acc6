"""Channels of ONNX graphs padded to whole blocks: same outputs, no partial blocks."""

import collections
import copy

import numpy as np
import onnx
import pytest
import torch
from onnx_graphs import exported, outputs
from torch import nn
from torch.nn import functional as F

from backbones import build_backbone
from backbones.ghost import GhostBottleneck, GhostModule
from detection.export.channel_blocks import BLOCK, pad_channels_to_blocks
from detection.export.concats import remove_concats

# The exporter's, of itself.
pytestmark = [pytest.mark.numeric, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def widths(model: onnx.ModelProto) -> collections.Counter:
    """Number of channels -> number of maps."""
    del model.graph.value_info[:]  # of what is no more, too
    values = [v.type.tensor_type.shape.dim for v in onnx.shape_inference.infer_shapes(model).graph.value_info]
    return collections.Counter(dims[1].dim_value for dims in values if len(dims) == 4)


def assert_same_in_blocks(network: nn.Module, x: torch.Tensor, tmp_path) -> onnx.ModelProto:
    plain = exported(network, x, tmp_path)
    padded = pad_channels_to_blocks(copy.deepcopy(plain))
    assert [n.op_type for n in padded.graph.node] == [n.op_type for n in plain.graph.node]
    for a, b in zip(outputs(padded, x), outputs(plain, x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    return padded


@pytest.mark.parametrize("channels, width", [(12, 16), (20, 24), (36, 40), (8, 8)])
def test_a_ghost_module(channels, width, tmp_path):
    """Both halves are padded to a block, so the concatenation has twice that width."""
    network = nn.Sequential(GhostModule(8, 2 * channels), nn.Conv2d(2 * channels, 4, 1))
    padded = assert_same_in_blocks(network, torch.randn(2, 8, 9, 7), tmp_path)
    assert set(widths(padded)) == {width, 2 * width}


@pytest.mark.parametrize(
    "arguments", [{}, {"se_ratio": 0.25}, {"stride": 2, "kernel_size": 5}, {"stride": 2, "se_ratio": 0.25}], ids=str
)
def test_ghost_bottlenecks(arguments, tmp_path):
    """Shortcuts that are added to a concatenation have zeros at the same channels; so do gates."""
    blocks = nn.Sequential(
        GhostBottleneck(8, 36, 20, **arguments),
        GhostBottleneck(20, 60, 20),
        GhostBottleneck(20, 60, 28),
        nn.Conv2d(28, 6, 1),
    )
    padded = assert_same_in_blocks(blocks, torch.randn(2, 8, 12, 10), tmp_path)
    assert all(width % BLOCK == 0 for width in widths(padded))


class Various(nn.Module):
    """All operators between convolutions: activations, poolings, constants, resizing, groups, a second reader."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 12, 1), nn.Conv2d(4, 12, 3, padding=1), nn.Conv2d(24, 12, 1)
        self.depthwise = nn.Conv2d(24, 24, 5, padding=2, groups=24, bias=False)
        self.shared = nn.Conv2d(12, 12, 1)
        self.scale = nn.Parameter(torch.randn(1, 12, 1, 1))
        self.last = nn.Conv2d(12, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = F.hardswish(self.a(x)), F.leaky_relu(self.b(x)) + 1
        y = self.c(self.depthwise(torch.cat([a, b], dim=1))).clamp(-1, 2)
        y = self.shared(y) + self.shared(a) * self.scale
        y = F.max_pool2d(y, 2) * F.avg_pool2d(b, 2).sigmoid()
        return self.last(F.interpolate(y, scale_factor=2.0, mode="nearest"))


def test_operators_between_convolutions(tmp_path):
    padded = assert_same_in_blocks(Various(), torch.randn(2, 4, 8, 6), tmp_path)
    assert set(widths(padded)) == {16, 32}


class Kept(nn.Module):
    """Read by nodes that do not allow padding: a reshape, a slice, a graph output, groups, a softmax over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 12, 1) for _ in range(5))
        self.grouped = nn.Conv2d(12, 12, 1, groups=2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b, c, d, e = (conv(x).relu() for conv in self.convs)
        return a.flatten(1), b[:, 3:7] * 2, c, self.grouped(d), e.softmax(1)


def test_other_concatenations_are_kept(tmp_path):
    x = torch.randn(1, 4, 9, 8)
    plain = exported(Kept(), x, tmp_path)
    padded = pad_channels_to_blocks(copy.deepcopy(plain))
    assert widths(padded) == widths(plain)


class AtOdds(nn.Module):
    """The sum of two concatenations with different parts: zeros would be at different channels."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Conv2d(4, n, 1) for n in (4, 12, 12, 4))
        self.last = nn.Conv2d(16, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b, c, d = (part(x) for part in self.parts)
        return self.last(torch.cat([a, b], dim=1) + torch.cat([c, d], dim=1))


def test_incompatible_layouts(tmp_path):
    padded = assert_same_in_blocks(AtOdds(), torch.randn(1, 4, 6, 6), tmp_path)
    assert set(widths(padded)) == {4, 12, 16}


class WithNeck(nn.Module):
    """A neck that reads the levels of a backbone; as graph outputs they would not be padded."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.reduce = nn.ModuleDict({level: nn.Conv2d(count, 4, 1) for level, count in body.channels.items()})

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.reduce[level](y) for level, y in self.body(x).items()]


@pytest.mark.parametrize("width", [0.5, 1.0])
def test_ghostnet(width, tmp_path, as_trained):
    """No partial block remains, and removing concatenations afterwards does not change the outputs."""
    network = WithNeck(as_trained(build_backbone("ghostnet", width=width)))
    x = torch.randn(1, 3, 64, 96)
    padded = assert_same_in_blocks(network, x, tmp_path)
    assert all(count % BLOCK == 0 for count in widths(padded))
    both = remove_concats(onnx.shape_inference.infer_shapes(copy.deepcopy(padded)))
    for a, b in zip(outputs(both, x), outputs(padded, x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
