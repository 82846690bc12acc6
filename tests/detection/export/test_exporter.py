"""Export of detectors: the graph, ONNX files, the NumPy decode, and tools/export.py."""

import collections
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import assert_clear_error
from detectors import ROOT, drawn, photographs, retina_ghost_320, save_detector, tiny
from torchvision.models.detection.image_list import ImageList

from detection import UserError, build_model
from detection.data.image_io import read_image
from detection.data.transforms import resize, to_tensor
from detection.export import onnx as onnx_file
from detection.export.detector_ops import AnchorGrid, feature_map_shapes
from detection.export.exporter import build_export_spec, export_checkpoint, verify_export
from detection.export.parity import compare
from detection.runtime.decode import decode, make_anchors
from detection.runtime.exported import load_exported
from detection.runtime.metadata import METADATA_KEY
from detection.runtime.pytorch import load_detector

CPU = torch.device("cpu")
LIMITS = {"score_threshold": 0.05, "max_detections": 100}


@pytest.fixture(scope="module")
def retina(tmp_path_factory, as_trained) -> Path:
    """A checkpoint of retina_ghost_320 and its ONNX file with any batch and size."""
    folder = tmp_path_factory.mktemp("retina")
    path = save_detector(folder / "best.pt", retina_ghost_320("eval.score_threshold=0.05"), as_trained)
    export_checkpoint(path, "onnx")
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory, as_trained) -> Path:
    return save_detector(tmp_path_factory.mktemp("small") / "best.pt", tiny(), as_trained)


@pytest.fixture(scope="module")
def small_file(small) -> Path:
    """The small detector as ONNX, with any batch and size."""
    export_checkpoint(small, "onnx")
    return small.with_suffix(".onnx")


@pytest.fixture(scope="module")
def raw_file(small) -> Path:
    path = small.with_name("raw.onnx")
    export_checkpoint(small, "onnx", form="raw", out=path)
    return path


@pytest.fixture(scope="module")
def two_stage(tmp_path_factory, as_trained) -> Path:
    config = tiny("model.detector=faster_rcnn", "model.head_channels=64")
    return save_detector(tmp_path_factory.mktemp("two_stage") / "best.pt", config, as_trained)


def results(path: Path, images: list[torch.Tensor], **options) -> list:
    """Detections of a checkpoint or an exported file for a batch."""
    with torch.inference_mode():
        return load_detector(path, CPU, **options)[0](images)


# ---- the same as PyTorch


@pytest.mark.numeric
def test_real_photographs(retina, shared_data):
    """One by one and in batches of mixed sizes; boxes within 0.05 px and scores within 1e-4."""
    images = photographs(shared_data, 24)
    assert len({tuple(p.shape) for p in images}) > 5
    eager, file = load_detector(retina, CPU)[0], load_detector(retina.with_suffix(".onnx"), CPU)[0]
    with torch.inference_mode():
        for count in (1, 3, 8):
            for start in range(0, len(images), count * 2):
                some = images[start : start + count]
                parity = compare(file(some), eager(some), **LIMITS, tolerance=1e-4)
                assert parity.within(0.05, 1e-4) and parity.detections > 5 * count, parity


@pytest.mark.numeric
@pytest.mark.parametrize(
    ("detector", "batch", "size"),
    [
        ("small", 3, (160, 192)),
        ("two_stage", None, None),
        pytest.param("small", 1, None, marks=pytest.mark.slow),
        pytest.param("small", None, (192, 160), marks=pytest.mark.slow),
        pytest.param("two_stage", 3, (160, 192), marks=pytest.mark.slow),
        pytest.param("two_stage", 1, (192, 160), marks=pytest.mark.slow),
    ],
)
def test_batch_and_size_fixed_or_not(detector, batch, size, request, tmp_path):
    checkpoint = request.getfixturevalue(detector)
    path = tmp_path / "file.onnx"
    export_checkpoint(checkpoint, "onnx", batch=batch, size=size, out=path)
    shape = [d.dim_value or d.dim_param for d in onnx.load(path).graph.input[0].type.tensor_type.shape.dim]
    assert shape == [batch or "batch", *(size or ("height", "width")), 3]
    eager, file = load_detector(checkpoint, CPU)[0], load_detector(path, CPU)[0]
    eager.transform.canvas_size = size
    images = drawn((96, 160), (150, 100), (33, 32), (160, 160))
    with torch.inference_mode():
        found = file(images)
        expected = [one for p in chunks(images, batch or 4) for one in eager(p)]
    parity = compare(found, expected, **LIMITS, tolerance=1e-4)
    assert parity.within(0.05, 1e-4) and parity.detections > 50, parity
    assert [len(f["scores"]) for f in found] == [len(e["scores"]) for e in expected]
    for f, e in zip(found, expected, strict=True):
        assert {name: value.dtype for name, value in f.items()} == {name: value.dtype for name, value in e.items()}


