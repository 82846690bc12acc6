"""Image files that are none, too large, or undecodable: named, and the others are still done."""

import json
import os
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import tiny_raw, write_coco
from odd_files import dangling, fifo, loop, unix_socket
from PIL import Image
from run_tool import run

from detection import build_model
from detection.checkpoint import save_checkpoint
from detection.config_io import parse_config
from detection.core.errors import UserError
from detection.data.image_headers import stored_size
from detection.data.image_io import decode_image, read_image
from detection.inference.detect_sources import detect
from detection.inference.predictor import as_rgb
from detection.inference.sources import find_items

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """Of random weights, quickly made."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = parse_config(tiny_raw(folder, folder / "run"), "test")
    classes = {"names": ["disc", "square"], "ids": [3, 7]}
    content = {"model": build_model(config, 2).state_dict(), "config": config.model_dump(), "classes": classes}
    save_checkpoint(folder / "best.pt", content)
    return folder / "best.pt"


@pytest.fixture()
def folder(tmp_path) -> Path:
    """Five images that are all right, to which each test adds one that is not."""
    write_coco(tmp_path / "set", images=5)
    return tmp_path / "set" / "images"


def png_header(width: int, height: int) -> bytes:
    """A PNG of this size without pixels worth mentioning."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def tiff_header(width: int, height: int) -> bytes:
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in ((256, width), (257, height)))
    return b"II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(20)


def webp_header(width: int, height: int) -> bytes:
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF\x20\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + sides + bytes(8)


def avif_header(width: int, height: int) -> bytes:
    return b"\0\0\0\x20ftypavif" + bytes(20) + b"ispe" + struct.pack(">III", 0, width, height)


def jp2_header(width: int, height: int) -> bytes:
    return b"\xff\x4f\xff\x51" + struct.pack(">HHIIII", 47, 0, width, height, 0, 0) + bytes(60)


def changed(suffix: str, form: str, *sides: int) -> bytes:
    """A small image whose header names other sides."""
    data = cv2.imencode(suffix, np.zeros((64, 48, 3), np.uint8))[1].tobytes()
    find = struct.pack(form, *((64, 48) if suffix == ".jpg" else (48, 64)))
    assert find in data[:200]
    return data.replace(find, struct.pack(form, *sides), 1)


LARGE = {
    "png": (png_header(30_000, 30_000), (30_000, 30_000)),
    "jpg": (changed(".jpg", ">HH", 60_000, 50_000), (50_000, 60_000)),
    "bmp": (changed(".bmp", "<ii", 40_000, -30_000), (40_000, 30_000)),
    "gif": (changed(".gif", "<HH", 60_000, 50_000), (60_000, 50_000)),
    "tif": (tiff_header(30_000, 20_000), (30_000, 20_000)),
    "webp": (webp_header(16_383, 16_382), (16_383, 16_382)),
    "jp2": (jp2_header(30_000, 20_000), (30_000, 20_000)),
    "ppm": (b"P6 # a comment\n30000 20000\n255\n" + bytes(100), (30_000, 20_000)),
    "avif": (avif_header(30_000, 20_000), (30_000, 20_000)),
}


@pytest.mark.parametrize("kind", LARGE)
def test_large_images_are_not_decoded(kind, tmp_path, monkeypatch):
    data, size = LARGE[kind]
    path = tmp_path / f"large.{kind}"
    path.write_bytes(data)
    assert stored_size(path.read_bytes()) == size
    called = []
    monkeypatch.setattr(cv2, "imdecode", lambda *arguments: called.append(arguments))
    with pytest.raises(UserError, match=f"has {size[0]}x{size[1]} pixels, .* GHOSTNET_MAX_IMAGE_PIXELS"):
        read_image(path)
    assert not called
    monkeypatch.setenv("GHOSTNET_MAX_IMAGE_PIXELS", str(size[0] * size[1]))
    with pytest.raises(UserError, match="is not an image"):
        read_image(path)
    assert called


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".gif", ".tif", ".webp", ".jp2", ".ppm", ".pgm", ".avif"])
def test_the_size_in_the_header_is_that_of_the_image(suffix):
    image = np.random.default_rng(0).integers(0, 256, (37, 61, 3), np.uint8)
    data = cv2.imencode(suffix, image if suffix != ".pgm" else image[..., 0])[1].tobytes()
    assert stored_size(data) == (61, 37)
    assert decode_image(data).shape == (37, 61, 3)
    for end in range(0, min(len(data), 200)):
        assert stored_size(data[:end]) in (None, (61, 37))


def test_a_limit_that_is_none_is_told(monkeypatch, tmp_path):
    (tmp_path / "a.png").write_bytes(png_header(5, 5))
    for text in ("1e9", "0", "-5", "", "٣"):
        monkeypatch.setenv("GHOSTNET_MAX_IMAGE_PIXELS", text)
        with pytest.raises(UserError, match="GHOSTNET_MAX_IMAGE_PIXELS must be a whole number"):
            read_image(tmp_path / "a.png")


