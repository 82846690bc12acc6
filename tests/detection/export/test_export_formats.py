"""OpenVINO, TorchScript and torch.export: the same results as PyTorch, and errors of files."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_clear_error, run_seed
from detectors import drawn, photographs, retina_ghost_320, save_detector, tiny

from detection import UserError
from detection.data.image_io import read_image
from detection.data.transforms import resize, to_tensor
from detection.evaluation.score import score_checkpoint
from detection.export import torch_export
from detection.export.exporter import FORMATS, build_export_spec, export_checkpoint
from detection.export.parity import compare
from detection.runtime.exported import load_exported, open_exported
from detection.runtime.metadata import METADATA_KEY
from detection.runtime.pytorch import load_detector

CPU = torch.device("cpu")
LIMITS = {"score_threshold": 0.05, "max_detections": 100}
slow = pytest.mark.slow
OPENVINO = pytest.param(
    "openvino",
    marks=pytest.mark.skipif(
        "ONEDNN_MAX_CPU_ISA" in os.environ,
        reason="OpenVINO asks the processor, not its oneDNN, what can run, and fails or crashes under this limit",
    ),
)
# Below 160 px a program of torch.export has to fill frames up.
FRAME = ("data.short_side=160", "data.long_side=192")
# torch.export takes a minute for each file.
ALL = ("openvino", "torchscript", "torch_export")
OTHERS = ("openvino", "torchscript", pytest.param("torch_export", marks=slow))
# OpenVINO compiles for seconds; that its files find what PyTorch finds, test_evaluation_takes_the_file shows, too.
SLOWER = (pytest.param("openvino", marks=slow), *OTHERS[1:])


@pytest.fixture(scope="module")
def small(tmp_path_factory, as_trained) -> Path:
    names = ("katze", "três", 'a "b" <c> & d')
    return save_detector(tmp_path_factory.mktemp("small") / "best.pt", tiny(*FRAME), as_trained, names)


@pytest.fixture(scope="module")
def two_stage(tmp_path_factory, as_trained) -> Path:
    config = tiny(*FRAME, "model.detector=faster_rcnn", "model.head_channels=64")
    return save_detector(tmp_path_factory.mktemp("two_stage") / "best.pt", config, as_trained)


@pytest.fixture(scope="module")
def files(small):
    """The small detector in each format, end to end, with any batch and size; exported on demand."""

    class Files(dict):
        def __missing__(self, name: str) -> Path:
            export_checkpoint(small, name)
            self[name] = small.with_suffix(FORMATS[name])
            return self[name]

    return Files()


def assert_same(path: Path, checkpoint: Path, batches, least: int, **limits) -> None:
    file, eager = load_detector(path, CPU)[0], load_detector(checkpoint, CPU)[0]
    eager.transform.canvas_size = file.metadata.size
    for images in batches:
        with torch.inference_mode():
            parity = compare(file(images), eager(images), **{**LIMITS, **limits}, tolerance=1e-4)
        assert parity.within(0.05, 1e-4) and parity.detections >= least, parity


# ---- the same as PyTorch


@pytest.mark.numeric
@slow
@pytest.mark.parametrize("name", ALL)
def test_several_threads_at_a_time(files, name):
    """As tools/detect.py calls it on a CPU."""
    run, _ = open_exported(files[name], CPU, 1)
    rng = np.random.default_rng(run_seed())
    batches = [
        (rng.integers(0, 256, (1, 160, side, 3), dtype=np.uint8), np.array([[160, side]])) for side in (160, 192, 224)
    ]
    alone = [run(*batch) for batch in batches]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda batch: run(*batch), batches * 4))
    for expected, found in zip(alone * 4, together, strict=True):
        np.testing.assert_allclose(found["scores"], expected["scores"], atol=1e-5)
        np.testing.assert_allclose(found["boxes"], expected["boxes"], atol=1e-2)


@pytest.mark.numeric
@pytest.mark.parametrize("name", SLOWER)
def test_any_batch_and_size(files, small, name):
    batches = [drawn((160, 160)), drawn((320, 288)), drawn((300, 260), (170, 320), (320, 320), (161, 200))]
    assert_same(files[name], small, batches, 10)


@pytest.mark.numeric
@pytest.mark.parametrize("name", SLOWER)
def test_small_and_thin_images(files, small, name):
    """The canvas of a torch.export file may be larger than PyTorch's, so results are only close."""
    images = [*drawn((32, 32)), *drawn((1, 1)), *drawn((3, 160)), *drawn((160, 3))]
    file, eager = load_detector(files[name], CPU)[0], load_detector(small, CPU)[0]
    with torch.inference_mode():
        for image in images:
            found, expected = file([image]), eager([image])
            height, width = image.shape[1:]
            assert (found[0]["boxes"][:, 0::2] <= width).all() and (found[0]["boxes"][:, 1::2] <= height).all()
            if name != "torch_export":
                assert compare(found, expected, **LIMITS, tolerance=1e-4).within(0.05, 1e-4)


