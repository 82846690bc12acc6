"""tools/browse.py: the batches of training, as files, from a server, and with detections."""

import re
import signal
import urllib.error
import urllib.request
from http.client import HTTPConnection

import cv2
import numpy as np
import pytest
import torch
import yaml
from browser import assert_whole
from conftest import assert_clear_error, tiny_raw
from processes import ToolProcess

from detection.data.loader import build_loader, iterate
from detection.data.sampler import TrainBatchSampler
from detection.models.transform import NormalizeAndBatch
from detection.report.batch_browser import BatchBrowser, BatchDetector, write_batches


@pytest.fixture()
def config_file(coco_set, tmp_path):
    raw = tiny_raw(coco_set, tmp_path / "run")
    raw["data"]["augment"] = {"horizontal_flip": 0.5, "mosaic": 0.5, "brightness": 0.2}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_batches_match_training(tiny_config):
    config = tiny_config.with_overrides(["data.augment.mosaic=0.5", "data.augment.horizontal_flip=0.5"])
    browser = BatchBrowser(config, "train")
    batches = TrainBatchSampler(browser.dataset.annotations.sizes, 4, config.seed, config.data.group_by_aspect)
    batches.epoch = 1
    loader = build_loader(browser.dataset, batches, workers=0, device=torch.device("cpu"))
    norm = NormalizeAndBatch((0, 0, 0), (1, 1, 1))
    for number, (images, targets) in enumerate(iterate(loader), len(batches)):
        shown = browser.batch(number)
        frame, _ = norm(images)
        for shown_image, image, target in zip(shown, images, targets, strict=True):
            assert shown_image.pixels.shape[:2] == frame.tensors.shape[2:]
            assert f"{image.shape[2]}x{image.shape[1]}" in shown_image.caption
            # Boxes are drawn on the image; most pixels are unchanged.
            inside = shown_image.pixels[: image.shape[1], : image.shape[2]]
            assert (inside == image.numpy().transpose(1, 2, 0)).all(axis=2).mean() > 0.5
            names = [browser.dataset.annotations.class_names[label - 1] for label in target["labels"].tolist()]
            assert all(f"{names.count(name)} {name}" in shown_image.caption for name in set(names))
    assert browser.title(len(batches)) == f"epoch 2, batch 1 of {len(batches)}"


def test_the_page_and_its_images(tiny_config, tmp_path):
    page = write_batches(BatchBrowser(tiny_config, "train"), tmp_path / "out", first=0, count=2)
    seen = assert_whole(page)
    assert len(seen.images) == 8 and "epoch 1, batch 2 of 3" in seen.text
    images = sorted((tmp_path / "out").glob("*.jpg"))
    assert [path.name for path in images[:5]] == [*(f"batch_0000_0{i}.jpg" for i in range(4)), "batch_0001_00.jpg"]
    assert cv2.imread(str(images[0])).shape == (96, 96, 3)


def test_detections_are_drawn(trained, coco_set, tiny_config):
    detector = BatchDetector(str(trained / "best.pt"), "cpu", 0.05)
    config = tiny_config
    browser = BatchBrowser(config, "val", detector)
    undetected = BatchBrowser(config, "val")
    counts = 0
    for number in range(3):
        images = [browser.dataset[key][0] for key in browser.sample_keys(number)]
        for shown_image, without, found, image in zip(
            browser.batch(number), undetected.batch(number), detector.detect(images), images, strict=True
        ):
            counts += len(found["labels"])
            assert f"; {len(found['labels'])} detections" in shown_image.caption and "detections" not in without.caption
            if len(found["labels"]):
                assert not np.array_equal(shown_image.pixels, without.pixels)
            assert found["boxes"].max(initial=0) <= max(image.shape)
    assert counts > 0


def test_an_unreadable_image_is_reported(coco_set, tiny_config):
    (coco_set / "images" / "image 3.jpg").write_bytes(b"nothing")
    browser = BatchBrowser(tiny_config, "val")
    captions = [shown_image.caption for number in range(3) for shown_image in browser.batch(number)]
    assert len(captions) == 12 and sum("not an image" in caption for caption in captions) == 1
    browser = BatchBrowser(tiny_config, "train")
    captions = [shown_image.caption for number in range(3) for shown_image in browser.batch(number)]
    assert any("replaces an unreadable image" in caption and "image 3.jpg" in caption for caption in captions)


def test_the_tool_writes(tool, config_file, trained, tmp_path):
    out = tmp_path / "seen"
    done = tool("browse", config_file, "--batches", 1, "--out", out, "data.augment.mosaic=1")
    assert done.returncode == 0 and (out / "index.html").is_file(), done.stderr
    done = tool(
        "browse", config_file, "--split", "val", "--checkpoint", trained / "best.pt", "--out", out, "--batches", 1
    )
    assert done.returncode == 0 and "detections" in (out / "index.html").read_text(), done.stderr


def test_usage_errors(tool, config_file, tmp_path):
    assert_clear_error(tool("browse", tmp_path / "no.yaml"), "no.yaml does not exist")
    assert_clear_error(tool("browse", config_file, "--checkpoint", tmp_path / "no.pt"), "no.pt does not exist")
    (tmp_path / "file").write_text("")
    assert_clear_error(tool("browse", config_file, "--out", tmp_path / "file" / "x"), "cannot be written to")
    assert_clear_error(tool("browse", config_file, "--serve", 99999999), "--serve 99999999", "another port")
    assert tool("browse", config_file, "--batches", 0).returncode == 2


def test_the_tool_serves_this_machine_until_ctrl_c(config_file, tmp_path):
    process = ToolProcess("browse", [config_file, "--serve", 0], tmp_path / "out", tmp_path / "err")
    process.wait_until(lambda: "http://" in (tmp_path / "out").read_text() if (tmp_path / "out").exists() else False)
    address = re.search(r"http://127\.0\.0\.1:(\d+)/", (tmp_path / "out").read_text())
    assert address, process.completed()
    first = urllib.request.urlopen(address[0], timeout=60).read().decode()
    assert "epoch 1, batch 1 of 3" in first and 'href="/1"' in first and "previous" not in first
    later = urllib.request.urlopen(f"{address[0]}4", timeout=60).read().decode()
    assert "epoch 2, batch 2 of 3" in later and 'href="/3"' in later and 'href="/5"' in later
    for path in ("x", "../etc/passwd", "-1"):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(f"{address[0]}{path}", timeout=60)
        assert error.value.code == 404
    connection = HTTPConnection("127.0.0.1", int(address[1]), timeout=60)
    connection.request("GET", "/0", headers={"Host": "example.org:80"})
    assert connection.getresponse().status == 403
    connection.close()
    process.send(signal.SIGINT)
    assert process.wait(60)
    done = process.completed()
    assert done.returncode == 0 and "stopped" in done.stdout and "Traceback" not in done.stderr, done.stderr
