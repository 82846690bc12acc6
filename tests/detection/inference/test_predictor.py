"""Predictor, drawing, sources."""

import json

import cv2
import numpy as np
import pytest
import torch
from videos import write_video

from detection import Predictor, UserError
from detection.data.image_io import read_image
from detection.inference.draw import class_color, draw_detections
from detection.inference.sources import find_items


@pytest.mark.numeric
def test_predict(predictor, images):
    found = predictor.predict(images / "image 5.jpg")
    n = len(found["scores"])
    assert n and found["boxes"].shape == (n, 4) and found["boxes"].dtype == np.float32
    assert len(found["names"]) == n and set(found["names"]) <= {"square", "disc"}
    assert (np.diff(found["scores"]) <= 0).all() and (found["scores"] >= 0.2).all()
    height, width = read_image(images / "image 5.jpg").shape[:2]
    assert (
        (found["boxes"] >= 0).all() and (found["boxes"][:, 2] <= width).all() and (found["boxes"][:, 3] <= height).all()
    )


@pytest.mark.numeric
def test_kinds_of_input_agree(predictor, images):
    from PIL import Image

    path = images / "image 4.jpg"
    array = read_image(path)
    expected = predictor.predict(array)
    for image in (str(path), path, torch.from_numpy(array.transpose(2, 0, 1).copy()), Image.fromarray(array)):
        found = predictor.predict(image)
        np.testing.assert_allclose(found["boxes"], expected["boxes"], atol=1e-4)
        assert found["names"] == expected["names"]
    grey = predictor.predict(array[:, :, 0])
    assert grey["boxes"].shape[1] == 4


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), "must be uint8"),
        (np.zeros((4, 4, 4), np.uint8), r"must be \[H, W, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), r"must be \[H, W, 3\]"),
        (torch.zeros(3, 4, 4), "must be uint8"),
        ("nowhere.jpg", "does not exist"),
    ],
)
def test_wrong_input(predictor, image, message):
    with pytest.raises(UserError, match=message):
        predictor.predict(image)


@pytest.mark.parametrize("shape", [(1, 1), (3, 400), (400, 3)])
def test_extreme_shapes(predictor, shape):
    assert predictor.predict(np.zeros((*shape, 3), np.uint8))["boxes"].shape[1] == 4


@pytest.mark.numeric
def test_batch_of_mixed_sizes(predictor, images):
    images = [images / f"image {i}.jpg" for i in (3, 4, 5)]
    batched = predictor.predict_batch(images)
    assert len(batched) == 3
    for image, found in zip(images, batched, strict=True):
        alone = predictor.predict(image)
        strong, alone_strong = found["scores"] > 0.4, alone["scores"] > 0.4
        assert [n for n, s in zip(found["names"], strong, strict=True) if s] == [
            n for n, s in zip(alone["names"], alone_strong, strict=True) if s
        ]


@pytest.mark.numeric
def test_class_filter(trained, images):
    only = Predictor(trained / "best.pt", "cpu", score_threshold=0.05, classes=["disc"])
    found = [only.predict(p) for p in sorted(images.iterdir())]
    names = {name for f in found for name in f["names"]}
    assert names == {"disc"} and {label for f in found for label in f["labels"].tolist()} == {2}
    with pytest.raises(
        UserError, match=r"unknown class 'dics' \(did you mean 'disc'\?\); classes of this model: square, disc"
    ):
        Predictor(trained / "best.pt", "cpu", classes=["dics"])


def test_last_and_best_load(trained, images):
    for name in ("last.pt", "best.pt"):
        assert Predictor(trained / name, "cpu").classes.names == ("square", "disc")
    with pytest.raises(UserError, match="does not exist"):
        Predictor(trained / "none.pt")


@pytest.mark.numeric
def test_predictor_matches_evaluation(trained, predictor):
    """Both use the same preprocessing: `predict` returns the high-scoring detections of the last evaluation."""
    results = json.loads((trained / "predictions.json").read_text())
    index = json.loads((trained.parent / "data" / "annotations.json").read_text())
    last = Predictor(trained / "last.pt", "cpu", score_threshold=0.3)
    checked = 0
    for image in index["images"]:
        expected = [r for r in results if r["image_id"] == image["id"] and r["score"] > 0.35]
        found = last.predict(trained.parent / "data" / "images" / image["file_name"])
        for r in expected:
            x, y, w, h = r["bbox"]
            distance = np.abs(found["boxes"] - np.array([x, y, x + w, y + h])).max(axis=1)
            assert distance.min() < 0.5
            checked += 1
    assert checked > 5


# ---- drawing


def test_drawing_changes_a_copy_within_its_borders():
    image = np.zeros((60, 80, 3), np.uint8)
    found = {
        "boxes": np.array([[10, 20, 50, 50], [0, 0, 80, 60], [-5, -5, 200, 300]], np.float32),
        "labels": np.array([1, 2, 3]),
        "names": ["one", "two", "três"],
        "scores": np.array([0.9, 0.5, 0.3]),
    }
    drawn = draw_detections(image, found)
    assert image.max() == 0 and drawn.shape == image.shape
    np.testing.assert_allclose(drawn[50, 30], class_color(1), atol=30)  # anti-aliased
    nothing = {"boxes": np.zeros((0, 4)), "labels": [], "names": [], "scores": np.zeros(0)}
    assert np.array_equal(draw_detections(image, nothing), image)
    assert len({class_color(i) for i in range(1, 81)}) == 80


# ---- sources


def test_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image = np.zeros((8, 8, 3), np.uint8)
    for name in ("a/x.jpg", "a/deep/x.png", "b/x.jpg", "b/y.JPG"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode(path.suffix.lower(), image)[1].tobytes())
    (tmp_path / "a/notes.txt").write_text("no image")
    (tmp_path / "odd").write_bytes(cv2.imencode(".png", image)[1].tobytes())
    write_video(tmp_path / "v.mp4", 2)
    items = find_items(["a", "b/x.jpg", "b/*", "v.mp4", "odd", "0"])
    assert [(i.kind, i.name) for i in items] == [
        ("image", "deep/x"),
        ("image", "x"),
        ("image", "x_2"),
        ("image", "x_3"),
        ("image", "y"),
        ("video", "v"),
        ("image", "odd"),
        ("camera", "camera0"),
    ]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.jpg", "does not exist"),
        ("*.nothing", "no file matches"),
        ("empty", "has no images or videos"),
        ("notes.txt", "neither an image nor a video"),
    ],
)
def test_bad_sources(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match=message):
        find_items([source])