@pytest.mark.numeric
@pytest.mark.parametrize(
    ("name", "form", "batch", "size"),
    [
        pytest.param("openvino", "raw", None, None, marks=slow),
        pytest.param("torchscript", "raw", None, None, marks=slow),
        pytest.param("torch_export", "raw", None, None, marks=slow),
        pytest.param("openvino", "end_to_end", 3, (160, 192), marks=slow),
        ("torchscript", "end_to_end", 3, (160, 192)),
        pytest.param("torch_export", "end_to_end", 3, (160, 192), marks=slow),
        pytest.param("torch_export", "raw", 1, (96, 96), marks=slow),
        pytest.param("openvino", "raw", 1, (192, 160), marks=slow),
    ],
)
def test_forms_and_fixed_shapes(small, tmp_path, name, form, batch, size):
    path = tmp_path / f"file{FORMATS[name]}"
    export_checkpoint(small, name, form=form, batch=batch, size=size, out=path)
    metadata = load_exported(path, CPU)[0].metadata
    assert (metadata.form, metadata.batch, metadata.size) == (form, batch, size)
    side = min(size) if size else 160
    assert_same(
        path, small, [drawn((side, side))] if batch == 1 else [drawn((side, side), (side - 20, 90), (64, side))], 3
    )


@pytest.mark.numeric
@slow
@pytest.mark.parametrize("name", ["openvino", "torchscript", "torch_export"])
def test_faster_rcnn(two_stage, tmp_path, name):
    path = tmp_path / f"file{FORMATS[name]}"
    export_checkpoint(two_stage, name, out=path)
    assert_same(path, two_stage, [drawn((160, 192)), drawn((160, 160), (128, 192))], 5)


@pytest.mark.numeric
@pytest.mark.parametrize("name", SLOWER)
def test_images_without_detection(trained, tmp_path, name):
    path = tmp_path / f"file{FORMATS[name]}"
    # Of one size: torch.export, for one, has little to prove then.
    export_checkpoint(trained / "best.pt", name, size=(96, 96), out=path, overrides=["eval.score_threshold=0.3"])
    image = to_tensor(resize(read_image(trained.parent / "data" / "images" / "image 5.jpg"), 96, 96)[0])
    empty = torch.full((3, 72, 96), 110, dtype=torch.uint8)
    file = load_detector(path, CPU)[0]
    for images in ([empty, image, empty], [empty]):
        assert [len(found["scores"]) > 0 for found in file(images)] == [p is image for p in images]
    assert_same(path, trained / "best.pt", [[image, empty]], 1, score_threshold=0.3)


@pytest.mark.numeric
@slow
@pytest.mark.parametrize("name", OTHERS)
def test_real_photographs(shared_data, tmp_path, as_trained, name):
    """One by one and in batches of mixed sizes; boxes within 0.05 px and scores within 1e-4."""
    checkpoint = save_detector(tmp_path / "best.pt", retina_ghost_320("eval.score_threshold=0.05"), as_trained)
    export_checkpoint(checkpoint, name)
    images = photographs(shared_data, 100)
    batches = [images[i : i + 1] for i in range(40)] + [images[i : i + 4] for i in range(40, 100, 4)]
    assert_same(checkpoint.with_suffix(FORMATS[name]), checkpoint, batches, 1)


