"""Learning rates and averaging as functions of where the training stands."""

import pytest

from detection.config import OptimConfig
from detection.engine.ema import ema_decay
from detection.engine.schedule import base_lr, lr_factor


@pytest.mark.parametrize(
    ("progress", "factor"), [(0.0, 1), (0.6, 1), (0.6667, 0.1), (0.9, 0.1), (0.9167, 0.01), (1.0, 0.01)]
)
def test_step_schedule(progress, factor):
    config = OptimConfig(schedule="step", milestones=[0.6667, 0.9167], warmup_steps=0)
    assert lr_factor(config, 10, progress) == pytest.approx(factor)


def test_cosine_and_warmup():
    config = OptimConfig(schedule="cosine", warmup_steps=10, warmup_factor=0.1)
    assert lr_factor(config, 0, 0.0) == pytest.approx(0.1)
    assert lr_factor(config, 5, 0.0) == pytest.approx(0.55)
    assert lr_factor(config, 10, 0.5) == pytest.approx(0.5)
    assert lr_factor(config, 99, 1.0) == pytest.approx(0.0, abs=1e-12)
    rates = [lr_factor(config, 50, p / 100) for p in range(101)]
    assert rates == sorted(rates, reverse=True)


def test_lr_is_scaled_linearly():
    assert base_lr(OptimConfig(lr=0.02, lr_reference_batch=16), 4) == pytest.approx(0.005)
    assert base_lr(OptimConfig(lr=0.02, lr_reference_batch=None), 4) == 0.02


def test_averaging_starts_short_and_ends_at_its_target():
    assert ema_decay(0.99, 0) == pytest.approx(0.1)
    assert ema_decay(0.99, 10_000) == 0.99
