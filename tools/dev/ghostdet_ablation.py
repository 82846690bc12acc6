"""Train a GhostDet with one of its choices undone; docs/ghostdet.md has what came of it.

    torchrun --nproc-per-node 2 tools/dev/ghostdet_ablation.py CHOICE configs/ghostdet_small.yaml key=value …

Choices that are keys of the config (model.fpn_channels, data.progressive …) need no such program.
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbones.ghost import GhostModule
from detection.cli.run_tool import run_tool
from detection.config_io import load_config
from detection.engine.train_detector import run_training
from detection.models import ghost_pan, ghostdet
from detection.models.task_aligned import Assignment

CHOICES: dict[str, Callable[[], None]] = {}


def choice(function: Callable[[], None]) -> Callable[[], None]:
    CHOICES[function.__name__] = function
    return function


@choice
def quality_weights() -> None:
    """A positive point weighs as much as its quality, as in TOOD and PP-YOLOE."""
    assign = ghostdet.assign

    def weighed(*args: Tensor) -> Assignment:
        target = assign(*args)
        return dataclasses.replace(target, weight=target.quality)

    ghostdet.assign = weighed


@choice
def hard_scores() -> None:
    """The score of a positive point is to be 1, however badly it places its box (focal loss in place of varifocal)."""
    assign = ghostdet.assign

    def certain(*args: Tensor) -> Assignment:
        target = assign(*args)
        return dataclasses.replace(target, quality=target.positive.float())

    ghostdet.assign = certain


@choice
def uniform_start() -> None:
    """Boxes start seven strides large, the distances' softmax being uniform."""
    build = ghostdet.LevelHead.__init__

    def uniform(self: ghostdet.LevelHead, *args: int) -> None:
        build(self, *args)
        nn.init.zeros_(self.bbox_reg.bias)

    ghostdet.LevelHead.__init__ = uniform


@choice
def without_distribution_loss() -> None:
    """The distances learn from GIoU alone."""
    build = ghostdet.GhostDet.__init__

    def unweighted(self: ghostdet.GhostDet, *args: object, **options: object) -> None:
        build(self, *args, **options)
        self.loss_weights["distances"] = 0.0

    ghostdet.GhostDet.__init__ = unweighted


@choice
def nine_candidates() -> None:
    """A box gets nine points at most, in place of thirteen."""
    assign = ghostdet.assign
    ghostdet.assign = lambda *args: assign(*args, candidates=9)


@choice
def shared_head() -> None:
    """One head for all levels."""
    build = ghostdet.GhostDetHead.__init__

    def shared(self: ghostdet.GhostDetHead, *args: int, **options: int) -> None:
        build(self, *args, **options)
        self.levels = nn.ModuleList([self.levels[0]] * len(self.levels))

    ghostdet.GhostDetHead.__init__ = shared


@choice
def large_kernels() -> None:
    """5x5 filters in place of 3x3 in neck and head."""
    pan, block, separable = (
        ghost_pan.GhostPAN.__init__,
        ghost_pan.GhostBlock.__init__,
        ghost_pan.DepthwiseSeparable.__init__,
    )
    ghost_pan.GhostPAN.__init__ = lambda self, inputs, channels: pan(self, inputs, channels, 5)
    ghost_pan.GhostBlock.__init__ = lambda self, channels, kernel_size: block(self, channels, 5)
    ghost_pan.DepthwiseSeparable.__init__ = lambda self, channels, out, kernel_size=5, stride=1: separable(
        self, channels, out, 5, stride
    )


@choice
def no_ghosts_in_the_neck() -> None:
    """A depthwise separable layer where levels meet, in place of a ghost block."""
    ghost_pan.GhostBlock = lambda channels, kernel_size: ghost_pan.DepthwiseSeparable(channels, channels, kernel_size)


class SideBySide(nn.Module):
    """A ghost block of two maps side by side, as many channels out as one of them has."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.ghost1 = GhostModule(2 * channels, channels, cheap_kernel_size=kernel_size)
        self.ghost2 = GhostModule(channels, channels, cheap_kernel_size=kernel_size, relu=False)
        self.shortcut = nn.Sequential(nn.Conv2d(2 * channels, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.ghost2(self.ghost1(x))


@choice
def side_by_side() -> None:
    """Levels meet side by side, as in PicoDet and NanoDet-Plus, not by adding."""

    def forward(self: ghost_pan.GhostPAN, maps: Sequence[Tensor]) -> list[Tensor]:
        reduced = [reduce(x) for reduce, x in zip(self.reduce, maps, strict=True)]
        inner = [reduced[-1]]
        for block, finer in zip(self.top_down, reversed(reduced[:-1]), strict=True):
            inner.insert(0, block(torch.cat([finer, F.interpolate(inner[0], scale_factor=2.0)], dim=1)))
        outer = [inner[0]]
        for down, block, coarser in zip(self.down, self.bottom_up, inner[1:], strict=True):
            outer.append(block(torch.cat([coarser, down(outer[-1])], dim=1)))
        return outer

    ghost_pan.GhostBlock = SideBySide
    ghost_pan.GhostPAN.forward = forward


def main() -> int:
    described = "\n".join(f"  {name:28}{function.__doc__}" for name, function in CHOICES.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"choices:\n{described}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("choice", choices=CHOICES)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    if config.model.detector != "ghostdet":
        parser.error(f"{args.config} has no ghostdet")
    CHOICES[args.choice]()
    return 0 if run_training(config) else 130


if __name__ == "__main__":
    run_tool(main)