@pytest.mark.numeric
@pytest.mark.parametrize("name", [OPENVINO, "torchscript"])
def test_evaluate_tool(trained, tmp_path, name):
    path = tmp_path / f"file{FORMATS[name]}"
    export_checkpoint(trained / "best.pt", name, out=path)
    options = {"overrides": ["data.workers=0"], "predictions_file": str(tmp_path / "p.json")}
    found, expected = (score_checkpoint(p, **options) for p in (path, trained / "best.pt"))
    assert found.numbers["AP"] == pytest.approx(expected.numbers["AP"], abs=1e-3) and expected.numbers["AP"] > 0.05


@pytest.mark.numeric
@pytest.mark.parametrize("name", [OPENVINO, "torchscript"])
def test_detect_tool(tool, files, tmp_path, name):
    import cv2

    cv2.imwrite(str(tmp_path / "photo.png"), drawn((160, 200))[0].permute(1, 2, 0).numpy())
    done = tool("detect", files[name], tmp_path / "photo.png", "--out", tmp_path / name, "--threshold", 0.1)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / name / "photo.json").read_text())["detections"]
    assert found and {d["name"] for d in found} <= {"katze", "três", 'a "b" <c> & d'}


# ---- the file


@pytest.mark.parametrize("name", OTHERS)
def test_metadata(files, small, name):
    _, written = open_exported(files[name], CPU, 1)
    expected = build_export_spec(small).metadata
    assert written.names == ("katze", "três", 'a "b" <c> & d') and written.config == expected.config
    assert written.anchors == expected.anchors and written.mean == expected.mean and written.quantized is None


@pytest.mark.numeric
@slow
def test_torchscript_without_this_package(files, tmp_path):
    """It needs only torch and torchvision."""
    (image,) = drawn((160, 192))
    np.save(tmp_path / "image.npy", image.permute(1, 2, 0).numpy())
    program = f"""
import sys, numpy as np, torch, torchvision
notes = {{"{METADATA_KEY}": ""}}
module = torch.jit.load(sys.argv[1], _extra_files=notes)
images = torch.from_numpy(np.load("image.npy"))[None]
boxes, labels, scores = module(images, torch.tensor([[160, 192]]))
assert "detection" not in sys.modules and b"katze" in notes["{METADATA_KEY}"]
np.save("scores.npy", scores.numpy())
"""
    command = [sys.executable, "-c", program, str(files["torchscript"])]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, env={"PATH": ""})
    assert done.returncode == 0, done.stderr
    scores = load_detector(files["torchscript"], CPU)[0]([image])[0]["scores"].numpy()
    np.testing.assert_allclose(np.load(tmp_path / "scores.npy")[0, : len(scores)], scores, atol=1e-5)


@slow
def test_batch_norms_are_folded(small):
    spec = build_export_spec(small)
    folded = torch_export.fold_batch_norms(spec.network, spec.example)
    norms = [name for name, m in folded.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
    # What is left: each level of a tower has a norm of its own behind the one convolution.
    assert norms and all("towers" in name for name in norms)
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in spec.network.heads.backbone.modules())


def test_batch_norm_whose_input_is_used_elsewhere_is_not_folded():
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)
            torch.nn.init.uniform_(self.norm.running_mean, 3, 4)

        def forward(self, x):
            x = self.conv(x)
            return (self.norm(x) + x,)

    network = Network().eval()
    folded = torch_export.fold_batch_norms(network, (torch.rand(1, 3, 8, 8),))
    assert isinstance(folded.norm, torch.nn.BatchNorm2d)


# ---- mistakes


