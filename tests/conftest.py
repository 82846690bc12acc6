"""Small data sets and a small trained run, made in code; the real photographs are used where they lie."""

import json
import logging
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

# No test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import cv2
import numpy as np
import processes
import pytest
import torch
import yaml
from filelock import FileLock
from processes import ROOT
from small_sets import write_voc, write_yolo
from torch import nn

from detection.config import DetectionConfig
from detection.config_io import parse_config

# In the background of a script SIGINT is switched off, and all processes that the tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# nohup switches SIGHUP off. A handler that does nothing protects pytest as well, and is not inherited.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda number, frame: None)

SHARED = ROOT.parent / "shared" / "data"
RUN_SEED = int(os.environ.get("TEST_SEED", "0"))


def run_seed(n: int = 0) -> int:
    """The n-th seed of this run of the tests. TEST_SEED=3 gives all numeric tests other weights, data and draws."""
    return 1000 * RUN_SEED + n


@pytest.fixture(autouse=True)
def seeded() -> None:
    """No test depends on what was drawn before it."""
    random.seed(run_seed())
    np.random.seed(run_seed())
    torch.manual_seed(run_seed())


@pytest.fixture(autouse=True)
def records_reach_caplog() -> None:
    """The logging of the tools, which a test before may have set up, keeps records from pytest."""
    for name in ("detection", "backbones"):
        logging.getLogger(name).propagate = True


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real photographs with boxes, beside the checkout on the team's machines."""
    if not SHARED.is_dir():
        pytest.skip(f"the real photographs are not here ({SHARED})")
    return SHARED


def write_coco(folder: Path, *, images: int = 12, seed: int = run_seed(), ids: tuple[int, int] = (3, 7)) -> Path:
    """A COCO set of bright squares and dark discs (ids with a gap); image 0 is empty, image 1 has a crowd region."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    content: dict = {
        "images": [],
        "annotations": [],
        # Not in the order of the ids, on purpose.
        "categories": [{"id": ids[1], "name": "disc"}, {"id": ids[0], "name": "square"}],
    }
    for i in range(images):
        width, height = ((96, 72), (72, 96), (96, 96))[i % 3]
        image = rng.integers(90, 130, (height, width, 3), dtype=np.uint8)
        name = f"image {i}.jpg"
        for k in range(0 if i == 0 else 2):
            side = int(rng.integers(20, 34))
            x, y = int(rng.integers(0, width - side)), int(rng.integers(0, height - side))
            if k:
                cv2.circle(image, (x + side // 2, y + side // 2), side // 2, (20, 20, 20), -1)
            else:
                cv2.rectangle(image, (x, y), (x + side - 1, y + side - 1), (240, 240, 240), -1)
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": 10 + 5 * i,
                    "category_id": ids[k],
                    "bbox": [x, y, side, side],
                    "area": side * side,
                    "iscrowd": int(i == 1 and k == 1),
                }
            )
        content["images"].append({"id": 10 + 5 * i, "file_name": name, "width": width, "height": height})
        cv2.imwrite(str(folder / "images" / name), image)
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture()
def coco_set(tmp_path: Path) -> Path:
    """A folder with images/ and annotations.json, the test's own to break."""
    write_coco(tmp_path / "set")
    return tmp_path / "set"


@pytest.fixture()
def voc_set(tmp_path: Path) -> Path:
    """As `write_voc`; the test's own to break."""
    return write_voc(tmp_path)


@pytest.fixture()
def yolo_set(tmp_path: Path) -> Path:
    """As `write_yolo`; the test's own to break."""
    return write_yolo(tmp_path)


def tiny_raw(data: Path, output_dir: Path) -> dict:
    """A config that trains in seconds: GhostNet 0.5, 32 channels, 96 px."""
    source = {"images": str(data / "images"), "annotations": str(data / "annotations.json")}
    return {
        "output_dir": str(output_dir),
        "seed": run_seed(),
        "device": "cpu",
        "model": {
            "backbone": {"width": 0.5},
            "fpn_channels": 32,
            "head_channels": 32,
            "head_depth": 1,
            "head_norm": "group",
            "box_loss": "giou",
            "anchor_sizes": [16, 32, 64, 128, 256],
        },
        "data": {
            "train": source,
            "val": source,
            "batch_size": 4,
            "workers": 0,
            "short_side": 96,
            "long_side": 96,
        },
        "optim": {"name": "adamw", "lr": 0.002, "lr_reference_batch": None, "schedule": "cosine", "warmup_steps": 2},
        "train": {"epochs": 2, "ema": 0.9, "eval_every": 1, "report": False},
    }


