"""Predictor, drawing, sources, and results on disk."""

import json

import cv2
import numpy as np
import pytest
import torch

from detection import Predictor, UserError
from detection.data.transforms import read_image
from detection.inference import detect as detect_module
from detection.inference.detect import detect
from detection.inference.draw import class_color, draw_detections
from detection.inference.sources import find_items


@pytest.fixture(scope="module")
def predictor(trained):
    return Predictor(trained / "best.pt", "cpu", score_threshold=0.2)


@pytest.fixture(scope="module")
def pictures(trained):
    return trained.parent / "data" / "images"


def write_video(path, frames=7, size=(96, 72), fourcc="mp4v"):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*fourcc), 10.0, size)
    for i in range(frames):
        frame = np.full((size[1], size[0], 3), 110, np.uint8)
        cv2.rectangle(frame, (5 + 5 * i, 20), (30 + 5 * i, 45), (240, 240, 240), -1)
        writer.write(frame)
    writer.release()


def test_predict(predictor, pictures):
    found = predictor.predict(pictures / "picture 5.jpg")
    n = len(found["scores"])
    assert n and found["boxes"].shape == (n, 4) and found["boxes"].dtype == np.float32
    assert len(found["names"]) == n and set(found["names"]) <= {"square", "disc"}
    assert (np.diff(found["scores"]) <= 0).all() and (found["scores"] >= 0.2).all()
    height, width = read_image(pictures / "picture 5.jpg").shape[:2]
    assert (
        (found["boxes"] >= 0).all() and (found["boxes"][:, 2] <= width).all() and (found["boxes"][:, 3] <= height).all()
    )


def test_kinds_of_input_agree(predictor, pictures):
    from PIL import Image

    path = pictures / "picture 4.jpg"
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


def test_batch_of_mixed_sizes(predictor, pictures):
    images = [pictures / f"picture {i}.jpg" for i in (3, 4, 5)]
    together = predictor.predict_batch(images)
    assert len(together) == 3
    for image, found in zip(images, together, strict=True):
        alone = predictor.predict(image)
        strong, alone_strong = found["scores"] > 0.4, alone["scores"] > 0.4
        assert [n for n, s in zip(found["names"], strong, strict=True) if s] == [
            n for n, s in zip(alone["names"], alone_strong, strict=True) if s
        ]


def test_class_filter(trained, pictures):
    only = Predictor(trained / "best.pt", "cpu", score_threshold=0.05, classes=["disc"])
    found = [only.predict(p) for p in sorted(pictures.iterdir())]
    names = {name for f in found for name in f["names"]}
    assert names == {"disc"} and {label for f in found for label in f["labels"].tolist()} == {2}
    with pytest.raises(
        UserError, match=r"unknown class 'dics' \(did you mean 'disc'\?\); this model knows: square, disc"
    ):
        Predictor(trained / "best.pt", "cpu", classes=["dics"])


def test_last_and_best_both_load(trained, pictures):
    for name in ("last.pt", "best.pt"):
        assert Predictor(trained / name, "cpu").classes.names == ("square", "disc")
    with pytest.raises(UserError, match="does not exist"):
        Predictor(trained / "none.pt")


def test_predictor_and_evaluation_see_the_same(trained, predictor):
    """One preprocessing for both: the strong detections of the last evaluation come out of predict, too."""
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


def test_drawing_changes_a_copy_inside_its_frame():
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
    (tmp_path / "a/notes.txt").write_text("no picture")
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
        ("empty", "holds no pictures or videos"),
        ("notes.txt", "neither a picture nor a video"),
    ],
)
def test_bad_sources(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match=message):
        find_items([source])


# ---- results on disk


def test_pictures_are_written_with_their_json(predictor, pictures, tmp_path):
    summary = detect(predictor, find_items([str(pictures)]), tmp_path / "out", batch_size=5)
    assert summary.images == 12 and not summary.failed
    for i in range(12):
        picture = cv2.imread(str(tmp_path / "out" / f"picture {i}.jpg"))
        content = json.loads((tmp_path / "out" / f"picture {i}.json").read_text())
        assert picture.shape[:2] == (content["height"], content["width"])
        for found in content["detections"]:
            assert set(found) == {"box", "label", "name", "score"} and len(found["box"]) == 4
    total = sum(len(json.loads(p.read_text())["detections"]) for p in (tmp_path / "out").glob("*.json"))
    assert total == sum(summary.objects.values()) > 0


