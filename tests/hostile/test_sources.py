"""Sources of detect that are none, images from web servers, and arguments of Predictor."""

import http.server
import json
import threading

import cv2
import numpy as np
import pytest
from run_tool import run

from detection import Predictor, UserError
from detection.inference.image_urls import without_password
from detection.inference.sources import find_items

SOURCES = {
    "empty": ("", "empty name"),
    "a camera beyond all numbers": ("99999999999", "camera 99999999999 cannot be opened: the largest index is 9999"),
    "a camera of 5000 digits": ("9" * 5000, "cannot be opened: the largest index is 9999|is too long|name too long"),
    "a number in superscript": ("²", "does not exist"),
    "NUL": ("a\0b", "NUL"),
    "a long name": ("x" * 300, "too long|does not exist"),
    "another scheme": ("ftp://user:secret@host/x.jpg", "is not the URL of a stream"),
    "no host": ("http:///x.jpg", "is not the URL of a stream"),
    "a port of text": ("http://host:port/x.jpg", "cannot be opened|is not the URL"),
}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.timeout(60)
def test_a_source_that_is_none(name, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jpg").write_bytes(b"")
    source, words = SOURCES[name]
    done = run("detect", trained / "best.pt", source, "--out", tmp_path / "out", "--device", "cpu")
    assert done.code in (1, 2) and any(word in done.err for word in words.split("|")), done.err
    assert "secret" not in done.err and "unexpected" not in done.err
    assert {path.name for path in tmp_path.rglob("*")} <= {"mine.jpg", "out"}


def test_an_empty_source_is_not_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="a source is empty"):
        find_items([""])


class Handler(http.server.BaseHTTPRequestHandler):
    """An image under a name of its own and under none; text; nothing; and one that asks for a password."""

    image = b""

    def do_GET(self):
        path = self.path.partition("?")[0]
        allowed = path != "/private.jpg" or self.headers["Authorization"] == "Basic bWU6c2VjcmV0"  # me:secret
        if path == "/absent.jpg" or not allowed:
            self.send_error(404 if allowed else 401)
            return
        self.send_response(200)
        kinds = {"/text.jpg": "image/jpeg", "/raw.jpg": "application/octet-stream", "/video.mp4": "video/mp4"}
        self.send_header("Content-Type", kinds.get(path, "image/jpeg"))
        self.end_headers()
        self.wfile.write(b"no image" if path in ("/text.jpg", "/video.mp4") else self.image)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    """The address of a web server on this machine."""
    Handler.image = cv2.imencode(".jpg", np.full((72, 96, 3), 110, np.uint8))[1].tobytes()
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{made.server_port}"
    made.shutdown()
    made.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.mark.parametrize("path", ["photo.jpg", "snapshot?camera=1", "raw.jpg", "private.jpg"])
def test_an_image_of_a_web_server_is_an_image(path, server, trained, tmp_path):
    user = "me:secret@" if path == "private.jpg" else ""
    run("detect", trained / "best.pt", f"http://{user}{server}/{path}", "--out", tmp_path, "--device", "cpu")
    (record,) = tmp_path.glob("*.json")
    assert {p.suffix for p in tmp_path.iterdir() if not p.name.startswith(".")} == {".jpg", ".json"}
    content = json.loads(record.read_text())
    assert (content["width"], content["height"]) == (96, 72) and content["image"] == f"http://{server}/{path}"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("absent.jpg", "cannot be opened"),
        ("text.jpg", "is not an image that OpenCV can read"),
        ("video.mp4", "cannot"),
    ],
)
def test_what_a_web_server_does_not_have(path, words, server, trained, tmp_path):
    done = run("detect", trained / "best.pt", f"http://me:secret@{server}/{path}", "--out", tmp_path, "--device", "cpu")
    done.assert_error(words, f"http://{server}/{path}", code=1)
    assert not list(tmp_path.glob("*.[jm]*"))


def test_a_password_is_not_shown():
    assert without_password("rtsp://me:a@b@host:554/live@1") == "rtsp://host:554/live@1"
    assert without_password("http://host/a@b.jpg") == "http://host/a@b.jpg"
    assert without_password("me@home/photo.jpg") == "me@home/photo.jpg"


@pytest.mark.parametrize("threshold", [2, -0.1, float("nan"), float("inf"), "0.5", None])
def test_thresholds_that_are_none(threshold, trained):
    with pytest.raises(UserError, match="score_threshold must be a number between 0 and 1, not"):
        Predictor(trained / "best.pt", "cpu", score_threshold=threshold)


def test_no_images_give_no_detections(trained):
    predictor = Predictor(trained / "best.pt", "cpu")
    assert predictor.predict_batch([]) == [] and predictor.detect([]) == []
