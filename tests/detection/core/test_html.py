import base64
import re

import cv2
import numpy as np
import pytest
from browser import assert_whole, open_page

from detection.core import html
from detection.core.errors import UserError

HOSTILE = '<script>alert("x")</script> & $\\alpha$'


def drawn_plot():
    with html.plotting() as Figure:
        figure = Figure((3, 2))
        axes = figure.subplots()
        axes.plot([1, 2, 3], label=HOSTILE)
        axes.legend()
        axes.set_title(HOSTILE)
        return html.figure(figure, "a plot")


def a_page(path):
    rng = np.random.default_rng(0)
    album = html.Album()
    for i in range(3):
        assert album.add(rng.integers(0, 255, (120, 200, 3), dtype=np.uint8), f"image {i}")
    blocks = [
        html.cards([("AP", 0.5), ("images", 12345, HOSTILE)]),
        html.table(["name", "AP", "n"], [[HOSTILE, 0.25, 7], ["b", float("nan"), None]], caption="numbers"),
        html.note(HOSTILE, "error"),
        html.details("more", html.code("a: 1\n" + "b" * 400), html.paragraph("text")),
        html.heading("small"),
        html.row([drawn_plot(), drawn_plot()]),
        album.gallery(),
    ]
    html.write_page(path, f"Page {HOSTILE}", [html.Section("One", blocks, "lead"), html.Section("Two", [])])


def test_a_browser_opens_a_page_without_messages_and_requests(tmp_path):
    path = tmp_path / "a päge.html"
    a_page(path)
    for dark in (False, True):
        seen = assert_whole(path, dark=dark, screenshot=tmp_path / "shot.png", width=500)
        assert seen.title == f"Page {HOSTILE}"
        assert len(seen.images) == 3 and seen.plots == 2
        assert f"{HOSTILE} 0.250" in re.sub(r"\s+", " ", seen.text)
        shot = cv2.imread(str(tmp_path / "shot.png"))
        assert (shot[0, 0].mean() < 60) == dark


def test_assert_whole_can_fail(tmp_path):
    path = tmp_path / "bad.html"
    path.write_text(
        '<img src="data:image/jpeg;base64,AAAA"><img src="http://127.0.0.1:9/x.png"><a href="#nowhere">x</a>'
        "<script>console.error('oh'); nothing()</script>"
    )
    seen = open_page(path)
    assert any("oh" in message for message in seen.console) and any("Uncaught" in message for message in seen.console)
    assert "http://127.0.0.1:9/x.png" in seen.requests
    assert [width for _, width in seen.images] == [0, 0]
    assert seen.broken == 1


def test_text_is_escaped_everywhere(tmp_path):
    a_page(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    # The text of a plot is text, in the color of the page.
    assert "currentColor" in text and html.TEXT_COLOR not in text


def test_images_are_jpegs_of_at_most_max_side_pixels():
    rgb = np.zeros((300, 600, 3), np.uint8)
    rgb[..., 0] = 200
    head, data = html.data_uri(rgb, max_side=100).split(",")
    assert head == "data:image/jpeg;base64"
    back = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR)
    assert back.shape == (50, 100, 3)
    assert back[25, 50].tolist() == pytest.approx([0, 0, 200], abs=4)


def test_an_album_is_limited_to_max_bytes_and_counts_omitted_images():
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 255, (64, 64, 3), dtype=np.uint8) for _ in range(6)]
    size = len(html.data_uri(noise[0], 480, 80))
    album = html.Album(max_bytes=int(3.5 * size))
    taken = [album.add(rgb) for rgb in noise]
    assert taken == [True, True, True, False, False, False]
    assert album.used_bytes <= album.max_bytes
    assert "3 more images are omitted" in album.gallery()
    assert "<img" not in album.gallery()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.12345, "0.123"),
        (None, "–"),
        (float("nan"), "–"),
        (12, "12"),
        (1234567, "1\u202f234\u202f567"),
        (np.int64(3), "3"),
    ],
)
def test_format_number(value, text):
    assert html.format_number(value) == text


def test_a_page_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"page\.html could not be written"):
        html.write_page(tmp_path / "absent" / "page.html", "t", [])
