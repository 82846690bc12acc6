"""Exported files instead of checkpoints: Predictor, tools, canvas, thresholds, and files of another kind."""

import dataclasses
import json
import logging
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import assert_clear_error
from detectors import drawn

from detection import Predictor, UserError
from detection.data.image_io import read_image
from detection.runtime.exported import ExportedDetector, load_exported, read_metadata
from detection.runtime.metadata import METADATA_KEY, Metadata, parse_metadata
from detection.runtime.pytorch import detector_config, load_detector

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(exported) -> Path:
    return exported


@pytest.fixture(scope="module")
def images(trained) -> Path:
    return trained.parent / "data" / "images"


@pytest.fixture(scope="module")
def metadata(run) -> Metadata:
    return read_metadata(run / "best.onnx")


# ---- in a checkpoint's place


@pytest.mark.numeric
def test_predictor(run, images):
    images = [images / f"image {i}.jpg" for i in range(6)]
    eager, file = (Predictor(run / name, "cpu", score_threshold=0.1) for name in ("best.pt", "best.onnx"))
    assert isinstance(file.model, ExportedDetector) and file.classes == eager.classes
    count = 0
    for found, expected in zip(file.predict_batch(images), eager.predict_batch(images), strict=True):
        np.testing.assert_allclose(found["scores"], expected["scores"], atol=1e-4)
        np.testing.assert_allclose(found["boxes"], expected["boxes"], atol=0.05)
        assert found["names"] == expected["names"]
        count += len(found["names"])
    assert count > 5
    only = Predictor(run / "best.onnx", "cpu", score_threshold=0.1, classes=["disc"])
    assert {name for image in images for name in only.predict(image)["names"]} == {"disc"}


@pytest.mark.numeric
def test_tools_take_any_file(run, images, tool, tmp_path):
    """evaluate: the same AP to 1e-3; detect: the same images. Each in its own process."""
    numbers = []
    for name in ("best.pt", "best.onnx"):
        out = ("--json", tmp_path / f"{name}.json", "--save-predictions", tmp_path / "predictions.json")
        done = tool("evaluate", run / name, *out, "device=cpu", "eval.batch_size=5")
        assert done.returncode == 0, done.stderr
        numbers.append(json.loads((tmp_path / f"{name}.json").read_text()))
    assert numbers[0]["AP"] > 0.05
    for key in ("AP", "AP50", "AP75", "APs"):
        assert numbers[1][key] == pytest.approx(numbers[0][key], abs=1e-3, nan_ok=True)
    done = tool("detect", run / "best.onnx", images, "--out", tmp_path / "found", "--device", "cpu")
    assert done.returncode == 0 and "12 images done" in done.stdout, done.stderr
    assert len(list((tmp_path / "found").glob("*.jpg"))) == 12


def test_config_is_that_of_the_training(run):
    config = detector_config(run / "best.onnx")
    assert config == detector_config(run / "best.pt")
    assert detector_config(run / "best.onnx", ["eval.batch_size=7"]).eval.batch_size == 7


