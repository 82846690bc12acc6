"""Detection in images, videos, cameras and streams: results on disk, stopping, resuming, timing."""

import contextlib
import errno
import json
import signal
import socket
import threading
import time
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import cv2
import numpy as np
import pytest
import torch
from conftest import assert_clear_error
from processes import ToolProcess
from videos import SlowDevice, SquareFinder, frames_of, write_video

from detection import Predictor, UserError
from detection.inference import images as images_module
from detection.inference import video as video_module
from detection.inference.detect_sources import detect, num_streams_for
from detection.inference.results import Summary
from detection.inference.sources import Item, find_items


def interrupted_at(monkeypatch, call, kind=Predictor):
    """Ctrl-C during the n-th forward pass."""
    calls = []
    plain = kind.detect

    def interrupted(self, prepared):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return plain(self, prepared)

    monkeypatch.setattr(kind, "detect", interrupted)


# ---- images


@pytest.mark.numeric
@pytest.mark.parametrize("batch_size", [1, 5, 40])
def test_images_are_written_with_their_json(predictor, images, tmp_path, batch_size):
    summary = detect(predictor, find_items([str(images)]), tmp_path / "out", batch_size=batch_size)
    assert summary.num_images == 12 and not summary.failed
    for i in range(12):
        image = cv2.imread(str(tmp_path / "out" / f"image {i}.jpg"))
        content = json.loads((tmp_path / "out" / f"image {i}.json").read_text())
        assert image.shape[:2] == (content["height"], content["width"])
        expected = predictor.predict(images / f"image {i}.jpg")
        strong = [found for found in content["detections"] if found["score"] > 0.25]
        assert [found["name"] for found in strong] == expected["names"][: len(strong)]
        for found, box in zip(strong, expected["boxes"], strict=False):
            assert set(found) == {"box", "label", "name", "score"}
            np.testing.assert_allclose(found["box"], box, atol=0.1)
    total = sum(len(json.loads(p.read_text())["detections"]) for p in (tmp_path / "out").glob("*.json"))
    assert total == sum(summary.objects.values()) > 0


def test_colors_of_the_image_are_kept(tmp_path):
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, :, 2] = 200  # OpenCV's red
    cv2.imwrite(str(tmp_path / "red.png"), image)
    detect(SquareFinder(), find_items([str(tmp_path / "red.png")]), tmp_path / "out")
    np.testing.assert_allclose(cv2.imread(str(tmp_path / "out" / "red.jpg")), image, atol=6)


