"""Exported files whose metadata are wrong or contradict the graph, damaged ones, and zip bombs."""

import json
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from run_tool import run

from detection import Predictor, UserError
from detection.runtime.exported import load_exported
from detection.runtime.metadata import METADATA_KEY
from detection.runtime.torch_archives import archived_metadata

MiB = 1 << 20


def put(**values):
    return lambda content: content.update(values)


def anchors(**values):
    return lambda content: content["anchors"].update(values)


METADATA = {
    "stride 0": (put(stride=0), "stride: Input should be greater"),
    "stride of text": (put(stride="32"), "stride: Input should be a valid integer"),
    "another stride": (put(size=[96, 100]), "size (96, 100) is not of multiples of stride 32"),
    "too few names": (put(names=["square"]), "1 different names, 2 ids"),
    "too few names and ids": (put(names=["square"], ids=[3]), "names: 1|1 class names|1 classes"),
    "no names": (put(names=[], ids=[]), "names: Tuple should have at least 1 item"),
    "one name twice": (put(names=["disc", "disc"]), "1 different names, 2 ids"),
    "names are a text": (put(names="square"), "names: Input should be a valid array"),
    "ids are floats": (put(ids=[1.5, 2.5]), "ids.0: Input should be a valid integer"),
    "the other form": (put(form="raw"), "does not have the form raw of its metadata: its inputs are images, sizes"),
    "no form": (put(form="both"), "form: String should match"),
    "another detector": (put(detector="yolo"), "detector: String should match"),
    "a fixed batch": (put(batch=0), "batch: Input should be greater"),
    "a batch of millions": (put(batch=10**9), "batch: Input should be less"),
    "a canvas of terabytes": (put(size=[2**20, 2**20]), "size.0: Input should be less"),
    "a negative canvas": (put(size=[-32, 32]), "size.0: Input should be greater"),
    "sides": (put(short_side=200, long_side=100), "long_side 100 is below short_side 200"),
    "no side": (put(short_side=0), "short_side: Input should be greater"),
    "a threshold of 2": (put(score_threshold=2), "score_threshold: Input should be less"),
    "a threshold of NaN": (put(score_threshold=float("nan")), "score_threshold: Input should be a finite"),
    "no detections": (put(max_detections=0), "max_detections: Input should be greater"),
    "two colours": (put(mean=[0.5, 0.5]), "mean: Tuple should have at least 3"),
    "std of 0": (put(std=[0, 0, 0]), "std is not positive"),
    "anchors of text": (anchors(strides="8"), "strides|anchors"),
    "strides of 0": (anchors(strides=[0]), "strides.0: Input should be greater"),
    "levels": (anchors(strides=[8]), "not as many as the strides"),
    "config is a list": (put(config=[1]), "config: Input should be an object"),
    "a strange key": (put(more=1), "more: "),
    "a missing key": (lambda content: content.pop("stride"), "stride: Field required"),
    "another version": (put(version=2), "metadata of version 2"),
    "config of another kind": (put(config={"a": 1}), "config in "),
}


@pytest.fixture()
def changed(exported, tmp_path):
    """best.onnx with other metadata, or another graph."""

    def make(change=None, graph=None, text=None) -> Path:
        model = onnx.load(exported / "best.onnx")
        (note,) = [prop for prop in model.metadata_props if prop.key == METADATA_KEY]
        content = json.loads(note.value)
        if change is not None:
            change(content)
        note.value = json.dumps(content) if text is None else text
        if graph is not None:
            graph(model.graph)
        path = tmp_path / "best.onnx"
        path.write_bytes(model.SerializeToString())
        return path

    return make


@pytest.mark.parametrize("name", METADATA)
def test_wrong_metadata(name, changed):
    change, words = METADATA[name]
    path = changed(change)
    image = np.full((96, 96, 3), 250, np.uint8)
    with pytest.raises(UserError, match="best") as error:
        Predictor(path, "cpu", score_threshold=0.001).predict(image)
    assert any(word in str(error.value) for word in words.split("|"))
    assert "\n" not in str(error.value) or "config in" in words


@pytest.mark.parametrize("text", ["", "null", "[]", "{", "{}", '"text"', "[" * 100_000, '{"version": 1}'])
def test_metadata_that_are_no_metadata(text, changed):
    with pytest.raises(UserError, match=r"(?s)metadata 'ghostnet_detection' of .* are damaged"):
        Predictor(changed(text=text), "cpu")


def test_a_tool_says_it_in_one_line(changed, tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"")
    path = changed(put(stride=0))
    run("detect", path, tmp_path / "x.jpg", "--out", tmp_path / "out").assert_error("stride: Input should be greater")
    run("evaluate", path).assert_error("stride: Input should be greater")
    assert not (tmp_path / "out").exists()


def nan_weight(graph):
    tensor = next(t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) == 4)
    numbers = np.frombuffer(tensor.raw_data, np.float32).copy()
    numbers[3] = np.nan
    tensor.raw_data = numbers.tobytes()


def renamed_output(graph):
    graph.output[0].name = "nothing"


def test_weights_that_are_nan(changed):
    with pytest.raises(UserError, match=r"best\.onnx cannot be used: its tensor \S+ has numbers that are not finite"):
        Predictor(changed(graph=nan_weight), "cpu")


def test_a_graph_that_does_not_run_is_told_with_its_file(exported):
    detector = load_exported(exported / "best.onnx", torch.device("cpu"))[0]
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)

    def fails(images, sizes):
        raise ValueError("some\nlines")

    detector.run = fails
    with pytest.raises(UserError, match=r"best\.onnx does not run on 1 images of 64x64 pixels: ValueError: some$"):
        detector([image])


@pytest.mark.parametrize("content", [b"", b"root:x:0:0\n" * 50, b"\x08\x07", b"\x3a\xff\xff\xff\xff\x0f", bytes(1000)])
@pytest.mark.parametrize("name", ["x.onnx", "x.torchscript", "x.pt2", "x.xml"])
def test_what_is_no_such_file(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "x.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"(?s)x\.\w+ (and its \.bin are|is) no") as error:
        Predictor(tmp_path / name, "cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".torchscript", ".pt2"])
def test_zip_bombs(suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(f"x/extra/{METADATA_KEY}", "{}")
        file.writestr("x/code/bomb.py", bytes(100 * MiB))
    assert path.stat().st_size < MiB
    with pytest.raises(UserError, match="in it is compressed and expands to 104,857,600 bytes; that is too much"):
        archived_metadata(path, "TorchScript")


def test_frames_and_batches_that_no_memory_holds(exported, tmp_path):
    for size in ("100000", "32x100000", "9" * 5000, "²", "-32", "0x32", "32x32x32", ""):
        done = run("export", exported / "best.pt", "--format", "onnx", f"--size={size}", "--out", tmp_path / "x.onnx")
        done.assert_error("--size")
    for batch in ("99999999999", "0", "²", "many"):
        done = run("export", exported / "best.pt", "--format", "onnx", f"--batch={batch}", "--out", tmp_path / "x.onnx")
        done.assert_error("--batch")
    assert not list(tmp_path.iterdir())