def huge_file(folder: Path) -> Path:
    with (folder / "sparse.jpg").open("wb") as file:
        file.truncate(10 << 30)
    return folder / "sparse.jpg"


def named(name: str, data: bytes):
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


SMALL = cv2.imencode(".jpg", np.zeros((9, 9, 3), np.uint8))[1].tobytes()
BAD = {
    "empty": (named("empty.jpg", b""), "is not an image"),
    "text": (named("text.jpg", b"hello"), "is not an image"),
    "header alone": (named("header.jpg", b"\xff\xd8\xff\xc0\0\x11\x08\0\x10\0\x10\x03"), "truncated"),
    "30000 x 30000": (named("bomb.png", png_header(30_000, 30_000)), "30000x30000 pixels"),
    "10 GB": (huge_file, "is too large"),
    "too long a name": (named("x" * 240 + ".jpg", SMALL), "name is too long"),
}  # fmt: skip
ODD = {
    "fifo": (fifo, "a named pipe"),
    "socket": (unix_socket, "a socket"),
    "loop of links": (loop, "leads back to itself"),
    "dangling link": (dangling, "nowhere.jpg, which does not exist"),
    "link to a device": (lambda folder: (folder / "zero.jpg").symlink_to("/dev/zero"), "it is a device"),
}


@pytest.mark.parametrize("name", BAD)
def test_one_bad_image_does_not_end_a_folder(name, checkpoint, folder, tmp_path):
    make, words = BAD[name]
    path = make(folder)
    outcome = run("detect", checkpoint, folder, "--out", tmp_path / "out", "--batch-size", 3)
    outcome.assert_error(path.name[:50], words, code=1)
    assert "5 images done" in outcome.out
    assert len(list((tmp_path / "out").glob("*.jpg"))) == len(list((tmp_path / "out").glob("*.json"))) == 5


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_file_is_passed_over_in_folders(name, checkpoint, folder, tmp_path):
    make, words = ODD[name]
    make(folder)
    for source in (folder, f"{folder}/*.jpg"):
        outcome = run("detect", checkpoint, source, "--out", tmp_path / "out", "--no-images")
        assert outcome.code == 0 and "5 images done" in outcome.out
        assert "warning: skipped" in outcome.err and words in outcome.err
    (odd,) = [path for path in folder.iterdir() if not path.name.startswith("image")]
    outcome = run("detect", checkpoint, odd, "--out", tmp_path / "out")
    outcome.assert_error(odd.name, words)


@pytest.mark.parametrize("name", [name for name in ODD if name != "socket"])
@pytest.mark.parametrize("tool", ["convert_data", "make_crops", "train"])
def test_what_is_no_file_among_the_images_of_a_set(tool, name, folder, tmp_path):
    make, words = ODD[name]
    make(folder)
    (odd,) = [path for path in folder.iterdir() if not path.name.startswith("image")]
    odd.rename(folder / "image 3.jpg")
    annotations = folder.parent / "annotations.json"
    sources = [f"data.{split}.annotations={annotations}" for split in ("train", "val")]
    arguments = {
        "convert_data": [annotations, "--to", "voc", "--out", tmp_path / "out"],
        "make_crops": [annotations, "--out", tmp_path / "out"],
        "train": [
            "configs/retina_ghost_320.yaml",
            *sources,
            f"data.train.images={folder}",
            f"data.val.images={folder}",
        ],
    }[tool]
    words = words if "loop" not in name and "dangling" not in name else ""
    run(tool, *arguments).assert_error("1 of 5 images", "image 3.jpg (it is", words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_file_is_a_finding(name, folder):
    make, words = ODD[name]
    make(folder)
    (odd,) = [path for path in folder.iterdir() if not path.name.startswith("image")]
    content = json.loads((folder.parent / "annotations.json").read_text())
    content["images"][3]["file_name"] = odd.name
    (folder.parent / "annotations.json").write_text(json.dumps(content))
    outcome = run("check_data", folder.parent / "annotations.json")
    assert outcome.code == 1 and words in outcome.out


def test_large_images_are_a_finding(folder):
    (folder / "image 3.jpg").write_bytes(png_header(30_000, 30_000))
    outcome = run("check_data", folder.parent / "annotations.json")
    assert outcome.code == 1 and "GHOSTNET_MAX_IMAGE_PIXELS" in outcome.out and "30000x30000" in outcome.out


class Picky:
    """Stands in for a predictor: finds nothing, and fails on images of one size, in preparing or in detecting."""

    num_streams = 1

    def __init__(self, stage: str = "", error: Exception | None = None) -> None:
        self.stage, self.error = stage, error

    def prepare(self, image, *, bgr=False):
        return self._check("prepare", image)

    def detect(self, images):
        none = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0, int), "names": [], "scores": np.zeros(0)}
        return [none for image in images if self._check("detect", image) is not None]

    def _check(self, stage, image):
        if stage == self.stage and image.shape[0] == 50:
            raise self.error
        return image


