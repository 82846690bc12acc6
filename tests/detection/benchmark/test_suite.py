"""Candidates of a benchmark: random weights, files of other programs, mistakes; and tools/benchmark.py."""

import csv
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
import yaml
from conftest import ROOT, assert_clear_error, tiny_raw
from onnx import TensorProto, helper

from detection import UserError, build_model
from detection.benchmark import peers
from detection.benchmark import suite as field
from detection.benchmark.detector_cost import detector_total, network_costs
from detection.benchmark.latency import measure_latency
from detection.benchmark.latency_report import parse_aps
from detection.benchmark.onnx_models import OnnxModel
from detection.benchmark.settings import PEERS, Settings
from detection.benchmark.suite import make_batch, make_images
from detection.benchmark.untrained import build_untrained, nms_candidate_scores, score_threshold_for
from detection.checkpoint import read_checkpoint

SMALL = str(ROOT / "configs/retina_ghost_320.yaml")


# ---- networks with random weights


@pytest.mark.numeric
@pytest.mark.parametrize("detector", ["retinanet", "faster_rcnn", "ghostdet"])
def test_untrained_network_has_as_many_candidates_as_a_trained_one(tiny_config, detector):
    config = tiny_config.with_overrides([f"model.detector={detector}"])
    images = make_batch(make_images(Settings()), (64, 96), 1)
    model, threshold = build_untrained(lambda: build_model(config, 2), images, 50, seed=1)
    scores = nms_candidate_scores(model, images[0].float() / 255)
    assert int((scores > threshold).sum()) == 50
    again, same = build_untrained(lambda: build_model(config, 2), images, 50, seed=1)
    assert same == threshold
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    # The norms have seen the image, and will not be changed by the next one.
    norm = model.backbone.body.bn1
    assert norm.running_var.std() > 0 and not norm.training and norm.momentum == 0.1


def test_score_threshold_for():
    scores = torch.tensor([0.9, 0.5, 0.4, 0.1])
    assert score_threshold_for(scores, 2) == pytest.approx(0.4) and score_threshold_for(scores, 9) == 0.0


@pytest.mark.numeric
@pytest.mark.parametrize("name", PEERS[:2])
def test_peers_have_as_many_candidates_as_a_trained_network(tmp_path, name):
    size = peers.peer_size(name, (64, 96))
    assert size == ((320, 320) if name.startswith("ssdlite") else (64, 96))
    inputs = make_batch(make_images(Settings()), size, 1)
    model = peers.save_peer(name, tmp_path / "peer.pth", 3, size, inputs, 40, seed=0)
    opened = peers.open_peer(name, tmp_path / "peer.pth", 3, size)
    unit = inputs[0].float() / 255
    scores = nms_candidate_scores(opened, unit)
    assert torch.equal(scores, nms_candidate_scores(model, unit))
    for each in (model, opened):
        assert int((scores > getattr(each, "roi_heads", each).score_thresh).sum()) == 40
    # Three classes and the background.
    classes = opened.roi_heads.box_predictor.cls_score.out_features if hasattr(opened, "roi_heads") else None
    assert classes in (None, 4)
    images, _ = opened.transform([unit])
    assert tuple(images.tensors.shape[2:]) == size


def test_costs_of_peers_match_torchvision():
    """At their own sizes and 90 classes, as torchvision's weights have them (it counts ssdlite's in GMAC as well)."""
    from torchvision.models import detection as tv

    published = {
        "ssdlite320_mobilenet_v3_large": tv.SSDLite320_MobileNet_V3_Large_Weights.COCO_V1.meta,
        "retinanet_resnet50_fpn_v2": tv.RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1.meta,
    }
    for name, meta in published.items():
        size = (320, 320) if name.startswith("ssd") else (800, 800)
        cost = detector_total(peers.build_peer(name, 90, size).eval(), size)
        assert cost.parameters == meta["num_params"]
        assert cost.macs / 1e9 == pytest.approx(meta["_ops"], rel=0.02)


# ---- foreign ONNX files


