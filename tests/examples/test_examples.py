"""What docs/deploy.md shows: an exported file gives the same boxes in programs that lack this package."""

import functools
import http.server
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import run_seed
from PIL import Image, ImageCms
from processes import ROOT

from detection import Predictor
from detection.data.image_io import read_image
from detection.data.transforms import resize

EXAMPLES = ROOT / "examples"
THRESHOLD = 0.3
PIXELS, SCORES = 0.05, 1e-4


@pytest.fixture(scope="module")
def model(exported) -> Path:
    return exported / "best.onnx"


@pytest.fixture(scope="module")
def predictor(trained) -> Predictor:
    return Predictor(trained / "best.pt", "cpu", score_threshold=THRESHOLD)


@pytest.fixture(scope="module")
def images(trained, tmp_path_factory) -> dict[str, Path]:
    """An image of the tiny set to be scaled down (by an odd factor, by two) or up; turned; strange colours."""
    folder = tmp_path_factory.mktemp("images")
    original = read_image(trained.parent / "data" / "images" / "image 5.jpg")
    made = {}
    for name, factor in (("third.png", 2.7), ("half.png", 2), ("larger.png", 0.7), ("turned.jpg", 3.3)):
        width, height = round(original.shape[1] * factor), round(original.shape[0] * factor)
        image = Image.fromarray(cv2.resize(original, (width, height), interpolation=cv2.INTER_CUBIC))
        exif = Image.Exif()
        if name == "turned.jpg":
            image = image.transpose(Image.Transpose.ROTATE_90)
            exif[0x0112] = 6  # orientation: turn clockwise to view
        image.save(folder / name, exif=exif, **({"quality": 95} if name.endswith("jpg") else {}))
        made[name] = folder / name
    made["profile.jpg"] = folder / "profile.jpg"
    Image.open(made["third.png"]).save(made["profile.jpg"], quality=95, icc_profile=red_for_blue())
    return made


