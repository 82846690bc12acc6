"""Ghost modules fitted to original weights: exact ghosts are recovered, and fitted weights beat random ones."""

import copy
import itertools

import pytest
import torch
import torchvision
from conftest import run_seed
from torch import nn

from backbones.filter_fitting import fit_filters, pairwise_errors
from backbones.ghost_conversion import ghostify
from backbones.ghostify_init import RelativeError, choose_groups, output_errors, record_outputs

pytestmark = pytest.mark.numeric


def planted(ratio: int, d: int, groups: int, *, bias: bool, seed: int = 0) -> nn.Conv2d:
    """A convolution in which exact d x d filters predict all maps except one in `ratio` from others; shuffled."""
    generator = torch.Generator().manual_seed(run_seed(seed))
    convolution = nn.Conv2d(5, ratio * groups, d, padding=d // 2, bias=bias)
    weight = torch.zeros(ratio * groups, 5, d, d)
    for group in range(groups):
        own = torch.randn(5, generator=generator)
        weight[group * ratio, :, d // 2, d // 2] = own
        for ghost in range(1, ratio):
            weight[group * ratio + ghost] = own[:, None, None] * torch.randn(d, d, generator=generator)
    shuffled = torch.randperm(ratio * groups, generator=generator)
    convolution.weight.data = weight[shuffled]
    if bias:
        convolution.bias.data.zero_()
    return convolution


@pytest.mark.parametrize(
    ("ratio", "d", "groups", "bias"),
    [(2, 3, 8, False), (2, 3, 20, True), (2, 5, 6, False), (3, 3, 7, True), (4, 3, 4, False)],
)
def test_planted_ghosts_are_recovered_exactly(ratio, d, groups, bias):
    torch.manual_seed(run_seed(1))
    original = nn.Sequential(planted(ratio, d, groups, bias=bias, seed=ratio * d))
    x = torch.randn(3, 5, 16, 13)
    model = copy.deepcopy(original)
    report = ghostify(model, ratio, d, calibration=[x[:1], x[1:]], skip_first=False, min_channels=2)
    assert report.replaced[0].error < 1e-8
    unseen = torch.randn(2, 5, 11, 14)
    with torch.no_grad():
        expected = original(unseen)
        error = (model(unseen) - expected).square().mean() / expected.var()
    assert error < 1e-5 and torch.allclose(model(unseen), expected, atol=1e-4)


def test_channel_order_is_kept_and_primary_channels_are_exact():
    original = nn.Sequential(nn.Conv2d(6, 21, 3, 2, 1))
    x = torch.randn(2, 6, 17, 20)
    model = copy.deepcopy(original)
    report = ghostify(model, 2, 3, calibration=[x], skip_first=False)
    with torch.no_grad():
        error = (model(x) - original(x)).square().mean((0, 2, 3)) / original(x).var((0, 2, 3))
    exact = error < 1e-9
    assert int(exact.sum()) == 11 and (error[~exact] < 1).all()  # 1: what a constant would do
    measured, _ = output_errors(original, model, ["0"], [x])
    assert measured["0"] == pytest.approx(report.replaced[0].error, rel=1e-3)


def test_pairwise_errors_match_least_squares():
    maps = [torch.randn(2, 4, 6, 7).cumsum(2) + 3, torch.randn(1, 4, 5, 9)]
    for d, bias in itertools.product((1, 3), (False, True)):
        errors = pairwise_errors(maps, d, bias=bias)
        filters, constants, fitted = fit_filters(maps, [0, 3], [2, 1], d, bias=bias)
        for k, (source, target) in enumerate([(0, 2), (3, 1)]):
            rows, y = [], []
            for m in maps:
                padded = nn.functional.pad(m[:, source].double(), (d // 2,) * 4)
                windows = padded.unfold(1, d, 1).unfold(2, d, 1).reshape(-1, d * d)
                rows.append(torch.cat([windows, torch.ones(len(windows), int(bias))], 1))
                y.append(m[:, target].double().flatten())
            a, b = torch.cat(rows), torch.cat(y)
            solution = torch.linalg.lstsq(a, b[:, None]).solution
            expected = (a @ solution - b[:, None]).square().mean() / b.var(correction=0)
            assert float(errors[source, target]) == pytest.approx(float(expected), rel=1e-4, abs=1e-6)
            assert float(fitted[k]) == pytest.approx(float(expected), rel=1e-6, abs=1e-9)
            torch.testing.assert_close(filters[k].flatten(), solution[: d * d, 0], rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(
                constants[k], solution[-1, 0] if bias else torch.zeros(()).double(), rtol=1e-5, atol=1e-7
            )


def test_groups_are_close_to_the_optimum():
    above = []
    for _ in range(40):
        errors = torch.rand(6, 6).fill_diagonal_(0)
        groups = choose_groups(errors, 2)
        members = sorted(channel for primary, ghosts in groups for channel in (primary, *ghosts))
        assert members == list(range(6)) and all(len(ghosts) == 1 for _, ghosts in groups)
        total = sum(float(errors[p, g].sum()) for p, g in groups)
        cost = torch.minimum(errors, errors.T).tolist()
        best = min(
            sum(cost[a][b] for a, b in zip(order[::2], order[1::2], strict=True))
            for order in itertools.permutations(range(6))
        )
        assert best - 1e-6 <= total
        above.append(total - best)
    assert sum(above) / len(above) < 0.25  # of a random matching: 0.6; of these, in 25 times 40: 0.06 to 0.15


def test_dead_and_constant_maps():
    convolution = nn.Conv2d(3, 16, 3, padding=1)
    convolution.weight.data[4:] = 0
    model = nn.Sequential(convolution)
    report = ghostify(model, calibration=[torch.randn(2, 3, 9, 9)], skip_first=False)
    assert report.replaced[0].error < 1e-9
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_record_outputs_copies_and_stops_at_max_positions():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True))
    with torch.no_grad():
        maps = record_outputs(model, {"0": model[0]}, [torch.randn(2, 3, 10, 10)] * 5, max_positions=500)["0"]
    assert min(float(m.min()) for m in maps) < 0 and sum(m[:, 0].numel() for m in maps) == 600


def test_relative_error():
    error = RelativeError()
    y = torch.randn(4, 3, 5, 5) + 7
    error.update(y[:2], y[:2])
    error.update(y[2:].mean((0, 2, 3), keepdim=True).expand_as(y[2:]), y[2:])
    assert 0.4 < error.compute() < 0.6
    same = RelativeError()
    same.update(torch.ones(2, 5), torch.arange(10.0).reshape(2, 5))
    assert same.compute() == pytest.approx(
        ((torch.arange(10.0) - 1) ** 2).mean() / torch.arange(10.0).var(correction=0)
    )


def test_fitted_beats_random_on_resnet18():
    original = torchvision.models.resnet18().eval()
    images = torch.randn(6, 3, 12, 12)
    images = nn.functional.interpolate(images, 96, mode="bicubic")
    random, fitted = copy.deepcopy(original), copy.deepcopy(original)
    layers = [layer.name for layer in ghostify(random).replaced]
    ghostify(fitted, calibration=[images[:4]])
    random_layers, random_output = output_errors(original, random, layers, [images[4:]])
    fitted_layers, fitted_output = output_errors(original, fitted, layers, [images[4:]])
    assert all(fitted_layers[layer] < 0.6 < 1 < random_layers[layer] for layer in layers)
    assert fitted_output < 0.5 * random_output