def write_onnx(path, inputs: dict[str, tuple[int, list]]) -> str:
    """A model that sums each input; name -> (type, shape)."""
    nodes, outputs = [], []
    for name in inputs:
        nodes.append(helper.make_node("Cast", [name], [f"{name}_float"], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("ReduceSum", [f"{name}_float"], [f"{name}_sum"], keepdims=0))
        outputs.append(helper.make_tensor_value_info(f"{name}_sum", TensorProto.FLOAT, []))
    declared = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
    graph = helper.make_graph(nodes, "raw_onnx", declared, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return str(path)


@pytest.mark.parametrize(
    ("shape", "batch", "full", "size", "fixed"),
    [
        (["n", 3, "h", "w"], 2, (2, 3, 64, 96), (64, 96), None),
        ([1, 3, 48, 40], 1, (1, 3, 48, 40), (48, 40), 1),
        (["n", "h", "w", 3], 4, (4, 64, 96, 3), (64, 96), None),
        ([2, "c", "h", 32], 2, (2, 3, 64, 32), (64, 32), 2),
    ],
)
def test_raw_onnx_inputs_have_the_declared_shape(tmp_path, shape, batch, full, size, fixed):
    model = OnnxModel(write_onnx(tmp_path / "x.onnx", {"x": (TensorProto.FLOAT, shape)}), (64, 96), 1)
    assert (model.size, model.fixed_batch) == (size, fixed)
    assert model([None] * batch) is None
    assert model._feeds[batch]["x"].shape == full and 0 <= model._feeds[batch]["x"].min() < 0.1
    assert model.session.get_session_options().intra_op_num_threads == 1


def test_raw_onnx_with_sizes_and_uint8(tmp_path):
    """Like RT-DETR's exports: images, and the sizes of the originals."""
    inputs = {"images": (TensorProto.UINT8, ["n", 3, 32, 32]), "sizes": (TensorProto.INT64, ["n", 2])}
    model = OnnxModel(write_onnx(tmp_path / "x.onnx", inputs), (64, 96), 1)
    model([None, None])
    feeds = model._feeds[2]
    assert feeds["images"].dtype == np.uint8 and feeds["images"].max() > 200
    assert feeds["sizes"].tolist() == [[64, 64], [64, 64]]


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [
        (TensorProto.STRING, ["n"], "input 'x' is tensor\\(string\\)"),
        (TensorProto.FLOAT, ["n", "words"], "only images \\(four dimensions\\) may have dynamic dimensions"),
    ],
)
def test_raw_onnx_without_images(tmp_path, kind, shape, message):
    path = tmp_path / "x.onnx"
    inputs = [helper.make_tensor_value_info("x", kind, shape)]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])], "x", inputs, [helper.make_tensor_value_info("y", kind, shape)]
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    with pytest.raises(UserError, match=message):
        OnnxModel(path, (64, 96), 1)([None])


def test_a_file_that_is_not_onnx(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"no")
    with pytest.raises(UserError, match=r"x\.onnx is not an ONNX file that ONNX Runtime can run"):
        OnnxModel(tmp_path / "x.onnx", (64, 96), 1)


def test_unsupported_batch_gets_a_row_with_the_reason(tmp_path):
    path = write_onnx(tmp_path / "x.onnx", {"x": (TensorProto.FLOAT, [1, 3, 32, 32])})
    report = measure_latency(Settings((path,), batches=(1, 2), runs=2, threads=1, memory=False))
    one, two = report.rows
    assert len(one.seconds) == 2 and one.size == (32, 32) and one.boxes is None and one.macs is None
    assert two.seconds == () and two.reason == "the file takes 1 image a call, not 2"


# ---- from names to rows