def test_threads_default_to_those_of_pytorch(run, monkeypatch):
    seen = []
    session = onnxruntime.InferenceSession

    def watched(path, options, **rest):
        seen.append(options.intra_op_num_threads)
        return session(path, options, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", watched)
    load_exported(run / "best.onnx", CPU)
    load_exported(run / "best.onnx", CPU, threads=2)
    assert seen == [torch.get_num_threads(), 2]


def test_onnx_runtime_without_cuda_uses_the_cpu(run, caplog):
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    with caplog.at_level(logging.WARNING, "detection"):
        detector = load_exported(run / "best.onnx", torch.device("cuda"))[0]
    assert "this ONNX Runtime has no CUDA (pip install onnxruntime-gpu)" in caplog.text
    assert len(detector(drawn((72, 96)))) == 1


# ---- frames and limits, with a function in the file's place


def recording(seen: list):
    """An inference function with two detections for each image; it records its inputs."""

    def run(images: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
        seen.append((images, sizes))
        boxes = np.zeros((len(images), 3, 4), np.float32)
        boxes[:, 0, 2:] = boxes[:, 1, 2:] = sizes[:, ::-1]
        labels = np.tile(np.array([[2, 1, 0]]), (len(images), 1))
        scores = np.tile(np.array([[0.9, 0.2, 0]], np.float32), (len(images), 1))
        return {"boxes": boxes, "labels": labels, "scores": scores}

    return run


def test_canvas_of_any_size(metadata):
    seen: list = []
    detector = ExportedDetector(recording(seen), metadata)
    images = drawn((70, 90), (40, 128), (64, 64))
    found = detector(images)
    ((batch, sizes),) = seen
    assert batch.shape == (3, 96, 128, 3) and batch.dtype == np.uint8 and sizes.dtype == np.int64
    assert sizes.tolist() == [[70, 90], [40, 128], [64, 64]]
    for padded, image, (height, width) in zip(batch, images, sizes, strict=True):
        np.testing.assert_array_equal(padded[:height, :width], image.permute(1, 2, 0).numpy())
        assert not padded[height:].any() and not padded[:, width:].any()
    assert [f["boxes"].tolist()[0] for f in found] == [[0, 0, 90, 70], [0, 0, 128, 40], [0, 0, 64, 64]]
    assert all(f["labels"].tolist() == [2, 1] and f["scores"].shape == (2,) for f in found)
    assert detector([]) == [] and len(seen) == 1


def test_a_fixed_batch_is_padded(metadata):
    seen: list = []
    detector = ExportedDetector(recording(seen), dataclasses.replace(metadata, batch=2, size=(96, 160)))
    found = detector(drawn((70, 90), (40, 128), (64, 64)))
    assert len(found) == 3 and [images.shape for images, _ in seen] == [(2, 96, 160, 3)] * 2
    assert seen[1][1].tolist() == [[64, 64], [1, 1]] and not seen[1][0][1].any()
    with pytest.raises(UserError, match=r"100x90 pixels .* does not fit into the fixed 96x160 of .*--size dynamic"):
        detector(drawn((100, 90)))


def test_thresholds(metadata):
    kept = dataclasses.replace(metadata, score_threshold=0.1)
    stricter, looser = (dataclasses.replace(kept.postprocess_spec, score_threshold=score) for score in (0.3, 0.05))
    assert len(ExportedDetector(recording([]), kept, "file", stricter)(drawn((64, 64)))[0]["scores"]) == 1
    with pytest.raises(
        UserError, match=r"file was exported with eval.score_threshold=0.1 .* of 0.05 needs a new export"
    ):
        ExportedDetector(recording([]), kept, "file", looser)
    raw = dataclasses.replace(kept, form="raw")
    assert ExportedDetector(recording([]), raw, "file", looser).postprocess_spec == looser


def test_wrong_input(metadata):
    detector = ExportedDetector(recording([]), metadata)
    for image in (torch.zeros(3, 64, 64), torch.zeros(64, 64, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"takes uint8 \[3, H, W\]"):
            detector([image])


def test_what_is_fixed_in_a_file_cannot_be_overridden(run, images):
    path = run / "best.onnx"
    overrides = ("eval.nms_threshold=0.3", "eval.max_detections=7", "eval.pre_nms_top_k=9", "model.fpn_channels=64")
    for override in overrides:
        key = override.split("=")[0] if override.startswith("eval") else "model"
        with pytest.raises(UserError, match=f"{key} cannot be changed in .*best.onnx; export the checkpoint again"):
            load_detector(path, CPU, overrides=[override])
    detector, config, _ = load_detector(path, CPU, overrides=["eval.score_threshold=0.4", "eval.batch_size=2"])
    assert config.eval.batch_size == 2
    found = detector([torch.from_numpy(read_image(images / "image 5.jpg")).permute(2, 0, 1)])
    assert (found[0]["scores"] > 0.4).all()


# ---- files that are not what they should be


def test_broken_and_foreign_files(run, tmp_path, tool):
    path = tmp_path / "file.onnx"
    data = (run / "best.onnx").read_bytes()
    for content in (data[: len(data) // 2], b"", b"\x00hello" * 100, data[5000:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"file.onnx is not an ONNX file that ONNX Runtime can run|no metadata"):
            load_detector(path, CPU)
    model = onnx.load(run / "best.onnx")
    del model.metadata_props[:]
    onnx.save(model, path)
    with pytest.raises(
        UserError, match=r"not a detector exported by this toolkit: it has no metadata.*create one with ghostdet export"
    ):
        load_detector(path, CPU)
    assert_clear_error(tool("evaluate", path), "no metadata")
    with pytest.raises(UserError, match=r"none\.onnx does not exist"):
        Predictor(tmp_path / "none.onnx")


def test_damaged_metadata(metadata):
    text = metadata.to_json()
    assert parse_metadata(text, "file") == metadata
    for broken in ("{", "[]", "{}", json.dumps({**json.loads(text), "unknown": 1}), json.dumps({"version": 1})):
        with pytest.raises(UserError, match=f"metadata '{METADATA_KEY}' of file are damaged"):
            parse_metadata(broken, "file")
    with pytest.raises(UserError, match="file has metadata of version 2, this toolkit reads version 1"):
        parse_metadata(text.replace('"version": 1', '"version": 2', 1), "file")


def test_a_missing_runtime(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"best.onnx needs onnxruntime: pip install -e '\.\[onnx\]'"):
        load_detector(run / "best.onnx", CPU)