@pytest.mark.parametrize("stage", ["prepare", "detect"])
@pytest.mark.parametrize("error", [TypeError("odd"), MemoryError(), RuntimeError("tensor sizes"), cv2.error("odd")])
def test_an_image_that_fails_in_a_new_way_does_not_end_a_folder(stage, error, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("detection.core.crash_report.CACHE_FOLDER", tmp_path / "cache")
    cv2.imwrite(str(folder / "image 2b.jpg"), np.zeros((50, 50, 3), np.uint8))
    summary = detect(Picky(stage, error), find_items([str(folder)]), tmp_path / "out", batch_size=3)
    (reason,) = summary.failed
    assert "image 2b.jpg" in reason and summary.num_images == 5
    assert str(tmp_path / "cache") in reason or (isinstance(error, MemoryError) and "out of memory" in reason)
    assert len(list((tmp_path / "out").glob("*.json"))) == 5


@pytest.mark.parametrize("shape", [(4, 66_000, 3), (70_000, 3, 3)])
def test_results_too_wide_for_a_jpeg_are_smaller(shape, folder, tmp_path):
    cv2.imwrite(str(folder / "wide.png"), np.full(shape, 99, np.uint8))
    summary = detect(Picky(), find_items([str(folder)]), tmp_path / "out", batch_size=3)
    assert not summary.failed and summary.num_images == 6
    drawn = cv2.imread(str(tmp_path / "out" / "wide.jpg"))
    assert max(drawn.shape) == 65_500 and min(drawn.shape[:2]) in (3, 4)
    record = json.loads((tmp_path / "out" / "wide.json").read_text())
    assert (record["height"], record["width"]) == shape[:2]


def test_shapes_that_a_network_seldom_sees(checkpoint, folder, tmp_path):
    for height, width in ((1, 1), (1, 3000), (3000, 1), (2, 66_000)):
        cv2.imwrite(str(folder / f"{height}_{width}.png"), np.full((height, width, 3), 99, np.uint8))
    outcome = run("detect", checkpoint, folder, "--out", tmp_path / "out")
    assert outcome.code == 0 and "9 images done" in outcome.out, outcome.err


# One conversion to RGB, whether an image comes as a file or as PIL opened it.


def modes() -> dict[str, Image.Image]:
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8))
    wide = rng.integers(0, 65536, (20, 24)).astype(np.uint16)
    alpha = Image.fromarray(rng.integers(0, 256, (20, 24), np.uint8))
    images = {mode: rgb.convert(mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB")}
    images["LA"].putalpha(alpha)
    images["RGBA"].putalpha(alpha)
    images["PA"] = images["P"].convert("PA")
    images["I;16"] = Image.fromarray(wide)
    images["I;16B"] = Image.frombytes("I;16B", (24, 20), wide.astype(">u2").tobytes())
    images["I"] = Image.fromarray(wide.astype(np.int32))
    images["F"] = Image.fromarray(rng.random((20, 24), np.float32))
    clear = images["P"].copy()
    clear.info["transparency"] = bytes(range(256))
    return {**images, "P with transparency": clear}


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
@pytest.mark.parametrize("name", modes())
def test_an_image_of_pil_is_converted_as_its_file_is(name, form, tmp_path):
    path = tmp_path / f"image.{form.lower()}"
    try:
        modes()[name].save(path)
    except OSError:
        pytest.skip(f"Pillow saves no {form} of mode {name}")
    with Image.open(path) as image:
        if name in ("I", "F"):  # 32 bits, of which nobody knows the range
            for what in (path, image):
                with pytest.raises(UserError):
                    as_rgb(what)
            return
        expected = as_rgb(path)
        assert (as_rgb(image) == expected).all()
        assert expected.shape == (20, 24, 3) and len(np.unique(expected)) > (1 if name == "1" else 5)


def test_an_image_that_was_made_in_memory():
    image = modes()["I;16"]
    expected = np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    assert (as_rgb(image) == expected).all()
    assert (as_rgb(modes()["P"]) == np.asarray(modes()["P"].convert("RGB"))).all()
    hsv = modes()["RGB"].convert("HSV")
    for bad in (hsv, modes()["F"], modes()["RGBA"].convert("RGBa")):
        with pytest.raises(UserError, match=rf"PIL mode {bad.mode} is not supported"):
            as_rgb(bad)


@pytest.mark.parametrize("dtype", [np.uint16, np.float32, np.float64, np.int64, bool, object])
def test_arrays_of_other_types_are_refused(dtype):
    with pytest.raises(UserError, match="must be uint8"):
        as_rgb(np.zeros((4, 4, 3), dtype))
    with pytest.raises(UserError, match=r"\(image >> 8\)"):
        as_rgb(np.zeros((4, 4), np.uint16))


def test_no_pipe_is_left_open(tmp_path):
    """A refused file is closed."""
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(UserError):
            read_image(fifo(tmp_path) if not (tmp_path / "fifo.jpg").exists() else tmp_path / "fifo.jpg")
    assert len(os.listdir("/proc/self/fd")) == before