@pytest.mark.parametrize("name", OTHERS)
def test_corrupt_and_foreign_files(files, tmp_path, name):
    path = tmp_path / f"file{FORMATS[name]}"
    data = files[name].read_bytes()
    if name == "openvino":
        shutil.copy(files[name].with_suffix(".bin"), path.with_suffix(".bin"))
    for content in (b"", b"<annotation><object>dog</object></annotation>", data[: len(data) // 2], data[:-100]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"file\.\w+ .*(truncated or corrupt|no metadata)"):
            load_detector(path, CPU)
    with pytest.raises(UserError, match="does not exist"):
        load_detector(tmp_path / f"none{FORMATS[name]}", CPU)


@pytest.mark.parametrize("name", OTHERS[1:])
def test_a_damaged_archive(files, tmp_path, name):
    path = tmp_path / f"file{FORMATS[name]}"
    data = bytearray(files[name].read_bytes())
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(b ^ 255 for b in data[middle : middle + 64])
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"is damaged: .* has a wrong checksum"):
        load_detector(path, CPU)


def test_files_of_others(tmp_path):
    """Intact files without our metadata; no code in them runs."""
    network = torch.nn.Linear(2, 2)
    with pytest.warns(FutureWarning):
        torch.jit.save(torch.jit.trace(network, torch.rand(1, 2)), tmp_path / "a.torchscript")
    torch.export.save(torch.export.export(network, (torch.rand(1, 2),)), tmp_path / "b.pt2")
    import openvino

    openvino.save_model(openvino.convert_model(network, example_input=torch.rand(1, 2)), tmp_path / "c.xml")
    for file in ("a.torchscript", "b.pt2", "c.xml"):
        with pytest.raises(UserError, match=rf"{file} is not a detector exported by this toolkit: it has no metadata"):
            load_detector(tmp_path / file, CPU)


def test_the_two_files_of_openvino(files, tmp_path):
    path, numbers = tmp_path / "file.xml", tmp_path / "file.bin"
    shutil.copy(files["openvino"], path)
    with pytest.raises(
        UserError, match=r"file\.bin is missing: an OpenVINO detector is two files, file.xml and file.bin"
    ):
        load_detector(path, CPU)
    data = bytearray(files["openvino"].with_suffix(".bin").read_bytes())
    numbers.write_bytes(data[:-1000])
    with pytest.raises(UserError, match=r"file\.(bin|xml) .*truncated"):
        load_detector(path, CPU)
    data[len(data) // 2] ^= 1
    numbers.write_bytes(data)
    with pytest.raises(UserError, match=r"file\.bin does not belong to file\.xml"):
        load_detector(path, CPU)


def test_a_missing_extra(small, files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    for call in (
        lambda: load_detector(files["openvino"], CPU),
        lambda: export_checkpoint(small, "openvino", out=tmp_path / "x.xml"),
    ):
        with pytest.raises(UserError, match=r"needs openvino: pip install -e '\.\[openvino\]'"):
            call()
    assert not list(tmp_path.iterdir())


def test_network_that_torch_export_does_not_support(small, tmp_path):
    spec = build_export_spec(small)

    class Odd(torch.nn.Module):
        nms = None

        def forward(self, images, sizes):
            return images.float().sum() if images.sum().item() > 7 else sizes, sizes

    spec.network = Odd()
    with pytest.raises(UserError, match=r"torch\.export does not support this network .*use --format onnx"):
        torch_export.export_torch_export(spec, tmp_path / "x.pt2")


@pytest.mark.parametrize("name", OTHERS)
def test_mistakes_of_a_user(tool, two_stage, files, name):
    done = tool("export", two_stage, "--format", name, "--form", "raw")
    assert_clear_error(done, "no raw form", "--form end_to_end")
    done = tool("evaluate", files[name], "eval.nms_threshold=0.3")
    assert_clear_error(done, "eval.nms_threshold cannot be changed", files[name].name, "export the checkpoint again")


def test_cuda_falls_back_to_the_cpu(files, caplog):
    """A file that only runs on the CPU logs a warning and runs there."""
    for name in ("openvino", "torchscript"):
        run, _ = open_exported(files[name], torch.device("cuda"), 1)
        assert "runs on the CPU" in caplog.text
        caplog.clear()
        assert run(np.zeros((1, 160, 160, 3), np.uint8), np.array([[160, 160]]))["scores"].shape == (1, 100)
