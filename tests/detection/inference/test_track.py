"""Tracking: ids of objects in videos."""

import json
import sys

import cv2
import numpy as np
import pytest
from videos import SquareFinder, frames_of, write_video

from detection import UserError
from detection.inference.detect_sources import detect
from detection.inference.sources import find_items
from detection.inference.track import Tracker


def write_squares(path, paths, frames, fps=10.0, size=(320, 240)):
    """A video of squares of 30 pixels; `paths` give (x, y) of each at a frame, or None if it is absent."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, size)
    for i in range(frames):
        frame = np.full((size[1], size[0], 3), 60, np.uint8)
        for place in (at(i) for at in paths):
            if place is not None:
                cv2.rectangle(frame, place, (place[0] + 29, place[1] + 29), (240, 240, 240), -1)
        writer.write(frame)
    writer.release()


def ids_by_place(path, frame):
    """id of each detection of a frame, keyed by the upper left corner (rounded to 10 pixels)."""
    found = json.loads(path.read_text())["frames"][frame]["detections"]
    return {(round(d["box"][0], -1), round(d["box"][1], -1)): d["id"] for d in found}


def test_ids_stay_and_new_objects_get_new_ids(tmp_path):
    paths = [
        lambda i: (10 + 5 * i, 20),  # from the left
        lambda i: (280 - 5 * i, 100),  # from the right
        lambda i: (150, 190) if i >= 12 else None,  # comes later
        lambda i: (20 + 4 * i, 150) if not 10 <= i < 14 else None,  # hidden for four frames
    ]
    write_squares(tmp_path / "v.mp4", paths, 30)
    items = find_items([str(tmp_path / "v.mp4")])
    assert detect(SquareFinder(), items, tmp_path / "out", track=True, batch_size=4).num_frames == 30
    seen: dict[int, set] = {}
    frames = json.loads((tmp_path / "out" / "v.json").read_text())["frames"]
    for i, frame in enumerate(frames):
        for found in frame["detections"]:
            distances = [
                np.hypot(at(i)[0] - found["box"][0], at(i)[1] - found["box"][1]) if at(i) else 1e9 for at in paths
            ]
            if i >= 2 and not (12 <= i <= 14):
                assert found["id"] is not None
            if found["id"] is not None:
                seen.setdefault(int(np.argmin(distances)), set()).add(found["id"])
    assert all(len(ids) == 1 for ids in seen.values()), seen
    assert len(set.union(*seen.values())) == 4
    assert seen[2] == {4}  # the last to come
    assert frames_of(tmp_path / "out" / "v.mp4") == (30, 10.0)


def test_each_video_counts_from_one(tmp_path):
    for name in ("a", "b"):
        write_squares(tmp_path / f"{name}.mp4", [lambda i: (10 + 5 * i, 20)], 6)
    items = find_items([str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4")])
    detect(SquareFinder(), items, tmp_path / "out", track=True)
    for name in ("a", "b"):
        assert list(ids_by_place(tmp_path / "out" / f"{name}.json", 5).values()) == [1]


def one(x, label=1):
    return {
        "boxes": np.array([[x, 10, x + 20, 30]], np.float32),
        "labels": np.array([label]),
        "names": ["a"],
        "scores": np.array([0.9], np.float32),
    }


NOTHING = {"boxes": np.zeros((0, 4), np.float32), "labels": np.zeros(0, np.int64), "names": [], "scores": np.zeros(0)}


@pytest.mark.parametrize(("unseen", "same"), [(8, True), (15, False)])
def test_object_unseen_for_more_than_a_second_gets_a_new_id(unseen, same):
    tracker = Tracker(10.0)
    for _ in range(25):
        first = tracker.update(one(50))["ids"]
    for _ in range(unseen):
        assert tracker.update(NOTHING)["ids"] == []
    for _ in range(3):
        again = tracker.update(one(50))["ids"]
    assert first == [1] and again == ([1] if same else [2])


def test_objects_of_different_classes_are_not_matched():
    tracker = Tracker(10.0)
    for _ in range(5):
        assert tracker.update(one(50))["ids"] in ([None], [1])
    for _ in range(3):
        found = tracker.update(one(50, label=2))
    assert found["ids"] == [2] and found["names"] == ["a"]


def test_single_false_detection_gets_no_id():
    tracker = Tracker(10.0)
    assert tracker.update(one(50))["ids"] == [None]
    for _ in range(5):
        assert tracker.update(NOTHING)["ids"] == []
    assert tracker.update(one(90))["ids"] == [None]


def test_the_tool_tracks(tool, trained, tmp_path):
    write_video(tmp_path / "v.mp4")
    done = tool("detect", trained / "best.pt", tmp_path / "v.mp4", "--out", tmp_path / "out", "--track", "--timing")
    assert done.returncode == 0 and "track" in done.stdout, done.stderr
    frames = json.loads((tmp_path / "out" / "v.json").read_text())["frames"]
    assert all("id" in found for frame in frames for found in frame["detections"])


def test_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "norfair", None)
    write_video(tmp_path / "v.mp4")
    with pytest.raises(UserError, match=r"pip install -e '.\[track\]'"):
        detect(SquareFinder(), find_items([str(tmp_path / "v.mp4")]), tmp_path / "out", track=True)
