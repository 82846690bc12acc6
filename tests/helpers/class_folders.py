"""Class folders and configs for the tests of pre-training."""

import json
from pathlib import Path

import numpy as np
import torch
from conftest import run_seed
from PIL import Image

from detection.checkpoint import read_checkpoint
from detection.config_check import check
from detection.pretraining.classification_config import ClassificationConfig
from detection.pretraining.classification_task import FORMAT

CLASSES = ("disc", "plain", "stripes")


def draw(kind: str, rng: np.random.Generator) -> Image.Image:
    """A 40x36 image that even a tiny network can tell."""
    image = rng.integers(60, 120, (36, 40, 3), dtype=np.uint8)
    if kind == "disc":
        y, x = np.ogrid[:36, :40]
        image[(y - 18) ** 2 + (x - 20) ** 2 < 120] = (230, 40, 40)
    elif kind == "stripes":
        image[:, ::8] = image[:, 1::8] = image[:, 2::8] = (40, 40, 240)
    return Image.fromarray(image)


def write_folders(root: Path, train: int = 8, val: int = 4) -> Path:
    rng = np.random.default_rng(run_seed())
    for split, count in (("train", train), ("val", val)):
        for kind in CLASSES:
            folder = root / split / kind
            folder.mkdir(parents=True)
            for i in range(count):
                draw(kind, rng).save(folder / f"{i}.jpg", quality=95)
    return root


def tiny(folders: Path, out: Path, *overrides: str) -> ClassificationConfig:
    """GhostNet 0.5 at 32 px: 3 steps an epoch."""
    raw = {
        "output_dir": str(out),
        "device": "cpu",
        "model": {"name": "ghostnet", "width": 0.5},
        "data": {
            "train": str(folders / "train"),
            "val": str(folders / "val"),
            "size": 32,
            "val_crop": 1.0,
            "batch_size": 8,
            "workers": 0,
            "augment": {"random_resized_crop": [0.5, 1.0], "brightness": 0.1},
        },
        "optim": {"name": "adamw", "lr": 0.003, "lr_reference_batch": None, "schedule": "cosine", "warmup_steps": 2},
        "train": {"epochs": 2, "ema": 0.9},
    }
    return check(ClassificationConfig, raw, "test").with_overrides(overrides)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def last(folder):
    return read_checkpoint(folder / "last.pt", FORMAT)


def assert_same(a: dict, b: dict) -> None:
    assert list(a) == list(b)
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different, different[:3]
