"""Detectors for tests of exports: of random weights, but with the statistics and the decided answers of trained ones."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from detection import build_model, load_config
from detection.checkpoint import save_checkpoint
from detection.config import Config
from detection.data.transforms import read_image, resize, to_tensor

ROOT = Path(__file__).resolve().parents[2]


def save_detector(path: Path, config: Config, as_trained, names: tuple[str, ...] = ("cat", "dog", "bird")) -> Path:
    """Build the config's detector with random weights and write it as a checkpoint."""
    torch.manual_seed(0)
    model = build_model(config, len(names))
    as_trained(model.backbone.body)
    generator = torch.Generator().manual_seed(1)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d) and not name.startswith("backbone."):
            nn.init.normal_(module.running_mean, 0, 0.02, generator=generator)
            nn.init.uniform_(module.running_var, 0.002, 0.01, generator=generator)
        # As they are built, the last layers answer nearly the same everywhere, and the order of scores is noise.
        if name.endswith("cls_logits") or name.endswith("cls_score"):
            nn.init.normal_(module.weight, 0, 0.15, generator=generator)
        if name.endswith(("bbox_reg", "bbox_pred")):
            nn.init.normal_(module.weight, 0, 0.02, generator=generator)
    classes = {"names": list(names), "ids": list(range(1, len(names) + 1))}
    save_checkpoint(path, {"model": model.state_dict(), "config": config.model_dump(), "classes": classes})
    return path


def retina_ghost_320(*overrides: str) -> Config:
    return load_config(ROOT / "configs" / "retina_ghost_320.yaml", overrides)


def photographs(folder: Path, count: int, side: int = 320) -> list[torch.Tensor]:
    """Real pictures as detectors take them, of several shapes."""
    paths = sorted((folder / "coco128" / "images").iterdir())[:count]
    return [to_tensor(resize(read_image(path), side, side)[0]) for path in paths]


def drawn(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    """Pictures [3, H, W] of random blocks."""
    rng = np.random.default_rng(0)
    pictures = []
    for height, width in sizes:
        blocks = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        pictures.append(to_tensor(np.kron(blocks, np.ones((8, 8, 1), np.uint8))[:height, :width]))
    return pictures
