"""GhostDet in each format: the same results as PyTorch, whole and raw, and int8."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from detectors import ROOT, drawn, save_detector

from detection import load_config
from detection.export.exporter import FORMATS, build_export_spec, export_checkpoint
from detection.export.ghostdet import GhostDetDetector
from detection.export.parity import compare
from detection.models.ghostdet import points_of
from detection.runtime.decode import make_points
from detection.runtime.pytorch import load_detector

CPU = torch.device("cpu")
LIMITS = {"score_threshold": 0.05, "max_detections": 100}
slow = pytest.mark.slow


def tiny(*overrides: str):
    return load_config(
        ROOT / "configs" / "ghostdet_small.yaml",
        [
            "model.backbone.width=0.5",
            "model.fpn_channels=32",
            "model.head_depth=1",
            "data.progressive=[]",
            "data.short_side=128",
            "data.long_side=160",
            "eval.score_threshold=0.05",
            *overrides,
        ],
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, as_trained) -> Path:
    return save_detector(tmp_path_factory.mktemp("ghostdet") / "best.pt", tiny(), as_trained)


@pytest.mark.numeric
@pytest.mark.parametrize(
    ("name", "form", "batch", "size"),
    [
        ("onnx", "end_to_end", None, None),
        ("onnx", "end_to_end", 1, (160, 192)),
        ("onnx", "raw", None, None),
        pytest.param("openvino", "end_to_end", None, None, marks=slow),
        pytest.param("torchscript", "end_to_end", None, None, marks=slow),
        pytest.param("openvino", "raw", None, (160, 192), marks=slow),
        pytest.param("torchscript", "raw", None, (160, 192), marks=slow),
        pytest.param("torch_export", "end_to_end", None, None, marks=slow),
        pytest.param("torch_export", "raw", 2, (160, 192), marks=slow),
    ],
)
def test_file_matches_pytorch(checkpoint, tmp_path, name, form, batch, size):
    path = tmp_path / f"file{FORMATS[name]}"
    export_checkpoint(checkpoint, name, form=form, batch=batch, size=size, out=path)
    eager, file = load_detector(checkpoint, CPU)[0], load_detector(path, CPU)[0]
    eager.transform.canvas_size = size
    # Dynamic torch.export files put what is smaller into frames of 160 px, and the backbone's gates see that.
    small = name != "torch_export" or size is not None
    images = drawn(*((96, 160), (150, 110), (33, 32), (160, 160)) if small else ((130, 160), (150, 140), (160, 133)))
    with torch.inference_mode():
        for some in (images[:1], images[1:2], images) if size is None else (images[:2],):
            parity = compare(file(some), eager(some), **LIMITS, tolerance=1e-4)
            assert parity.within(0.05, 1e-4) and parity.detections > 10 * len(some), parity


def test_points_of_the_numpy_decode():
    shapes = [(12, 44), (6, 22), (3, 11)]
    points, strides = points_of(shapes, CPU)
    table = make_points({"strides": [8, 16, 32]}, (96, 352))
    np.testing.assert_array_equal(table, torch.cat([points, strides[:, None]], dim=1).numpy())


@pytest.mark.numeric
def test_best_pairs_of_best_points_are_the_best_of_all(checkpoint):
    """With fewer candidates than pairs and points, chosen point by point first."""
    spec = build_export_spec(checkpoint, size=(160, 192))
    model, network = spec.model, spec.network
    assert isinstance(network, GhostDetDetector)
    model.postprocess_spec = network.spec = replace(model.postprocess_spec, pre_nms_top_k=50)
    images = drawn((160, 192), (100, 150))
    frames = torch.zeros(2, 160, 192, 3, dtype=torch.uint8)
    for frame, image in zip(frames, images, strict=True):
        frame[: image.shape[1], : image.shape[2]] = image.permute(1, 2, 0)
    with torch.inference_mode():
        boxes, labels, scores = network(frames, torch.tensor([[160, 192], [100, 150]]))
        model.transform.canvas_size = (160, 192)
        for i, expected in enumerate(model(images)):
            count = len(expected["scores"])
            assert 5 < count < 50 and not scores[i, count:].any()
            torch.testing.assert_close(scores[i, :count], expected["scores"])
            torch.testing.assert_close(boxes[i, :count], expected["boxes"], atol=1e-3, rtol=0)
            assert torch.equal(labels[i, :count], expected["labels"])


@pytest.mark.numeric
def test_nms_is_class_wise(checkpoint):
    """Two classes with equal scores at the same points: each keeps all of its boxes."""
    model = load_detector(checkpoint, CPU, overrides=["eval.max_detections=300"])[0]
    with torch.no_grad():
        for level in model.head.levels:
            level.cls_logits.weight[1] = level.cls_logits.weight[0]
            level.cls_logits.bias[2] = -20
        frame = drawn((96, 96))[0].permute(1, 2, 0)[None]
        boxes, labels, scores = GhostDetDetector(model, (96, 96)).eval()(frame, torch.tensor([[96, 96]]))
    found = [boxes[0][(labels[0] == label) & (scores[0] > 0)] for label in (1, 2, 3)]
    assert len(found[0]) > 5 and not len(found[2])
    torch.testing.assert_close(found[0], found[1])


def test_graph_has_one_nms_and_no_sigmoid_over_all_points(checkpoint, tmp_path):
    """The reasons for its speed: one NMS call with one group, no sigmoid and no softmax over all points."""
    path = tmp_path / "file.onnx"
    export_checkpoint(checkpoint, "onnx", batch=1, size=(160, 192), out=path)
    model = onnx.shape_inference.infer_shapes(onnx.load(path), data_prop=True)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.value_info}
    nodes = {kind: [n for n in model.graph.node if n.op_type == kind] for kind in ("NonMaxSuppression", "Softmax")}
    (suppression,) = nodes["NonMaxSuppression"]
    assert shapes[suppression.input[1]][1] == 1
    points = 20 * 24 + 10 * 12 + 5 * 6
    candidates = min(1000, 3 * points)
    assert all(np.prod(shapes[n.input[0]]) <= candidates * 4 * 8 for n in nodes["Softmax"])
