"""Files that version 0.1 wrote, see files_of_0_1/README.md: checkpoints, a config and an ONNX file still load."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from detection import Predictor, load_config
from detection.data.synthetic.demo import make_demo_dataset
from detection.engine.train_detector import run_training

FILES = Path(__file__).parent / "files_of_0_1"
DETECTIONS = json.loads((FILES / "detections.json").read_text())


@pytest.mark.parametrize("name", DETECTIONS)
def test_finds_what_version_0_1_found(name):
    blocks = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    image = np.kron(blocks, np.ones((16, 16, 1), np.uint8))
    found = Predictor(FILES / name, "cpu", score_threshold=0.001).predict(image)
    expected = DETECTIONS[name]
    count = len(expected["scores"])
    assert count >= 5
    np.testing.assert_allclose(found["scores"][:count], expected["scores"], atol=1e-4)
    # Boxes of nearly the same score may have changed places.
    for name, box in zip(expected["names"], expected["boxes"], strict=True):
        same_class = found["boxes"][[other == name for other in found["names"]]]
        assert np.abs(same_class - box).max(axis=1).min() < 1e-2


def test_a_training_of_version_0_1_is_resumed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_demo_dataset("data", train_images=8, val_images=2)
    run = tmp_path / "runs" / "ghostdet"
    run.mkdir(parents=True)
    for name in ("last.pt", "config.yaml", "metrics.jsonl"):
        shutil.copy(FILES / f"ghostdet_{name}", run / name)
    config = load_config(run / "config.yaml", ["train.epochs=5"])
    assert run_training(config, resume=True)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [4, 5] and lines[1]["step"] == 10