def chunks(images, count):
    return [images[i : i + count] for i in range(0, len(images), count)]


@pytest.mark.numeric
@pytest.mark.parametrize("size", [None, pytest.param((96, 96), marks=pytest.mark.slow)])
def test_trained_detector_and_images_without_detection(trained, tmp_path, size):
    """Images with and without detections in one batch; a batch without any detection."""
    path = tmp_path / "file.onnx"
    export_checkpoint(trained / "best.pt", "onnx", size=size, out=path, overrides=["eval.score_threshold=0.3"])
    image = to_tensor(resize(read_image(trained.parent / "data" / "images" / "image 5.jpg"), 96, 96)[0])
    empty = torch.full((3, 72, 96), 110, dtype=torch.uint8)
    eager, file = load_detector(trained / "best.pt", CPU, score_threshold=0.3)[0], load_detector(path, CPU)[0]
    for images in ([empty, image, empty], [empty], [empty, empty]):
        with torch.inference_mode():
            found, expected = file(images), eager(images)
        assert [len(f["scores"]) > 0 for f in found] == [p is image for p in images]
        assert compare(found, expected, score_threshold=0.3, max_detections=100, tolerance=1e-4).within(0.05, 1e-4)
        assert found[0]["boxes"].shape == (0, 4) and found[0]["labels"].dtype == torch.int64


@pytest.mark.numeric
@pytest.mark.slow
def test_more_detections_than_candidates(small, tmp_path):
    """A canvas with fewer anchors than max_detections: the rest of the outputs is zero."""
    path = tmp_path / "file.onnx"
    overrides = ["eval.max_detections=900", "eval.score_threshold=0"]
    export_checkpoint(small, "onnx", batch=1, size=(32, 32), out=path, overrides=overrides)
    detector = load_detector(path, CPU)[0]
    raw = detector.run(np.zeros((1, 32, 32, 3), np.uint8), np.array([[32, 32]]))
    assert raw["scores"].shape == (1, 900) and raw["boxes"].shape == (1, 900, 4)
    used = int((raw["scores"] > 0).sum())
    assert 100 < used < 621 and (raw["boxes"][0, used:] == 0).all() and (raw["labels"][0, used:] == 0).all()
    assert (np.diff(raw["scores"][0]) <= 0).all()


MORE = [
    "timm/repghostnet_050",
    "ghostnetv2",
    "mobilenet_v3_large",
    "resnet50",
    "efficientnet_b0",
    "timm/ghostnetv3_050",
    "timm/mobileone_s0",
    "timm/tf_efficientnet_lite0",
    "vgg11_bn",
]


@pytest.mark.numeric
@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_other_backbones(name, tmp_path, as_trained):
    config = tiny(
        f"model.backbone.name={name}", "model.backbone.width=1.0", "model.head_norm=group", "model.head_groups=4"
    )
    checkpoint = save_detector(tmp_path / "best.pt", config, as_trained)
    export_checkpoint(checkpoint, "onnx")
    path, images = checkpoint.with_suffix(".onnx"), drawn((128, 160), (120, 128))
    parity = compare(results(path, images), results(checkpoint, images), **LIMITS, tolerance=1e-4)
    assert parity.within(0.05, 1e-4) and parity.detections > 20, parity
    # Norms are folded and branches fused.
    assert "BatchNormalization" not in operators(path)


@pytest.mark.numeric
@pytest.mark.slow
def test_ghosted_detector(tmp_path, as_trained):
    config = tiny("model.ghostify.ratio=2", "model.backbone.name=mobilenet_v2", "model.backbone.width=0.5")
    checkpoint = save_detector(tmp_path / "best.pt", config, as_trained)
    export_checkpoint(checkpoint, "onnx", form="raw")
    path, images = checkpoint.with_suffix(".onnx"), drawn((128, 160), (120, 128))
    parity = compare(results(path, images), results(checkpoint, images), **LIMITS, tolerance=1e-4)
    assert parity.within(0.05, 1e-4) and parity.detections > 20, parity


# ---- the file


def operators(path: Path) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in onnx.load(path).graph.node)