@pytest.fixture()
def tiny_config(coco_set: Path, tmp_path: Path) -> DetectionConfig:
    return parse_config(tiny_raw(coco_set, tmp_path / "run"), "test")


@pytest.fixture()
def tiny_file(tmp_path: Path) -> Path:
    """A config file with a data set and a run folder of its own beside it."""
    write_coco(tmp_path / "set")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_raw(tmp_path / "set", tmp_path / "run")))
    return path


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The folder that `make` fills, once for all workers of a test run: the first to come makes it, others wait."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{root}.lock"):
        if not (root / "made").exists():
            root.mkdir()
            make(root)
            (root / "made").touch()
    return root


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished tiny run; its data are in `data` beside it. Not to be changed."""
    from detection.engine.train_detector import run_training

    def train(root: Path) -> None:
        write_coco(root / "data")
        raw = tiny_raw(root / "data", root / "run")
        raw["train"] |= {"epochs": 24, "eval_every": 6}
        assert run_training(parse_config(raw, "test"))

    return made_once(tmp_path_factory, "trained", train) / "run"


@pytest.fixture(scope="session")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with best.pt of the tiny run and best.onnx made of it. Not to be changed."""
    from detection.export.exporter import export_checkpoint

    def export(root: Path) -> None:
        shutil.copy(trained / "best.pt", root)
        export_checkpoint(root / "best.pt", "onnx")

    return made_once(tmp_path_factory, "exported", export)


@pytest.fixture(scope="session")
def predictor(trained: Path):
    """What the tiny run learnt, sure enough of it. Not to be changed."""
    from detection import Predictor

    return Predictor(trained / "best.pt", "cpu", score_threshold=0.2)


@pytest.fixture(scope="session")
def images(trained: Path) -> Path:
    """The folder of the images of the tiny run. Not to be changed."""
    return trained.parent / "data" / "images"


@pytest.fixture(scope="session")
def tool(tmp_path_factory: pytest.TempPathFactory):
    """Run tools/NAME.py as a user would: tool("train", "--help") -> CompletedProcess with text."""
    folder = tmp_path_factory.mktemp("tool")

    def run(name: str, *arguments: object, **options) -> subprocess.CompletedProcess:
        return processes.run_tool(name, arguments, folder, **options)

    return run


def assert_clear_error(done: subprocess.CompletedProcess, *words: str, code: int = 2) -> None:
    """Exit code `code` and one message with these words, no traceback."""
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    for word in words:
        assert word in done.stderr, f"{word!r} is not in: {done.stderr}"


@pytest.fixture(scope="session")
def as_trained():
    """Make a network's norms and scales like a trained one's: freshly built, some make whole blocks do nothing."""

    def randomize(network: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(run_seed())
        for name, value in network.named_parameters():
            if value.numel() == max(value.shape, default=1):  # norms, biases and scales of layers
                nn.init.uniform_(value, *((-0.2, 0.2) if name.endswith("bias") else (0.5, 1.5)), generator=generator)
        norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            network.train()(torch.randn(2, 3, 97, 131, generator=generator))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        return network.eval()

    return randomize


@pytest.fixture()
def folders(tmp_path: Path) -> Path:
    """Images of three classes in class folders, the test's own to break."""
    from class_folders import write_folders

    return write_folders(tmp_path / "images")


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished pre-training. Not to be changed."""
    from class_folders import tiny, write_folders

    from detection.pretraining.classification_task import run_pretraining

    def train(root: Path) -> None:
        folders = write_folders(root / "images")
        assert run_pretraining(tiny(folders, root / "run", "train.epochs=18", "train.ema=0", "train.label_smoothing=0"))

    return made_once(tmp_path_factory, "pretrained", train) / "run"
