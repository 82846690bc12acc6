"""detect.py on a folder against a plain loop: the same work, whose rates are told."""

import json
import re

import pytest
from folder_speed import compare_folder, plain_loop

from detection.inference.detect_sources import detect
from detection.inference.sources import Item


@pytest.mark.numeric
def test_both_ways_do_the_same_work(predictor, images, tmp_path):
    items = [Item("image", str(path), path.stem) for path in sorted(images.iterdir())[:5]]
    for way in ("plain", "quick"):
        (tmp_path / way).mkdir()
    plain_loop(predictor, items, tmp_path / "plain")
    detect(predictor, items, tmp_path / "quick", batch_size=1)
    for item in items:
        a, b = (json.loads((tmp_path / way / f"{item.name}.json").read_text()) for way in ("plain", "quick"))
        b = b["detections"]
        assert [d["name"] for d in a] == [d["name"] for d in b]
        for one, other in zip(a, b, strict=True):
            assert one["box"] == pytest.approx(other["box"], abs=0.01)
        assert (tmp_path / "plain" / f"{item.name}.jpg").is_file() and (
            tmp_path / "quick" / f"{item.name}.jpg"
        ).is_file()


def test_the_rates_are_told(trained, images):
    told = compare_folder(trained / "best.pt", str(images), count=6, batch_size=2, device="cpu")
    assert re.search(r"plain loop, .*best\.pt: 6 images in \d+\.\d\d s", told)
    assert float(re.search(r"batches of 2: (\S+) times as fast", told)[1]) > 0
    assert all(stage in told for stage in ("read", "network", "write"))