def test_a_corrupt_image_does_not_stop_the_others(predictor, images, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    data = (images / "image 3.jpg").read_bytes()
    (folder / "a.jpg").write_bytes(data)
    (folder / "b.jpg").write_bytes(data[:300])
    (folder / "c.jpg").write_bytes(data)
    (folder / "d.jpg").write_bytes(b"")
    summary = detect(predictor, find_items([str(folder)]), tmp_path / "out", batch_size=3)
    assert summary.num_images == 2 and len(summary.failed) == 2 and "b.jpg is truncated" in summary.failed[0]


def test_images_stopped_by_ctrl_c_and_resumed(predictor, images, tmp_path, monkeypatch):
    items = find_items([str(images)])
    interrupted_at(monkeypatch, 3)
    summary = detect(predictor, items, tmp_path, batch_size=2)
    monkeypatch.undo()
    assert summary.interrupted and summary.num_images == 4
    assert len(list(tmp_path.glob("*.jpg"))) == len(list(tmp_path.glob("*.json"))) == 4
    summary = detect(predictor, items, tmp_path, batch_size=2, resume=True)
    assert (summary.skipped, summary.num_images) == (4, 8) and not summary.interrupted
    assert len(list(tmp_path.glob("*.json"))) == 12


def test_json_only(predictor, images, tmp_path):
    items = find_items([str(images)])
    assert detect(predictor, items, tmp_path, draw=False).num_images == 12
    assert not list(tmp_path.glob("*.jpg")) and len(list(tmp_path.glob("*.json"))) == 12
    assert detect(predictor, items, tmp_path, draw=False, resume=True).skipped == 12
    # With images wanted these are not done.
    assert detect(predictor, items[:3], tmp_path, resume=True).num_images == 3


def test_full_disk_stops_the_run(images, tmp_path, monkeypatch):
    def full(path, write):
        raise UserError(f"{path} could not be written: No space left on device (is the disk full?)")

    monkeypatch.setattr(images_module, "write_output", full)
    with pytest.raises(UserError, match="disk full"):
        detect(SquareFinder(), find_items([str(images)]), tmp_path, batch_size=2)


def test_the_source_is_never_overwritten(predictor, images, tmp_path):
    (tmp_path / "a.jpg").write_bytes((images / "image 3.jpg").read_bytes())
    with pytest.raises(UserError, match="is an input of the same command"):
        detect(predictor, find_items([str(tmp_path / "a.jpg")]), tmp_path)


def test_unwritable_folder(predictor, images, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"output folder .* cannot be written to"):
        detect(predictor, find_items([str(images)]), tmp_path / "file" / "out")


# ---- videos


def frames_in(path):
    return json.loads(path.read_text())["frames"]


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_video(tmp_path, batch_size):
    write_video(tmp_path / "v.mp4")
    summary = detect(SquareFinder(), find_items([str(tmp_path / "v.mp4")]), tmp_path / "out", batch_size=batch_size)
    assert summary.num_frames == 7
    assert frames_of(tmp_path / "out" / "v.mp4") == (7, 10.0)
    content = json.loads((tmp_path / "out" / "v.json").read_text())
    assert [f["frame"] for f in content["frames"]] == list(range(7)) and content["fps"] == 10.0
    assert content["frames"][3]["seconds"] == pytest.approx(0.3) and content["complete"]
    # The square moves by five pixels a frame: each frame has its own detections.
    left = [f["detections"][0]["box"][0] for f in content["frames"]]
    np.testing.assert_allclose(left, [5 + 5 * i for i in range(7)], atol=1)


@pytest.mark.numeric
def test_parallel_streams_give_the_same_results(trained, images, tmp_path):
    write_video(tmp_path / "v.mp4", frames=20)
    items = find_items([str(images), str(tmp_path / "v.mp4")])
    threads = torch.get_num_threads()
    results = {}
    for num_streams in (1, 3):
        predictor = Predictor(trained / "best.pt", "cpu", score_threshold=0.2, num_streams=num_streams)
        summary = detect(predictor, items, tmp_path / str(num_streams), batch_size=2)
        assert (summary.num_images, summary.num_frames) == (12, 20)
        results[num_streams] = {
            path.name: json.loads(path.read_text()) for path in (tmp_path / str(num_streams)).glob("*.json")
        }
    torch.set_num_threads(threads)
    assert results[1] == results[3]


def test_num_streams_for(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    cpu, many = torch.device("cpu"), [Item("image", f"{i}.jpg", str(i)) for i in range(20)]
    assert num_streams_for(many, cpu) == num_streams_for([Item("video", "v.mp4", "v")], cpu) == 4
    assert num_streams_for(many[:2], cpu) == num_streams_for([Item("camera", "0", "0")], cpu) == 1
    assert num_streams_for(many, torch.device("cuda")) == 1


def test_video_json_only(tmp_path):
    write_video(tmp_path / "v.mp4")
    items = find_items([str(tmp_path / "v.mp4")])
    assert detect(SquareFinder(), items, tmp_path / "out", draw=False).num_frames == 7
    assert not (tmp_path / "out" / "v.mp4").exists() and len(frames_in(tmp_path / "out" / "v.json")) == 7


def test_video_stopped_by_ctrl_c_is_kept_and_resumed(tmp_path, monkeypatch):
    write_video(tmp_path / "v.mp4")
    items = find_items([str(tmp_path / "v.mp4")])
    interrupted_at(monkeypatch, 4, SquareFinder)
    summary = detect(SquareFinder(), items, tmp_path / "out")
    monkeypatch.undo()
    assert summary.interrupted and summary.num_frames == 3
    assert frames_of(tmp_path / "out" / "v.mp4")[0] == 3
    assert len(frames_in(tmp_path / "out" / "v.json")) == 3
    assert detect(SquareFinder(), items, tmp_path / "out", resume=True).num_frames == 7
    assert detect(SquareFinder(), items, tmp_path / "out", resume=True).skipped == 1


@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param(("SIGINT",), marks=pytest.mark.slow),
        pytest.param(("SIGTERM",), marks=pytest.mark.slow),
        ("SIGHUP",),
        ("SIGINT", "SIGTERM", "SIGINT"),
    ],
    ids=" ".join,
)
def test_a_signal_while_a_video_is_written(numbers, trained, tmp_path):
    """Ctrl-C at any time, signals of a cluster, a closed terminal, and several signals at once."""
    write_video(tmp_path / "long.mp4", frames=1000)
    arguments = [trained / "best.pt", tmp_path / "long.mp4", "--out", tmp_path / "out", "--device", "cpu"]
    process = ToolProcess("detect", arguments, tmp_path / "out.txt", tmp_path / "err.txt")
    video = tmp_path / "out" / "long.mp4"
    process.wait_until(video.exists)
    time.sleep(0.5)
    process.send(getattr(signal, numbers[0]))
    with contextlib.suppress(ProcessLookupError):  # a quick machine may have ended after the first one
        for name in numbers[1:]:
            time.sleep(0.02)
            process.send(getattr(signal, name))
    assert process.wait(30)
    done = process.completed()
    assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
    count = len(frames_in(tmp_path / "out" / "long.json"))
    assert 0 < count < 1000 and frames_of(video)[0] == count
    assert f"{count} video frames done" in done.stdout and "stopped, what was done is kept" in done.stdout


