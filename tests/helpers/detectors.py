"""Detectors for tests of exports: of random weights, but with the statistics and decided answers of trained ones."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import run_seed
from torch import nn

from detection import build_model, load_config
from detection.checkpoint import save_checkpoint
from detection.config import DetectionConfig
from detection.config_io import parse_config
from detection.data.image_io import read_image
from detection.data.transforms import resize, to_tensor
from detection.models.ghost_recipe import raw_outputs

ROOT = Path(__file__).resolve().parents[2]


def small_config(detector="retinanet", backbone="ghostnet", **model) -> DetectionConfig:
    """A config with few channels and no data; `model` has further keys of its section."""
    source = {"images": "i", "annotations": "a"}
    width = {"width": 0.5} if backbone == "ghostnet" else {}
    return parse_config(
        {
            "output_dir": "x",
            "model": {
                "detector": detector,
                "backbone": {"name": backbone, **width},
                "fpn_channels": 32,
                "head_channels": 32,
                **model,
            },
            "data": {"train": source, "val": source},
        },
        "test",
    )


def save_detector(
    path: Path, config: DetectionConfig, as_trained, names: tuple[str, ...] = ("cat", "dog", "bird")
) -> Path:
    """Build the config's detector with random weights and write it as a checkpoint."""
    torch.manual_seed(run_seed())
    model = build_model(config, len(names))
    as_trained(model.backbone.body)
    make_decided(model)
    classes = {"names": list(names), "ids": list(range(1, len(names) + 1))}
    save_checkpoint(path, {"model": model.state_dict(), "config": config.model_dump(), "classes": classes})
    return path


def make_decided(model: Any) -> None:
    """Norms get statistics, and the last layers answers that differ from place to place.

    As they are built, scores are nearly the same everywhere, and their order is noise.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    images = drawn((160, 192), (192, 160), (128, 128), (64, 192))
    with torch.no_grad():
        raw_outputs(model.train(), images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    last = {"cls_logits": (1.5, -4.0), "cls_score": (2.0, None), "bbox_reg": (0.3, 0.0), "bbox_pred": (0.3, 0.0)}
    hooks = []
    for name, module in model.named_modules():
        if (ending := name.rpartition(".")[2]) in last:
            hooks.append(module.register_forward_pre_hook(partial(scale_output, *last[ending])))
    with torch.no_grad():
        model.eval()(images)
    for hook in hooks:
        hook.remove()


def scale_output(spread: float, middle: float | None, layer: Any, inputs: tuple[torch.Tensor]) -> None:
    """Make the outputs of a layer differ by `spread` around `middle`, on the first inputs that it sees."""
    if not hasattr(layer, "seen") and inputs[0].numel():
        layer.seen = True
        nn.init.normal_(layer.weight)
        layer.weight /= layer.forward(inputs[0]).std() / spread
        if middle is not None:
            nn.init.constant_(layer.bias, middle)


def retina_ghost_320(*overrides: str) -> DetectionConfig:
    return load_config(ROOT / "configs" / "retina_ghost_320.yaml", overrides)


def tiny(*overrides: str) -> DetectionConfig:
    """A RetinaNet that is built and exported in a second or two. Its pyramid is the recipe's."""
    return retina_ghost_320(
        "model.backbone.width=0.5",
        "model.fpn_channels=32",
        "model.head_channels=32",
        "model.head_depth=1",
        "data.short_side=128",
        "data.long_side=160",
        "eval.score_threshold=0.05",
        *overrides,
    )


def photographs(folder: Path, count: int, side: int = 320) -> list[torch.Tensor]:
    """Real images as detectors take them, of several shapes."""
    paths = sorted((folder / "coco128" / "images").iterdir())[:count]
    return [to_tensor(resize(read_image(path), side, side)[0]) for path in paths]


def drawn(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    """Images [3, H, W] of random blocks."""
    rng = np.random.default_rng(run_seed())
    images = []
    for height, width in sizes:
        blocks = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        images.append(to_tensor(np.kron(blocks, np.ones((8, 8, 1), np.uint8))[:height, :width]))
    return images