@pytest.fixture(scope="module")
def tiny_yaml(tmp_path_factory, trained):
    """The config of `trained`, whose weights are elsewhere."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    raw = tiny_raw(trained.parent / "data", trained)
    raw["model"]["backbone"]["weights"] = "elsewhere.pth"
    path.write_text(yaml.safe_dump(raw))
    return str(path)


@pytest.mark.slow
def test_a_checkpoint_and_a_config_in_pytorch(trained, tiny_yaml):
    best = str(trained / "best.pt")
    settings = Settings(
        (best, tiny_yaml), backends=("channels_last", "eager"), batches=(1, 3), threads=1, runs=3, memory=False
    )
    report = measure_latency(settings)
    names = [(r.network, r.backend, r.batch) for r in report.rows]
    assert names == [(n, b, k) for n in (best, tiny_yaml) for b in ("channels_last", "eager") for k in (1, 3)]
    for found in report.rows:
        assert len(found.seconds) == 3 and found.size == (96, 96) and found.boxes > 0
        assert found.median <= found.p95 and found.throughput == found.batch / found.median
        assert found.file_bytes > 1e6 and found.memory is None
    total = network_costs(tiny_yaml, num_classes=2)[-1]
    assert {(r.parameters, r.macs) for r in report.rows} == {(total.parameters, total.macs)}
    assert [r.ap for r in report.rows] == [read_checkpoint(best)["numbers"]["AP"]] * 4 + [None] * 4
    (remark,) = report.remarks
    assert remark.startswith(f"Random weights, 2 classes: {tiny_yaml}.") and f", as in {best}." in remark
    assert report.environment["threads"] == "1" and "% of the CPU" in report.environment["disturbance"]
    assert report.environment["seed"] == "0"
    assert f"torch {torch.__version__.split('+')[0]}" in report.environment["versions"]


@pytest.mark.numeric
@pytest.mark.parametrize("backend", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)])
def test_every_backend_finds_the_same_boxes(trained, backend):
    best = str(trained / "best.pt")
    eager, exported = measure_latency(Settings((best,), backends=("eager", backend), threads=1, runs=1)).rows
    assert eager.boxes == exported.boxes > 0
    assert eager.memory > 1e6 and exported.memory > 1e6
    assert exported.file_bytes > 1e6 and exported.file_bytes != eager.file_bytes


@pytest.mark.numeric
def test_score_threshold_and_ap_of_the_settings(trained):
    best = str(trained / "best.pt")
    settings = Settings((best,), backends=("eager",), threads=1, runs=1, memory=False, aps={best: 0.75})
    (low,), (high,) = (measure_latency(replace(settings, score_threshold=value)).rows for value in (0.001, 0.3))
    assert high.boxes < low.boxes
    assert high.ap == 0.75


def test_a_missing_extra_is_a_row_or_an_error(trained, tmp_path, monkeypatch):
    """A row with the reason if all backends are measured, an error if the backend was requested."""

    def missing(*args, **options):
        raise UserError("OpenVINO is not installed: pip install -e '.[openvino]'")

    monkeypatch.setattr(field, "export_openvino", missing)
    monkeypatch.setattr(field, "BACKENDS", ("eager", "openvino"))
    best = str(trained / "best.pt")
    eager, openvino = measure_latency(Settings((best,), runs=1, memory=False)).rows
    assert eager.reason == "" and len(eager.seconds) == 1
    assert "pip install -e '.[openvino]'" in openvino.reason and openvino.seconds == ()
    with pytest.raises(UserError, match="OpenVINO is not installed"):
        measure_latency(Settings((best,), backends=("openvino",), runs=1, memory=False))


def test_missing_compiler(trained, monkeypatch):
    def broken(self, dynamic):
        raise RuntimeError("No working C++ compiler found\nand more")

    monkeypatch.setattr(torch.nn.Module, "compile", broken)
    best = str(trained / "best.pt")
    with pytest.raises(UserError, match=r"torch.compile does not work here .*: No working C\+\+ compiler found$"):
        measure_latency(Settings((best,), backends=("compile",), runs=1, memory=False))


@pytest.mark.numeric
@pytest.mark.slow
def test_compiled_parts_give_the_same_boxes(trained):
    best = str(trained / "best.pt")
    settings = Settings((best,), backends=("eager", "compile"), threads=1, runs=1, memory=False)
    eager, compiled = measure_latency(settings).rows
    assert eager.boxes == compiled.boxes > 0


@pytest.mark.numeric
@pytest.mark.slow
def test_peers_in_one_table():
    settings = Settings(peers=True, size=(64, 64), threads=1, runs=1, num_classes=3)
    report = measure_latency(settings)
    assert [(r.network, r.backend) for r in report.rows] == [(n, b) for n in PEERS for b in ("eager", "onnxruntime")]
    for eager, exported in zip(report.rows[::2], report.rows[1::2], strict=True):
        assert eager.reason == exported.reason == ""
        assert eager.boxes == pytest.approx(exported.boxes, abs=2) and eager.boxes > 0
        assert eager.memory > 1e6 and exported.memory > 1e6
    assert [r.size for r in report.rows[::2]] == [(320, 320), (64, 64), (64, 64)]


def test_graphs_need_a_gpu(trained):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UserError, match="cuda_graph needs a GPU"):
        measure_latency(Settings((str(trained / "best.pt"),), backends=("cuda_graph",)))


# ---- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ("absent.pt",)}, "checkpoint absent.pt does not exist"),
        ({"targets": ("absent.onnx",)}, "file absent.onnx does not exist"),
        ({"targets": (SMALL.replace("ghost", "gost"),)}, "did you mean"),
        ({"targets": ("model.tflite",)}, r"neither a config \(.yaml\) nor a checkpoint"),
        ({"targets": ("ghostnet",)}, "for the cost of a backbone use --cost"),
        ({"backends": ("eagre",)}, "unknown backend 'eagre' .did you mean 'eager'"),
        ({"size": (300, 320)}, "size 300x320: .* multiples of 32; the nearest is 288x320"),
        ({"images": ("absent.jpg",)}, "image absent.jpg does not exist"),
        ({"targets": (SMALL,), "aps": {"other": 0.5}}, "--ap: network 'other'"),
    ],
)
def test_settings_are_checked_first(options, message):
    with pytest.raises(UserError, match=message):
        Settings(**options)


def test_checkpoints_of_other_programs(tmp_path):
    torch.save({"weights": 1}, tmp_path / "foreign.pt")
    with pytest.raises(UserError, match="is not a checkpoint of this toolkit"):
        measure_latency(Settings((str(tmp_path / "foreign.pt"),)))


@pytest.mark.parametrize("text", ["0.5", "=0.5", "x=", "x=1.5", "x=nan", "x=-0.1"])
def test_parse_aps_errors(text):
    with pytest.raises(UserError, match="is not of the form NETWORK=AP"):
        parse_aps([text])


def test_parse_aps():
    assert parse_aps(["runs/a=b/best.pt=0.5", "x=0"]) == {"runs/a=b/best.pt": 0.5, "x": 0.0}


# ---- the tool


def test_tool(tool, trained, tmp_path):
    best, out, image = trained / "best.pt", tmp_path / "speed.csv", tmp_path / "speed.png"
    arguments = ["--backends", "eager", "--runs", 2, "--threads", 1, "--no-memory"]
    done = tool("benchmark", best, *arguments, "--batch", 1, 2, "--format", "csv", "--out", out, "--plot", image)
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout and image.read_bytes().startswith(b"\x89PNG")
    lines = list(csv.DictReader(out.read_text().splitlines()))
    assert [(line["backend"], line["batch"]) for line in lines] == [("eager", "1"), ("eager", "2")]
    for line in lines:
        assert 0 < float(line["median_s"]) <= float(line["p95_s"])
    foreign = write_onnx(tmp_path / "theirs.onnx", {"x": (TensorProto.FLOAT, [1, 3, 32, 32])})
    done = tool("benchmark", foreign, "--runs", 2, "--threads", 1, "--no-memory", "--format", "markdown")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("* hardware: ") and f"| {foreign} | onnxruntime | 32x32 | 1 |" in done.stdout


def test_tool_mistakes(tool, trained, tmp_path):
    best = trained / "best.pt"
    assert_clear_error(tool("benchmark", tmp_path / "absent.pt"), "absent.pt does not exist")
    assert_clear_error(tool("benchmark", best, "--size", "100"), "size 100x100", "the nearest is 96x96")
    assert_clear_error(tool("benchmark", best, "--backends", "tensorrt"), "unknown backend 'tensorrt'")
    assert_clear_error(tool("benchmark", best, "--ap", "0.5"), "is not of the form NETWORK=AP")
    assert_clear_error(tool("benchmark", best, "--out", tmp_path / "no" / "x"), "cannot be written")
    done = tool("benchmark", best, "--cost", "ghostnet")
    assert done.returncode == 2 and "not done together with timing" in done.stderr
    done = tool("benchmark", best, "--runs", "0")
    assert done.returncode == 2 and "'0' is not a number of 1 or more" in done.stderr