def test_a_corrupt_picture_does_not_stop_the_others(predictor, pictures, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    data = (pictures / "picture 3.jpg").read_bytes()
    (folder / "a.jpg").write_bytes(data)
    (folder / "b.jpg").write_bytes(data[:300])
    (folder / "c.jpg").write_bytes(data)
    summary = detect(predictor, find_items([str(folder)]), tmp_path / "out", batch_size=3)
    assert summary.images == 2 and len(summary.failed) == 1 and "b.jpg is truncated" in summary.failed[0]


def frames_of(path):
    capture = cv2.VideoCapture(str(path))
    count = 0
    while capture.read()[0]:
        count += 1
    return count, capture.get(cv2.CAP_PROP_FPS)


def test_video(predictor, tmp_path):
    write_video(tmp_path / "v.mp4")
    summary = detect(predictor, find_items([str(tmp_path / "v.mp4")]), tmp_path / "out", batch_size=3)
    assert summary.frames == 7
    assert frames_of(tmp_path / "out" / "v.mp4") == (7, 10.0)
    content = json.loads((tmp_path / "out" / "v.json").read_text())
    assert [f["frame"] for f in content["frames"]] == list(range(7)) and content["fps"] == 10.0
    assert content["frames"][3]["seconds"] == pytest.approx(0.3)


def test_video_stopped_by_ctrl_c_is_kept_up_to_there(predictor, tmp_path, monkeypatch):
    write_video(tmp_path / "v.mp4")
    calls = []
    plain = Predictor.predict_batch

    def interrupted(self, images):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain(self, images)

    monkeypatch.setattr(Predictor, "predict_batch", interrupted)
    summary = detect(predictor, find_items([str(tmp_path / "v.mp4")]), tmp_path / "out")
    assert summary.interrupted and summary.frames == 3
    assert frames_of(tmp_path / "out" / "v.mp4")[0] == 3
    assert len(json.loads((tmp_path / "out" / "v.json").read_text())["frames"]) == 3


def test_max_frames_and_broken_video(predictor, tmp_path):
    write_video(tmp_path / "v.mp4")
    assert detect(predictor, find_items([str(tmp_path / "v.mp4")]), tmp_path / "out", max_frames=2).frames == 2
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    summary = detect(predictor, find_items([str(tmp_path / "broken.mp4")]), tmp_path / "out")
    assert len(summary.failed) == 1 and "broken.mp4 cannot be opened" in summary.failed[0]


def test_camera(predictor, tmp_path, monkeypatch):
    """No camera here: a video file stands in for device 3."""
    write_video(tmp_path / "v.mp4", 5)
    opened = []
    capture = cv2.VideoCapture

    def device(source):
        opened.append(source)
        return capture(str(tmp_path / "v.mp4"))

    monkeypatch.setattr(detect_module.cv2, "VideoCapture", device)
    assert detect(predictor, find_items(["3"]), tmp_path / "out", max_frames=4).frames == 4
    monkeypatch.undo()
    assert opened == [3] and frames_of(tmp_path / "out" / "camera3.mp4")[0] == 4


def test_the_source_is_never_overwritten(predictor, pictures, tmp_path):
    (tmp_path / "a.jpg").write_bytes((pictures / "picture 3.jpg").read_bytes())
    with pytest.raises(UserError, match="would overwrite the source"):
        detect(predictor, find_items([str(tmp_path / "a.jpg")]), tmp_path)


def test_unwritable_folder(predictor, pictures, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"output folder .* cannot be written to"):
        detect(predictor, find_items([str(pictures)]), tmp_path / "file" / "out")


def test_real_video(shared_data, trained, tmp_path):
    source = shared_data / "video" / "car-detection.mp4"
    predictor = Predictor(trained / "best.pt", "cpu")
    summary = detect(predictor, find_items([str(source)]), tmp_path, max_frames=12, batch_size=4)
    assert summary.frames == 12
    count, fps = frames_of(tmp_path / "car-detection.mp4")
    assert count == 12 and fps == pytest.approx(12.5, abs=0.1)