def test_content_of_the_file(retina):
    model = onnx.load(retina.with_suffix(".onnx"))
    onnx.checker.check_model(model, full_check=True)
    shapes = {
        v.name: [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim]
        for v in [*model.graph.input, *model.graph.output]
    }
    assert shapes == {
        "images": ["batch", "height", "width", 3],
        "sizes": ["batch", 2],
        "boxes": ["batch", 100, 4],
        "labels": ["batch", 100],
        "scores": ["batch", 100],
    }
    ops = operators(retina.with_suffix(".onnx"))
    # Norms are folded, also those of the head, where each level has its own behind one convolution.
    assert ops["NonMaxSuppression"] == 1 and not ops.keys() & {"BatchNormalization", "Loop", "If", "ReduceMean"}
    # Ghost modules that need all of their maps do not cut any off.
    assert ops["Slice"] < 10
    metadata = json.loads({p.key: p.value for p in model.metadata_props}[METADATA_KEY])
    assert metadata["version"] == 1 and metadata["form"] == "end_to_end" and metadata["detector"] == "retinanet"
    assert metadata["names"] == ["cat", "dog", "bird"] and metadata["ids"] == [1, 2, 3]
    assert metadata["batch"] is None and metadata["size"] is None and metadata["stride"] == 32
    assert metadata["short_side"] == metadata["long_side"] == 320
    assert (
        metadata["score_threshold"] == 0.05 and metadata["nms_threshold"] == 0.6 and metadata["max_detections"] == 100
    )
    assert metadata["mean"] == pytest.approx([0.485, 0.456, 0.406]) and metadata["std"][0] == pytest.approx(0.229)
    assert metadata["versions"]["torch"] == torch.__version__ and metadata["versions"]["onnx"] == onnx.__version__
    assert metadata["config"] == retina_ghost_320("eval.score_threshold=0.05").model_dump(mode="json")


@pytest.mark.slow
def test_a_fixed_size_makes_a_smaller_graph(small, small_file, tmp_path):
    export_checkpoint(small, "onnx", batch=1, size=(160, 160), out=tmp_path / "fixed.onnx")
    any_size, fixed = operators(small_file), operators(tmp_path / "fixed.onnx")
    assert fixed["Range"] == 0 < any_size["Range"] and fixed.total() < any_size.total() - 50


@pytest.mark.parametrize(
    ("size", "sides"),
    [((160, 160), (128, 160)), ((320, 320), (320, 320)), ((128, 224), (128, 224)), (None, (128, 160))],
)
def test_images_are_resized_to_fill_a_fixed_canvas(small, size, sides):
    metadata = build_export_spec(small, size=size).metadata
    assert (metadata.short_side, metadata.long_side) == sides


@pytest.mark.numeric
@pytest.mark.parametrize("detector", ["retinanet", "faster_rcnn"])
@pytest.mark.parametrize("size", [(320, 320), (96, 352)])
def test_anchors_match_torchvision(detector, size):
    model = build_model(tiny(f"model.detector={detector}"), 2).eval()
    generator = model.anchor_generator if detector == "retinanet" else model.rpn.anchor_generator
    shapes = feature_map_shapes(model, size)
    maps = [torch.zeros(1, 8, *shape) for shape in shapes]
    expected = generator(ImageList(torch.zeros(1, 3, *size), [size]), maps)[0]
    for anchors in (
        AnchorGrid(generator.cell_anchors),
        AnchorGrid(generator.cell_anchors, size, feature_map_shapes(model, size)),
    ):
        table = anchors(*size, maps)
        corners = torch.cat([table[:, :2] - table[:, 2:] / 2, table[:, :2] + table[:, 2:] / 2], dim=1)
        torch.testing.assert_close(corners, expected, rtol=0, atol=0)
    if detector == "retinanet":
        spec = {"strides": [8, 16, 32, 64, 128], "cells": [cell.tolist() for cell in generator.cell_anchors]}
        np.testing.assert_array_equal(np.concatenate(make_anchors(spec, size)), expected.numpy())


# ---- raw


@pytest.mark.numeric
def test_raw_form_decoded(small, raw_file):
    images = drawn((320, 240), (200, 320), (320, 320))
    parity = compare(results(raw_file, images), results(small, images), **LIMITS, tolerance=1e-4)
    assert parity.within(0.05, 1e-4) and parity.detections > 30, parity
    # Its limits are not in the file: others can be asked for.
    overrides = ["eval.nms_threshold=0.3", "eval.score_threshold=0.01", "eval.max_detections=20"]
    found, expected = (results(p, images, overrides=overrides) for p in (raw_file, small))
    parity = compare(found, expected, score_threshold=0.01, max_detections=20, tolerance=1e-4)
    assert parity.within(0.05, 1e-4) and parity.detections == 60, parity


