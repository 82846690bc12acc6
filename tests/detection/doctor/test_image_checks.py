"""Thumbnails, and worker processes that probe images."""

import os

import cv2
import numpy as np
import pytest
from faulty_datasets import write_clean_dataset
from PIL import Image, ImageOps

from detection.doctor.image_checks import probe_images
from detection.doctor.image_probe import probe_image


@pytest.mark.parametrize("orientation", range(1, 9))
def test_thumbnails_are_upright(tmp_path, orientation):
    rng = np.random.default_rng(0)
    image = Image.fromarray(cv2.resize(rng.integers(0, 255, (6, 8, 3), np.uint8), (160, 120)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    seen = probe_image(str(tmp_path / "a.jpg"), decode=True)
    assert seen.orientation == orientation and seen.size == (160, 120)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg")).convert("L")
    expected = cv2.resize(np.asarray(upright), (17, 16), interpolation=cv2.INTER_AREA)
    thumb = np.frombuffer(seen.thumbnail, np.uint8).reshape(16, 17)
    assert np.abs(thumb.astype(int) - expected).mean() < 3


def test_worker_processes_give_the_same_probes(tmp_path, monkeypatch):
    monkeypatch.setattr("detection.doctor.image_checks.MAX_SERIAL_IMAGES", 0)
    monkeypatch.setattr("detection.doctor.image_checks.CHUNK_SIZE", 5)
    folder = write_clean_dataset(tmp_path).parent / "images"
    (folder / "bad.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing")
    paths = [*sorted(folder.iterdir()), None, tmp_path / "absent.jpg"]
    one, two = probe_images(paths, workers=1), probe_images(paths, workers=2)
    assert one.probes == two.probes and np.array_equal(one.thumbnails, two.thumbnails)
    assert [found.status for found in one.probes[-3:]] == ["ok", "unprobed", "missing"]
    assert one.probes[0].status in ("truncated", "unreadable")


@pytest.mark.slow
def test_a_file_that_crashes_a_worker_is_reported(tmp_path, monkeypatch):
    """An exit of the worker simulates a decoder that crashes."""
    monkeypatch.setattr("detection.doctor.image_checks.MAX_SERIAL_IMAGES", 0)
    monkeypatch.setattr("detection.doctor.image_checks.CHUNK_SIZE", 5)
    monkeypatch.setattr("detection.doctor.probe_workers.probe_many", crash_on_image_7)
    folder = write_clean_dataset(tmp_path).parent / "images"
    found = probe_images(sorted(folder.iterdir()), workers=2)
    assert [one.status for one in found.probes] == ["ok"] * 7 + ["damaged"] + ["ok"] * 4
    assert "set 07.jpg crashed" in found.probes[7].detail


def crash_on_image_7(files, decode):
    if any(file.endswith("set 07.jpg") for file in files):
        os._exit(1)
    return [probe_image(file, decode) for file in files]
