"""Redundancy: known pairs are found, errors decrease with d, layers are found by name."""

import itertools

import numpy as np
import pytest
import torch
import torchvision
from conftest import run_seed
from torch import nn

from backbones import build_backbone
from backbones.feature_redundancy import default_layer, find_pairs, list_layers, record_feature_maps
from backbones.redundancy_plot import draw_pairs

pytestmark = pytest.mark.numeric

PLANTED = {(0, 5): 1, (7, 2): 3, (3, 9): 5}
"""(source, target) -> size of the filter between them."""


@pytest.fixture(scope="module")
def maps():
    torch.manual_seed(run_seed())
    filters = {pair: torch.randn(1, 1, d, d) for pair, d in PLANTED.items()}
    maps = []
    for size in ((32, 40), (20, 33)):  # images may differ in size
        smooth = nn.functional.interpolate(torch.randn(1, 12, 8, 10), size, mode="bicubic")
        maps.append(smooth + 0.5 * torch.randn(1, 12, *size))
        for (source, target), d in PLANTED.items():
            filtered = nn.functional.conv2d(maps[-1][:, source, None], filters[source, target], padding=d // 2)
            maps[-1][:, target] = filtered[:, 0] + 2
        maps[-1][:, 11] = 0.25
    return maps


def test_planted_pairs_come_first_and_errors_fall_with_d(maps):
    found = find_pairs(maps, (1, 3, 5, 7), ranked_by=5)
    best = {(p.source, p.target): p for p in found.pairs[:3]}
    # By a single number, either map of a pair is an exact image of the other.
    assert {tuple(sorted(pair)) for pair in best} == {tuple(sorted(pair)) for pair in PLANTED}
    best[0, 5] = best.get((0, 5)) or best[5, 0]
    for planted, side in PLANTED.items():
        for d, error in best[planted].errors.items():
            assert (error < 1e-8) == (d >= side), (planted, d, error)
    assert found.pairs[3].errors[5] > 0.1
    for pair in found.pairs:
        errors = [pair.errors[d] for d in (1, 3, 5, 7)]
        assert all(b <= a + 1e-9 for a, b in itertools.pairwise(errors)) and 0 <= errors[-1] <= errors[0] <= 1
    assert found.dead == [11] and len(found.best) == 11
    used = [channel for p in found.pairs for channel in (p.source, p.target)]
    assert len(used) == len(set(used)) == 10 and 11 not in used


def test_prediction_of_a_pair_has_its_error(maps):
    pair = find_pairs(maps).pairs[-1]
    squared = sum(float((pair.predict(m[0, pair.source], 3) - m[0, pair.target]).square().sum()) for m in maps)
    target = torch.cat([m[:, pair.target].flatten() for m in maps]).double()
    assert squared / len(target) / float(target.var(correction=0)) == pytest.approx(pair.errors[3], rel=1e-6)


def test_scale_and_offset_do_not_matter(maps):
    factors = torch.logspace(-3, 3, 12)[:, None, None]
    a, b = find_pairs(maps), find_pairs([m * factors for m in maps])
    for p, q in zip(a.pairs, b.pairs, strict=True):
        assert {p.source, p.target} == {q.source, q.target}
        assert p.errors[3] == pytest.approx(q.errors[3], rel=1e-3, abs=1e-8)


def test_arguments(maps):
    with pytest.raises(ValueError, match="must be odd"):
        find_pairs(maps, (2,))
    with pytest.raises(ValueError, match="cannot rank by d = 9"):
        find_pairs(maps, (1, 3), ranked_by=9)
    with pytest.raises(ValueError, match="of 2 maps, 2 are constant"):
        find_pairs([torch.ones(1, 2, 4, 4)])
    assert find_pairs(maps, (5, 1)).ranked_by == 1


def test_layers_by_name():
    model = torchvision.models.resnet18()
    model.bn1.eval()
    x = torch.rand(1, 3, 64, 96)
    assert default_layer(model, x) == "layer1.0"
    layers = list_layers(model, x)
    assert layers["layer2"] == ("Sequential", (128, 8, 12)) and "fc" not in layers
    assert record_feature_maps(model, "layer2", [x, x])[1].shape == (1, 128, 8, 12)
    # In-place activations that follow do not reach back into what was recorded.
    assert float(record_feature_maps(model, "layer1.0.bn1", [x])[0].min()) < 0
    assert model.training and not model.bn1.training and not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ValueError, match=r"has no layer 'layer1\.o'; nearest: .*layer1\.0"):
        record_feature_maps(model, "layer1.o", [x])
    with pytest.raises(ValueError, match="is not a feature map"):
        record_feature_maps(model, "fc", [x])
    with pytest.raises(ValueError, match="512x1x1"):
        record_feature_maps(model, "avgpool", [x])


@pytest.mark.parametrize(
    ("model", "layer"),
    [
        (torchvision.models.vgg11().features, "7"),
        (torchvision.models.mobilenet_v2(), "features.2.conv.0"),
        (build_backbone("ghostnet", width=0.5), "blocks.1.0.ghost1"),
    ],
    ids=["vgg11", "mobilenet_v2", "ghostnet"],
)
def test_default_layers(model, layer):
    assert default_layer(model, torch.rand(1, 3, 64, 64)) == layer


def test_image(maps):
    found = find_pairs(maps)
    photograph = np.full((64, 80, 3), (200, 30, 30), np.uint8)
    image = draw_pairs(found, maps[0][0], photograph, title="network – layer", pairs=3)
    assert image.dtype == np.uint8 and image.shape[2] == 3
    assert (image[95:240, 20:200] == (30, 30, 200)).all(-1).mean() > 0.9  # the photograph, in OpenCV's order
    longer = draw_pairs(found, maps[0][0], photograph, title="", pairs=5)
    assert longer.shape[0] > image.shape[0] and longer.shape[1] == image.shape[1]