@pytest.mark.numeric
def test_decode_needs_only_numpy(small, raw_file, tmp_path):
    """decode.py copied alone: without torch and without this package."""
    (tmp_path / "decode.py").write_bytes((ROOT / "detection" / "runtime" / "decode.py").read_bytes())
    (image,) = drawn((320, 288))
    np.save(tmp_path / "image.npy", image.permute(1, 2, 0).numpy())
    program = """
import json, sys
import numpy as np, onnxruntime
from decode import decode
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options)
metadata = json.loads(session.get_modelmeta().custom_metadata_map["ghostnet_detection"])
frames = np.load("image.npy")[None]
sizes = np.array([frames.shape[1:3]])
logits, regression = session.run(None, {"images": frames, "sizes": sizes})
found = decode(logits, regression, sizes, frames.shape[1:3], metadata)[0]
assert "torch" not in sys.modules and "detection" not in sys.modules
json.dump({name: value.tolist() for name, value in found.items()}, open("found.json", "w"))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(raw_file)], cwd=tmp_path, text=True, capture_output=True, env={"PATH": ""}
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    found["boxes"] = np.array(found["boxes"]).reshape(-1, 4)
    parity = compare([found], results(small, [image]), **LIMITS, tolerance=1e-4)
    assert parity.within(0.05, 1e-4) and parity.detections > 10, parity


def test_decode_without_candidates():
    spec = {"strides": [8], "cells": [[[-8, -8, 8, 8]]], "weights": [1, 1, 1, 1], "limit": 4.1, "candidates": 1000}
    metadata = {"score_threshold": 0.5, "nms_threshold": 0.5, "max_detections": 10, "anchors": spec}
    logits, codes = np.full((1, 16, 2), -9, np.float32), np.zeros((1, 16, 4), np.float32)
    (found,) = decode(logits, codes, np.array([[32, 32]]), (32, 32), metadata)
    assert found["boxes"].shape == (0, 4) and found["labels"].dtype == np.int64 and not len(found["scores"])
    logits[0, 5, 1] = 3
    (found,) = decode(logits, codes, np.array([[32, 32]]), (32, 32), metadata)
    np.testing.assert_allclose(found["boxes"], [[0, 0, 16, 16]])
    assert found["labels"].tolist() == [2]


# ---- the tool and its mistakes


@pytest.mark.numeric
def test_the_tool(tool, small, tmp_path):
    out = tmp_path / "file.onnx"
    done = tool(
        "export", small, "--format", "onnx", "--batch", 1, "--size", "160x192", "--out", out, "eval.score_threshold=0.1"
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 6 and lines[0].startswith(f"{out}  ") and "MB" in lines[0]
    assert "images uint8 [1, 160, 192, 3]" in lines[1] and "cat, dog, bird" in lines[4] and "parity" in lines[5]
    assert load_exported(out, CPU)[0].metadata.score_threshold == 0.1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "100"], ["multiples of 32"]),
        (["--size", "3,2"], ["--size 3,2", "height x width"]),
        (["--batch", "0"], ["--batch 0"]),
        (["--out", "file.xml"], ["must end in .onnx"]),
        (["--out", "/dev/null/x.onnx"], ["cannot be written to"]),
        (["eval.score_treshold=1"], ["did you mean 'eval.score_threshold'"]),
    ],
)
def test_mistakes(tool, small, arguments, words):
    assert_clear_error(tool("export", small, "--format", "onnx", *arguments), *words)


def test_what_cannot_be_exported(small, small_file, two_stage, tmp_path):
    with pytest.raises(UserError, match=r"no raw form.*use --form end_to_end"):
        export_checkpoint(two_stage, "onnx", form="raw", out=tmp_path / "x.onnx")
    with pytest.raises(UserError, match=r"export the checkpoint \(best\.pt\)"):
        export_checkpoint(small_file, "onnx", out=tmp_path / "y.onnx")
    with pytest.raises(UserError, match="does not exist"):
        export_checkpoint(tmp_path / "none.pt", "onnx")
    with pytest.raises(UserError, match="unknown form 'rwa'"):
        build_export_spec(small, form="rwa")


def test_a_missing_extra(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxslim", None)
    with pytest.raises(UserError, match=r"needs onnxslim: pip install -e '\.\[onnx\]'"):
        export_checkpoint(small, "onnx", out=tmp_path / "x.onnx")
    assert not (tmp_path / "x.onnx").exists()


@pytest.mark.numeric
def test_file_with_other_results_raises(small, small_file):
    other = build_export_spec(small)
    with torch.no_grad():
        other.model.head.classification_head.cls_logits.bias += 0.1
    with pytest.raises(UserError, match=r"does not compute what PyTorch does \(.*. Do not use it"):
        verify_export(small_file, other)


def test_network_that_onnx_does_not_support(small, tmp_path, monkeypatch):
    """The error of the exporter becomes one line."""
    spec = build_export_spec(small)

    class Odd(torch.nn.Module):
        def forward(self, images, sizes):
            return torch.linalg.svd(images[0, :, :, 0].float())[0], sizes

    spec.network = Odd()
    with pytest.raises(UserError, match="cannot be exported to ONNX"):
        onnx_file.export_onnx(spec, tmp_path / "x.onnx")