def red_for_blue() -> bytes:
    """A colour profile that exchanges red and blue: who follows it, as OpenCV does not, sees another image."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = profile.index(b"rXYZ"), profile.index(b"bXYZ")
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(profile)


def expected(predictor: Predictor, path: Path) -> list[dict]:
    found = predictor.predict(path)
    assert len(found["scores"]), "the tiny network finds nothing: the comparison would say nothing"
    return [
        {"box": box, "name": name, "score": score}
        for box, name, score in zip(found["boxes"], found["names"], found["scores"], strict=True)
    ]


def assert_same(found: list[dict], wanted: list[dict], pixels: float = PIXELS, scores: float = SCORES) -> None:
    assert [each["name"] for each in found] == [each["name"] for each in wanted]
    np.testing.assert_allclose([each["score"] for each in found], [each["score"] for each in wanted], atol=scores)
    np.testing.assert_allclose([each["box"] for each in found], [each["box"] for each in wanted], atol=pixels)


def run(*command: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=240, **options)


def lines(done: subprocess.CompletedProcess) -> list[dict]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


# Python

# As on a machine without them.
ALONE = """
import runpy, sys
for name in ("torch", "torchvision", "detection", "backbones"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def python_example(*arguments: object) -> subprocess.CompletedProcess:
    return run(sys.executable, "-c", ALONE, EXAMPLES / "python" / "detect_onnx.py", *arguments, cwd="/")


@pytest.mark.numeric
@pytest.mark.parametrize("name", ["third.png", "half.png", "larger.png", "turned.jpg", "profile.jpg"])
def test_python(model, predictor, images, name):
    assert_same(lines(python_example(model, images[name])), expected(predictor, images[name]))


def test_python_says_what_is_wrong(model, images, tmp_path):
    (tmp_path / "no.png").write_bytes(b"?")
    (tmp_path / "no.onnx").write_bytes(model.read_bytes()[:1000])
    image = images["half.png"]
    for arguments, words in (
        ((), "python detect_onnx.py detector.onnx photo.jpg"),
        ((model, tmp_path / "no.png"), "not an image"),
        ((tmp_path / "no.onnx", image), "error: "),
        ((tmp_path / "absent.onnx", image), "error: "),
    ):
        done = python_example(*arguments)
        assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr


def test_python_says_that_it_found_nothing(model, tmp_path):
    cv2.imwrite(str(tmp_path / "grey.png"), np.full((64, 64, 3), 110, np.uint8))
    done = python_example(model, tmp_path / "grey.png")
    assert (done.returncode, done.stdout) == (0, "") and done.stderr == "nothing found that scores above 0.3\n"


def test_guide_shows_the_example():
    code = (EXAMPLES / "python" / "detect_onnx.py").read_text()
    shown = code[code.index("def detect(") : code.index("\n\nif __name__")]
    assert shown in (ROOT / "docs" / "deploy.md").read_text()


# JavaScript


@pytest.fixture(scope="module")
def node() -> str:
    path = shutil.which("node")
    if path is None:
        pytest.skip("needs Node 20 or newer: apt-get install nodejs npm")
    return path


@pytest.fixture(scope="module")
def installed(node):
    def check(name: str) -> Path:
        folder = EXAMPLES / name
        if not (folder / "node_modules").is_dir():
            pytest.skip(f"needs its packages: npm --prefix examples/{name} install")
        return folder

    return check


@pytest.fixture(scope="module")
def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if (path := shutil.which(name)) is not None:
            return path
    pytest.skip("needs Chromium: apt-get install chromium")


@pytest.mark.numeric
@pytest.mark.parametrize(
    ("shape", "short", "long", "share"),
    [
        ((480, 640), 320, 320, 0),  # halved
        ((427, 640), 320, 320, 0.002),
        ((1280, 960), 320, 320, 0),  # a quarter
        ((333, 640), 320, 320, 0.002),  # 166.5 rows: rounded to the even number, as Python does
        ((3, 400), 320, 320, 0.002),
        ((320, 320), 320, 320, 0),
        ((100, 75), 320, 320, 0.002),  # enlarged
    ],
)
def test_javascript_resizes_as_opencv_does(node, tmp_path, shape, short, long, share):
    """The same but for one grey level in at most `share` of the pixels."""
    image = np.random.default_rng(run_seed()).integers(0, 256, (*shape, 3), dtype=np.uint8)
    wanted, _ = resize(image, short, long)
    np.dstack([image, np.full(shape, 255, np.uint8)]).tofile(tmp_path / "rgba")
    script = f"""
        import {{ readFileSync, writeFileSync }} from "node:fs";
        import {{ resizedShape, resizeInto }} from {json.dumps((EXAMPLES / "web" / "detector.js").as_uri())};
        const image = {{ data: readFileSync("rgba"), height: {shape[0]}, width: {shape[1]} }};
        const [h, w] = resizedShape(image, {{ short_side: {short}, long_side: {long} }});
        const canvas = new Uint8ClampedArray((h + 1) * (w + 2) * 3);
        resizeInto(canvas, w + 2, image, h, w);
        writeFileSync("canvas", canvas);
        console.log(JSON.stringify([h, w]));
    """
    done = run(node, "--input-type=module", "-e", script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    h, w = json.loads(done.stdout)
    assert (h, w) == wanted.shape[:2]
    canvas = np.fromfile(tmp_path / "canvas", np.uint8).reshape(h + 1, w + 2, 3)
    assert not canvas[h:].any() and not canvas[:, w:].any()
    difference = np.abs(canvas[:h, :w].astype(int) - wanted)
    assert difference.max() <= 1
    assert (difference > 0).mean() <= share


def test_javascript_reads_metadata(node, model, tmp_path):
    import onnx

    (stored,) = (p.value for p in onnx.load(model).metadata_props if p.key == "ghostnet_detection")
    whole = model.read_bytes()
    (tmp_path / "truncated.onnx").write_bytes(whole[: len(whole) // 2])
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [])), tmp_path / "foreign.onnx")
    script = f"""
        import {{ readFileSync }} from "node:fs";
        import {{ readMetadata }} from {json.dumps((EXAMPLES / "web" / "detector.js").as_uri())};
        for (const path of process.argv.slice(1)) {{
            try {{ console.log(JSON.stringify(readMetadata(readFileSync(path)))); }}
            catch (error) {{ console.log(JSON.stringify(error.message)); }}
        }}
    """
    files = (model, tmp_path / "truncated.onnx", tmp_path / "foreign.onnx")
    read, truncated, foreign = lines(run(node, "--input-type=module", "-e", script, *files))
    assert read == json.loads(stored)
    assert "truncated" in truncated and "metadata are missing" in foreign


@pytest.mark.numeric
@pytest.mark.slow
@pytest.mark.parametrize("name", ["third.png", "half.png", "larger.png", "turned.jpg"])
def test_node(installed, node, model, predictor, images, name):
    folder = installed("node")
    assert_same(lines(run(node, folder / "detect.js", model, images[name])), expected(predictor, images[name]))


@pytest.mark.numeric
@pytest.mark.slow
@pytest.mark.parametrize("name", ["third.png", "turned.jpg", "profile.jpg"])
def test_page(installed, node, chromium, model, predictor, images, tmp_path, name):
    folder = installed("web")
    site = tmp_path / "site"
    # All that has to be put on a server.
    shutil.copytree(folder, site, ignore=shutil.ignore_patterns("node_modules", "package*.json", "*.onnx"))
    shutil.copy(model, site / "detector.onnx")
    handler = functools.partial(QuietHandler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        script = ROOT / "tests" / "examples" / "page.mjs"
        done = run(node, script, chromium, url, tmp_path, images[name], THRESHOLD)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["console"] == []
    # Everything comes from beside the page, and nothing is asked for or sent once an image is there.
    assert all(request.startswith((f"GET {url}", "GET data:", "GET blob:")) for request in seen["requests"])
    assert not [request for request in seen["requests"][seen["loading"] :] if not request.startswith("GET blob:")]
    for kind in ("chosen", "dropped"):
        record = json.loads((tmp_path / f"{kind}.json").read_text())
        assert (record["height"], record["width"]) == read_image(images[name]).shape[:2]
        assert_same(record["detections"], expected(predictor, images[name]))
    assert seen["saved"]["chosen"] == f"{Path(name).stem}.json"
    assert "2 classes (square, disc)" in seen["model"]
    assert "is not an image" in seen["brokenImage"] and "truncated" in seen["noModel"]


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass
