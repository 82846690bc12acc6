"""Reading many images: cache, fast decoding, bad images, workers that die, ranks, multi-scale."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT

from detection.config import AugmentConfig
from detection.core.errors import UserError
from detection.data import image_cache as cache_module
from detection.data.dataset import DetectionDataset, SampleKey, build_dataset
from detection.data.formats.coco import read_coco
from detection.data.image_io import read_image
from detection.data.loader import BadImages, _explain_death, build_loader, iterate
from detection.data.sampler import EvalBatchSampler, TrainBatchSampler
from detection.data.transforms import Augmentation

CPU = torch.device("cpu")


def samples(dataset, epoch=0, **draw):
    return [dataset[SampleKey(epoch, i, **draw)] for i in range(len(dataset))]


def equal(a, b):
    return all(
        torch.equal(x[0], y[0]) and torch.equal(x[1]["boxes"], y[1]["boxes"]) and x[1]["scale"] == y[1]["scale"]
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("where", ["ram", "disk"])
@pytest.mark.parametrize("crop", [0.0, 0.5])
def test_cached_images_are_the_same_pixels(tiny_config, tmp_path, monkeypatch, where, crop):
    monkeypatch.setattr(cache_module, "FOLDER", tmp_path / "cache")
    settings = ["data.augment.scale=[0.8, 1.2]", f"data.augment.crop={crop}", "data.augment.mosaic=0.5"]
    for split in ("train", "val"):
        plain = build_dataset(tiny_config.with_overrides(settings), split)
        cached = build_dataset(tiny_config.with_overrides([*settings, f"train.cache={where}"]), split)
        for epoch in (0, 1):
            assert equal(samples(plain, epoch), samples(cached, epoch))
    if where == "disk":
        files = set((tmp_path / "cache").iterdir())
        assert len(files) == 2
        again = build_dataset(tiny_config.with_overrides([*settings, "train.cache=disk"]), "val")
        assert equal(samples(plain), samples(again)) and set((tmp_path / "cache").iterdir()) == files


def test_the_disk_cache_follows_a_changed_image(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "FOLDER", tmp_path / "cache")
    config = tiny_config.with_overrides(["train.cache=disk"])
    before = build_dataset(config, "val")[SampleKey(0, 3)][0]
    path = build_dataset(config, "val").images / "image 3.jpg"
    height, width = cv2.imread(str(path)).shape[:2]
    cv2.imwrite(str(path), np.full((height, width, 3), 200, np.uint8))
    os.utime(path, (1, 1))
    after = build_dataset(config, "val")[SampleKey(0, 3)][0]
    assert not torch.equal(before, after) and (after > 190).all()


def test_a_cache_that_does_not_fit_is_refused(tiny_config, monkeypatch):
    monkeypatch.setattr(cache_module, "available_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"train\.cache needs .* of memory .* use train\.cache=disk or off"):
        build_dataset(tiny_config.with_overrides(["train.cache=ram"]), "train")


@pytest.mark.parametrize("size, at_least, reduced", [
    ((640, 480), (240, 320), 2), ((641, 479), (240, 320), 1), ((641, 481), (240, 320), 2),
    ((1600, 1200), (240, 320), 4), ((1600, 1200), (100, 130), 8), ((300, 200), (240, 320), 1),
])  # fmt: skip
def test_a_large_jpeg_is_decoded_to_a_fraction(tmp_path, size, at_least, reduced):
    width, height = size
    smooth = cv2.resize(
        np.random.default_rng(0).integers(0, 255, (9, 12, 3), np.uint8), size, interpolation=cv2.INTER_CUBIC
    )
    for suffix, expected in ((".jpg", reduced), (".png", 1)):
        path = tmp_path / f"image{suffix}"
        cv2.imwrite(str(path), smooth)
        whole, fast = read_image(path, size), read_image(path, size, at_least)
        assert fast.shape == (-(-height // expected), -(-width // expected), 3)
        shrunk = cv2.resize(whole, fast.shape[1::-1], interpolation=cv2.INTER_AREA)
        assert np.abs(fast.astype(int) - shrunk).mean() < 2


def test_a_reduced_image_of_another_size_is_still_an_error(tmp_path):
    path = tmp_path / "image.jpg"
    cv2.imwrite(str(path), np.zeros((480, 640, 3), np.uint8))
    with pytest.raises(UserError, match="640x480 pixels, its annotation says 1280x960"):
        read_image(path, (1280, 960), (240, 320))


def test_a_bad_image_is_passed_over_in_training_with_a_count(tiny_config, caplog):
    dataset = build_dataset(tiny_config, "train")
    for i in (2, 5):
        path = dataset.images / f"image {i}.jpg"
        path.write_bytes(path.read_bytes()[:300])
    batches = TrainBatchSampler(dataset.annotations.sizes, 4, seed=0, group_by_aspect=False)
    loader = build_loader(dataset, batches, workers=0, device=CPU)
    bad = BadImages(2)
    for _ in range(2):
        assert all(len(images) == 4 for images, _ in iterate(loader, bad))
    assert len(bad.messages) == 2
    assert all("truncated" in message and "image" in message for message in bad.messages)
    with pytest.raises(UserError, match=r"2 bad images, more than data\.max_bad_images=1(.|\n)*image 2(.|\n)*image 5"):
        list(iterate(loader, BadImages(1)))
    with pytest.raises(UserError, match=r"more than data\.max_bad_images=0"):
        list(iterate(loader))


def test_a_folder_of_nothing_but_bad_images_ends(tiny_config):
    dataset = build_dataset(tiny_config, "train")
    for path in dataset.images.iterdir():
        path.write_bytes(b"no image")
    loader = build_loader(dataset, TrainBatchSampler(dataset.annotations.sizes, 4, 0, False), workers=0, device=CPU)
    with pytest.raises(UserError, match="not an image"):
        list(iterate(loader, BadImages(100)))


DEADLY = """
import os, signal, sys, torch
from detection.data.dataset import DetectionDataset
from detection.data.formats.coco import read_coco
from detection.data.loader import build_loader, iterate
from detection.data.sampler import EvalBatchSampler
from detection.core.errors import UserError