def test_max_frames_and_broken_video(tmp_path):
    write_video(tmp_path / "v.mp4")
    items = find_items([str(tmp_path / "v.mp4")])
    assert detect(SquareFinder(), items, tmp_path / "out", max_frames=2).num_frames == 2
    assert detect(SquareFinder(), items, tmp_path / "out", max_frames=5, batch_size=3).num_frames == 5
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    summary = detect(SquareFinder(), find_items([str(tmp_path / "broken.mp4")]), tmp_path / "out")
    assert len(summary.failed) == 1 and "broken.mp4 cannot be opened" in summary.failed[0]


def test_results_of_a_video_that_cannot_be_written(tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    write_video(tmp_path / "v.mp4")
    monkeypatch.setattr("detection.inference.video.begin_output", full)
    summary = detect(SquareFinder(), find_items([str(tmp_path / "v.mp4")]), tmp_path / "out")
    assert "v.mp4 could not be written to" in summary.failed[0]


def test_frames_per_second_are_drawn(tmp_path):
    write_video(tmp_path / "v.mp4")
    items = find_items([str(tmp_path / "v.mp4")])
    corners = []
    for show_fps in (False, True):
        detect(SquareFinder(), items, tmp_path / "out", show_fps=show_fps)
        capture = cv2.VideoCapture(str(tmp_path / "out" / "v.mp4"))
        corners.append(capture.read()[1][:6, :6].mean())
    assert corners[0] > 90 and corners[1] < 60


# ---- cameras and streams


def test_camera_reads_the_latest_frame_and_the_video_keeps_the_time(tmp_path, monkeypatch):
    device = SlowDevice(fps=50.0, frames=60)
    opened = []
    monkeypatch.setattr(video_module.cv2, "VideoCapture", lambda source: opened.append(source) or device)
    seen = []

    class Slow(SquareFinder):
        def detect(self, images):
            seen.extend(int(image[0, 0, 0]) for image in images)
            time.sleep(0.1)  # five frames come meanwhile
            return super().detect(images)

    summary = detect(Slow(), find_items(["3"]), tmp_path, batch_size=4)
    monkeypatch.undo()
    assert opened == [3] and device.released and not summary.failed
    assert 5 <= summary.num_frames <= 30 and seen == sorted(set(seen))
    # A frame waits for the network no longer than two passes.
    frames = frames_in(tmp_path / "camera3.json")
    assert [frame["frame"] for frame in frames] == list(range(summary.num_frames))
    shown = frames_of(tmp_path / "camera3.mp4")[0]
    assert shown == round(frames[-1]["seconds"] * 50) + 1 > summary.num_frames


def test_camera_stops_after_max_frames(tmp_path, monkeypatch):
    monkeypatch.setattr(video_module.cv2, "VideoCapture", lambda source: SlowDevice(frames=10_000))
    assert detect(SquareFinder(), find_items(["0"]), tmp_path, max_frames=4).num_frames == 4
    monkeypatch.undo()
    assert frames_of(tmp_path / "camera0.mp4")[0] >= 4


@pytest.fixture()
def server(tmp_path):
    """The address of a web server for the files in tmp_path."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_http_stream(server, tmp_path):
    write_video(tmp_path / "v.mp4")
    items = find_items([f"http://me:secret@{server}/v.mp4"])
    assert (items[0].kind, items[0].name) == ("stream", "127.0.0.1_v")
    summary = detect(SquareFinder(), items, tmp_path / "out", batch_size=3)
    # A file has an end: no frame is left out.
    assert summary.num_frames == 7 and not summary.failed
    assert frames_of(tmp_path / "out" / "127.0.0.1_v.mp4") == (7, 10.0)
    assert json.loads((tmp_path / "out" / "127.0.0.1_v.json").read_text())["video"] == f"http://{server}/v.mp4"


def test_streams_that_cannot_be_opened(server, tmp_path, monkeypatch):
    monkeypatch.setattr(video_module, "TIMEOUT_MS", 500)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection, never answers
        sources = [f"http://{server}/nowhere.mp4", f"rtsp://me:secret@127.0.0.1:{silent.getsockname()[1]}/live"]
        start = time.perf_counter()
        summary = detect(SquareFinder(), find_items(sources), tmp_path / "out")
        assert time.perf_counter() - start < 20
    assert len(summary.failed) == 2
    for reason in summary.failed:
        assert reason.startswith("stream ") and "cannot be opened" in reason and "secret" not in reason


def test_stream_urls(tool, trained, server, tmp_path):
    done = tool("detect", trained / "best.pt", f"http://{server}/none.mp4", "--out", tmp_path / "out")
    assert_clear_error(done, f"stream http://{server}/none.mp4 cannot be opened", code=1)


# ---- timing


def test_timing(predictor, images, tmp_path):
    write_video(tmp_path / "v.mp4")
    summary = detect(predictor, find_items([str(images), str(tmp_path / "v.mp4")]), tmp_path / "out", batch_size=4)
    for timing, count in ((summary.images, 12), (summary.video, 7)):
        assert timing.count == count
        # One thread does all of the network, within the time from beginning to end.
        assert 0 < timing.seconds["network and NMS"] < timing.wall
        for stage in ("read and decode", "resize", "draw", "encode and write"):
            assert timing.seconds[stage] > 0
    text = summary.timings()
    assert "12 images in" in text and "7 frames in" in text and "frames per second" in text


def test_options_of_the_tool(tool, trained, images, tmp_path):
    write_video(tmp_path / "v.mp4")
    options = ["--timing", "--show-fps", "--tile", "64", "--batch-size", "8", "--device", "cpu"]
    done = tool("detect", trained / "best.pt", images, tmp_path / "v.mp4", "--out", tmp_path / "out", *options)
    assert done.returncode == 0 and "images per second" in done.stdout and "frames per second" in done.stdout
    done = tool("detect", trained / "best.pt", images, "--out", tmp_path / "json", "--no-images")
    assert done.returncode == 0 and not list((tmp_path / "json").glob("*.jpg"))
    wrong = ["detect", trained / "best.pt", images, "--out", tmp_path / "out"]
    assert_clear_error(tool(*wrong, "--tile", "8"), "the tile size must be at least 32 pixels")
    assert_clear_error(tool(*wrong, "--tile", "64", "--overlap", "1"), "the overlap must be between 0 and 0.9, not 1.0")


def test_real_video(shared_data, trained, tmp_path):
    source = shared_data / "video" / "car-detection.mp4"
    predictor = Predictor(trained / "best.pt", "cpu")
    summary = detect(predictor, find_items([str(source)]), tmp_path, max_frames=12, batch_size=4)
    assert summary.num_frames == 12
    count, fps = frames_of(tmp_path / "car-detection.mp4")
    assert count == 12 and fps == pytest.approx(12.5, abs=0.1)


def test_summary_orders_classes_by_count_and_name():
    """Equal counts come in one order, whatever process found them first."""
    summary = Summary(objects=Counter({"square": 2, "disc": 2, "cat": 5}))
    assert str(summary) == "nothing done; found 5 cat, 2 disc, 2 square"
