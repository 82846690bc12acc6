"""Quantization: fp16 and int8 files, and layers that stay in float32."""

import json
from dataclasses import dataclass
from types import SimpleNamespace

import onnx
import pytest
from conftest import assert_clear_error

from detection import UserError
from detection.data.formats.coco import read_coco
from detection.inference.predictor import Predictor
from detection.quantization.accuracy import evenly_spaced
from detection.quantization.quantizer import match_layers, search_int8
from detection.runtime.metadata import METADATA_KEY


def metadata_of(path):
    return json.loads({p.key: p.value for p in onnx.load(path).metadata_props}[METADATA_KEY])


@pytest.mark.numeric
def test_tool(tool, trained, tmp_path):
    arguments = ["--calibration-images", "6", "--max-loss", "0.1", "--threads", "1", "--keep", "*conv_reduce*"]
    done = tool("quantize", trained / "best.pt", "data.workers=0", "--out", tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    sizes = {name: (tmp_path / f"best.{name}.onnx").stat().st_size for name in ("float32", "fp16", "int8")}
    assert sizes["fp16"] < 0.65 * sizes["float32"] and sizes["int8"] < 0.65 * sizes["float32"]
    table = (tmp_path / "best.quantized.md").read_text()
    assert table.strip() in done.stdout and all(f"best.{name}.onnx" in table for name in sizes)

    assert metadata_of(tmp_path / "best.float32.onnx")["quantized"] is None
    assert metadata_of(tmp_path / "best.fp16.onnx")["quantized"] == {"weights": "float16"}
    quantized = metadata_of(tmp_path / "best.int8.onnx")["quantized"]
    assert quantized["calibration_images"] == 6 and len(quantized["layers"]) > 20
    operators = {node.op_type for node in onnx.load(tmp_path / "best.int8.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators

    # They detect like the checkpoint: each of its sure boxes is found at nearly its place.
    image = trained.parent / "data" / "images" / "image 5.jpg"
    expected = Predictor(trained / "best.pt", "cpu", score_threshold=0.3).predict(image)
    assert len(expected["boxes"])
    for name, pixels in (("float32", 0.05), ("fp16", 0.5), ("int8", 6)):
        found = Predictor(tmp_path / f"best.{name}.onnx", "cpu", score_threshold=0.1).predict(image)
        for box, label in zip(expected["boxes"], expected["labels"], strict=True):
            same = found["boxes"][found["labels"] == label]
            assert len(same) and abs(same - box).max(axis=1).min() < pixels, name


def test_mistakes(tool, trained, tmp_path):
    done = tool("quantize", trained / "best.pt", "--out", tmp_path, "--calibration", tmp_path / "nowhere")
    assert_clear_error(done, "nowhere", "does not exist")
    assert_clear_error(tool("quantize", tmp_path / "no.pt"), "does not exist")
    with pytest.raises(UserError, match=r"--keep '\*head9\*' matches no layer; examples of names: /a, /b"):
        match_layers(["/a", "/b", "/c", "/d"], ["*head9*"])
    assert match_layers(["/a/x", "/b/x", "/c"], ["/a*", "/c"]) == {"/a/x", "/c"}


@dataclass
class Quantizer:
    """Seven layers; three of them cost 0.02 AP each. The errors of these are large, and that of one harmless layer."""

    layers: tuple = ("a", "b", "c", "d", "e", "f", "g")
    asked: int = 0

    def errors(self):
        self.asked += 1
        return {"a": 0.1, "b": 5, "c": 0.1, "d": 4, "e": 6, "f": 3, "g": 0.1}


class QuantizedExporter:
    file_format = "onnx"

    def __init__(self):
        self.quantizer = Quantizer()
        self.made = []

    def write_int8(self, path, float32_layers):
        self.made.append(set(float32_layers))
        path.write_bytes(b"int8")
        return 4


class AccuracyEvaluator:
    """AP falls by 0.02 for each of b, d and f that is quantized."""

    def __init__(self, exporter):
        self.exporter = exporter

    def score(self, path):
        ap = 0.5 - 0.02 * len({"b", "d", "f"} - self.exporter.made[-1])
        return SimpleNamespace(numbers={"AP": ap})


def test_layers_return_to_float32_until_the_loss_is_within_the_limit(tmp_path, capsys):
    exporter = QuantizedExporter()
    row = search_int8(exporter, AccuracyEvaluator(exporter), tmp_path / "x.onnx", 0.5, 0.01)
    # None, the worst one, the worst two, the worst four.
    assert exporter.made == [set(), {"e"}, {"e", "b"}, {"e", "b", "d", "f"}]
    assert row.float32_layers == (4, 7) and row.metrics["AP"] == 0.5 and exporter.quantizer.asked == 1
    assert "0.0600 lost, more than 0.01" in capsys.readouterr().out
    exporter = QuantizedExporter()
    assert search_int8(
        exporter, AccuracyEvaluator(exporter), tmp_path / "x.onnx", 0.5, 0.01, ["[bdf]"]
    ).float32_layers == (
        3,
        7,
    )
    assert exporter.made == [{"b", "d", "f"}] and exporter.quantizer.asked == 0


def test_no_file_remains_if_the_loss_is_too_large(tmp_path):
    exporter = QuantizedExporter()
    with pytest.raises(UserError, match=r"no int8 file of onnx stays within --max-loss 0\.01; use --precision fp16"):
        search_int8(exporter, AccuracyEvaluator(exporter), tmp_path / "x.onnx", 0.9, 0.01)
    assert not list(tmp_path.iterdir())


def test_evenly_spaced_part_of_the_annotations(coco_set):
    index = read_coco(coco_set / "annotations.json")
    chosen = evenly_spaced(len(index), 5)
    assert chosen == [0, 2, 4, 7, 9] and evenly_spaced(3, 5) == [0, 1, 2]
    part = index.part(chosen)
    assert len(part) == 5
    for i, old in enumerate(chosen):
        assert part.image_ids[i] == index.image_ids[old] and part.file_names[i] == index.file_names[old]
        ours, theirs = part.training_boxes(i), index.training_boxes(old)
        assert all((a == b).all() for a, b in zip(ours, theirs, strict=True))