class Deadly(DetectionDataset):
    def _read(self, i):
        if i == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._read(i)

dataset = Deadly(read_coco(sys.argv[1]), sys.argv[2], short_side=96, long_side=96)
loader = build_loader(dataset, EvalBatchSampler(dataset.annotations.sizes, 2), workers=2, device=torch.device("cpu"))
try:
    list(iterate(loader))
except UserError as error:
    print(error)
"""


def test_a_worker_that_dies_names_the_image(tiny_config):
    """Reading image 5 kills the process, as the system does when memory runs out. In a process of its own: the
    DataLoader tells of a dead worker from a signal handler, whatever is being done at that moment."""
    source = tiny_config.data.val
    command = [sys.executable, "-c", DEADLY, source.annotations, source.images]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "a process that reads images died while it read" in done.stdout, done.stdout + done.stderr
    assert "image 5.jpg" in done.stdout and "data.workers" in done.stdout


def test_a_worker_that_is_still_dying_is_waited_for(tiny_config):
    """The connection to a killed process is reset before the process counts as ended."""
    dataset = build_dataset(tiny_config, "train")
    worker = multiprocessing.get_context("fork").Process(target=die_after_a_while)
    worker.start()
    dataset.reading[0] = torch.tensor([worker.pid, 5])
    loader = SimpleNamespace(dataset=dataset, _iterator=SimpleNamespace(_workers=[worker]))
    message = _explain_death(loader, ConnectionResetError(104, "Connection reset by peer"))
    assert f"process {worker.pid} was killed by SIGKILL" in message and "image 5.jpg" in message


def die_after_a_while():
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


def test_multi_scale_batches_have_one_size_each_and_follow_the_seed(tiny_config):
    config = tiny_config.with_overrides(["data.multi_scale=[64, 96, 160]", "data.batch_size=3"])
    dataset = build_dataset(config, "train")
    sides = config.data.multi_scale
    batches = TrainBatchSampler(dataset.annotations.sizes, 3, 0, False, short_sides=sides)
    seen = set()
    for epoch in range(6):
        batches.set_epoch(epoch)
        for batch in batches:
            assert len({draw.short_side for draw in batch}) == 1
            seen.add(batch[0].short_side)
            for draw in batch:
                image, target = dataset[draw]
                # data.long_side is 96 like the short one, so the long side is what the batch's side limits.
                assert max(image.shape[1:]) == draw.short_side
                assert (target["boxes"][:, 2:] <= draw.short_side + 1e-3).all()
        assert list(batches) == list(batches)
    assert seen == set(sides)


def test_ranks_share_the_global_batches():
    sizes = np.array([(100, 50)] * 21 + [(50, 100)] * 14)
    whole = TrainBatchSampler(sizes, 6, seed=1, group_by_aspect=True, short_sides=(64, 96))
    ranks = [
        TrainBatchSampler(sizes, 2, seed=1, group_by_aspect=True, short_sides=(64, 96), rank=r, world_size=3)
        for r in range(3)
    ]
    for epoch in (0, 3):
        for batches in (whole, *ranks):
            batches.set_epoch(epoch)
        parts = list(zip(*ranks, strict=True))
        assert len(parts) == len(whole) == len(ranks[0])
        for together, one in zip(parts, whole, strict=True):
            assert sorted(d for part in together for d in part) == sorted(one)
    few = [list(TrainBatchSampler(sizes[:2], 2, 0, True, rank=r, world_size=3)) for r in range(3)]
    assert all(len(part) == 1 and len(part[0]) >= 1 for part in few)


def test_ranks_evaluate_each_image_once():
    sizes = np.random.default_rng(0).integers(50, 200, (23, 2))
    parts = [list(EvalBatchSampler(sizes, 4, rank=r, world_size=3)) for r in range(3)]
    assert sorted(d.image for part in parts for batch in part for d in batch) == list(range(23))


def test_the_closing_phase_does_not_mix(tiny_config):
    source = tiny_config.data.train
    config = AugmentConfig(mosaic=1.0, mixup=1.0, horizontal_flip=0.0)
    dataset = DetectionDataset(
        read_coco(source.annotations),
        source.images,
        short_side=96,
        long_side=96,
        augmentation=Augmentation(config, 96, 96),
    )
    plain = DetectionDataset(
        read_coco(source.annotations),
        source.images,
        short_side=96,
        long_side=96,
        augmentation=Augmentation(AugmentConfig(horizontal_flip=0.0), 96, 96),
    )
    assert equal(samples(dataset, mix=False), samples(plain))
    assert not equal(samples(dataset), samples(plain))
