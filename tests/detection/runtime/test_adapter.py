"""ONNX files of other projects: adapters, what they say of files that do not fit, and the boxes of each layout."""

import json
import re

import numpy as np
import onnx
import pytest
import torch
from cell_detector import NAMES, adapter_text, draw_cells, found_cells, write_detector
from conftest import ROOT
from run_tool import run

from detection import Predictor, UserError
from detection.config_check import valid_keys
from detection.data.image_io import read_image
from detection.runtime.adapted import InputResize, load_adapted, normalize
from detection.runtime.adapter import Adapter, InputConfig, find_adapter, read_adapter, shipped_adapters
from detection.runtime.coco_classes import COCO_CLASSES
from detection.runtime.pytorch import load_detector

CPU = torch.device("cpu")
CELLS = {(0, 0): ("red square", 1.0), (3, 2): ("green square", 0.8), (1, 1): ("blue square", 0.4)}
LAYOUTS = ("yolox", "yolov5", "yolov8", "fastestdet", "boxes")


def adapter_file(folder, text: str, name: str = "mine.yaml"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_gives_the_drawn_boxes(layout, tmp_path):
    adapter = adapter_file(tmp_path, adapter_text(layout))
    model = write_detector(tmp_path / "m.onnx", layout, any_batch=layout == "yolov8")
    image = draw_cells(tmp_path / "a.png", CELLS)
    # Also in a batch of images of two shapes.
    other = draw_cells(tmp_path / "b.png", {(0, 3): ("blue square", 0.6)}, size=(192, 256))
    found = Predictor(model, "cpu", score_threshold=0.1, adapter=adapter).predict_batch([image, other, image])
    assert [found_cells(one) for one in found] == [CELLS, {(0, 3): ("blue square", 0.6)}, CELLS]
    assert found[0]["names"] == list(NAMES), "by descending score"


@pytest.mark.parametrize(
    ("fit", "size", "network", "step"),
    [
        ("pad_around", (256, 128), (128, 128), (64, 64)),  # 32 rows of padding above and below
        ("pad_around", (128, 256), (128, 128), (64, 64)),
        ("pad_right_bottom", (256, 128), (128, 128), (64, 64)),
        ("pad_right_bottom", (128, 256), (64, 128), (128, 128)),
        ("stretch", (256, 128), (128, 128), (64, 32)),
        ("stretch", (128, 128), (64, 128), (32, 64)),
    ],
)
def test_images_are_fitted_to_the_input(fit, size, network, step, tmp_path):
    adapter = adapter_file(tmp_path, adapter_text("yolov8", fit=fit))
    model = write_detector(tmp_path / "m.onnx", size=network)
    cells = {(0, 0): ("red square", 1.0), (0, 1): ("green square", 0.8)}
    image = draw_cells(tmp_path / "a.png", cells, size, step)
    found = Predictor(model, "cpu", score_threshold=0.3, adapter=adapter).predict(image)
    assert found_cells(found, step) == cells


def test_sides_are_rounded_as_by_the_projects():
    """Of 100x75 pixels for an input of 50x50, YOLOX takes 37 rows, YOLOv5 38."""
    image = np.zeros((75, 100, 3), np.uint8)
    shapes = {
        fit: InputResize((50, 50), InputConfig(fit=fit))(image).shape for fit in ("pad_right_bottom", "pad_around")
    }
    assert shapes == {"pad_right_bottom": (37, 50, 3), "pad_around": (38, 50, 3)}


def test_values_of_the_input():
    image = np.array([[[[0, 51, 255]]]], np.uint8)  # one pixel
    plain = normalize(image, InputConfig(range=255), np.float32)
    assert plain.dtype == np.float32 and plain[0, :, 0, 0].tolist() == [0, 51, 255]
    bgr = InputConfig(color="bgr", range=1, mean=[0.5, 0.2, 0.0], std=[0.5, 0.1, 2.0])
    assert np.allclose(normalize(image, bgr, np.float32)[0, :, 0, 0], [1, 0, 0], atol=1e-6)
    last = normalize(image, InputConfig(layout="nhwc"), np.float16)
    assert last.dtype == np.float16 and np.allclose(last[0, 0, 0], [0, 0.2, 1], atol=1e-3)
    assert normalize(image, InputConfig(), np.uint8)[0, :, 0, 0].tolist() == [0, 51, 255], "uint8 stays as it is"


def test_the_colors_of_a_bgr_network(tmp_path):
    """The network sees the channels the other way around: what is red in the image is in its last channel."""
    model = write_detector(tmp_path / "m.onnx", scale=255)
    adapter = adapter_file(tmp_path, adapter_text("yolov8", color="bgr", range="255"))
    image = draw_cells(tmp_path / "a.png", {(0, 0): ("red square", 1.0)})
    found = Predictor(model, "cpu", adapter=adapter).predict(image)
    assert found_cells(found) == {(0, 0): ("blue square", 1.0)}


def test_thresholds_of_the_adapter_and_of_the_command_line(tmp_path):
    text = adapter_text("yolov8").replace("score_threshold: 0.05", "score_threshold: 0.5")
    adapter, model = adapter_file(tmp_path, text), write_detector(tmp_path / "m.onnx")
    image = torch.from_numpy(read_image(draw_cells(tmp_path / "a.png", CELLS))[::2, ::2].transpose(2, 0, 1).copy())

    def count(**options) -> int:
        return len(load_detector(model, CPU, adapter=adapter, **options)[0]([image])[0]["scores"])

    assert count() == 2 and count(score_threshold=0.3) == 3
    assert count(overrides=["eval.score_threshold=0.9"]) == 1
    assert count(overrides=["eval.score_threshold=0.1", "eval.pre_nms_top_k=2"]) == 2
    for override in ("data.short_side=64", "model.head_depth=2"):
        with pytest.raises(UserError, match=f"{override.split('=')[0].split('.')[0]}.* cannot be changed"):
            load_detector(model, CPU, adapter=adapter, overrides=[override])


def test_shipped_adapters():
    assert shipped_adapters() == ["fastestdet", "yolov5", "yolov8", "yolox"]
    for name in shipped_adapters():
        adapter = read_adapter(name)
        assert adapter.output.layout == name
        assert adapter.class_list.names[0] == "person" and adapter.class_list.ids[-1] == 90
    assert len(COCO_CLASSES) == 80 and list(COCO_CLASSES) == sorted(COCO_CLASSES)
    with pytest.raises(UserError, match=r"adapter yolo8 does not exist \(did you mean 'yolov8'\?\); expected: a YAML"):
        read_adapter("yolo8")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("pad_value", "pad_valeu", "line 2: unknown key 'input.pad_valeu' (did you mean 'input.pad_value'?)"),
        ("layout: yolov8", "layout: yolo9", "output.layout: input should be"),
        ("layout: yolov8", "layout: yolov8, strides: [8]", "output.strides is not for output.layout yolov8"),
        ("layout: yolov8", "layout: boxes, name: x", "output.name is not for output.layout boxes"),
        ("range: 1", "range: 2", "input.range"),
        ("range: 1", "std: [1, 0, 1]", "input.std.1: input should be greater than 0"),
        ("green square", "red square", "classes: red square: there more than once"),
        ("[red square, green square, blue square]", "[1, 2]", "names that look like numbers need quotes"),
        ("classes", "names", "unknown key 'names'"),
    ],
)
def test_a_mistake_in_an_adapter_names_the_key(old, new, words, tmp_path):
    path = adapter_file(tmp_path, adapter_text("yolov8").replace(old, new))
    with pytest.raises(UserError, match=re.escape(words)) as error:
        read_adapter(path)
    assert str(path) in str(error.value)


def test_an_adapter_that_is_no_mapping(tmp_path):
    with pytest.raises(UserError, match="must hold keys and values"):
        read_adapter(adapter_file(tmp_path, "yolox"))


@pytest.mark.parametrize(
    ("written", "adapted", "words"),
    [
        (
            "yolov8",
            ("[red square, green square, blue square]", "coco"),
            "[N, 84, candidates] (layout yolov8, 80 classes)",
        ),
        (
            "yolov8",
            ("layout: yolov8", "layout: yolov5"),
            "[N, candidates, 8] (layout yolov5, 3 classes), got: [1, 7, 16]",
        ),
        ("yolox", ("strides: [32]", "strides: [16, 32]"), "[N, 80, 8] (layout yolox, 3 classes and strides [16, 32])"),
        (
            "yolov8",
            ("layout: yolov8", "layout: fastestdet"),
            "[N, 8, rows, columns] (layout fastestdet, 3 classes), got",
        ),
        ("yolox", ("range: 1", "range: 1, size: [64, 128]"), "one input [N, 3, 64, 128]"),
        ("yolox", ("range: 1", "range: 1, layout: nhwc"), "one input [N, height, width, 3]"),
        (
            "boxes",
            ("layout: boxes", "layout: yolov5"),
            "one output, or output.name: NAME in the adapter, got: boxes [1",
        ),
        ("boxes", ("layout: boxes", "layout: yolov5, name: scores"), "got: [1, 16]"),
        ("yolov5", ("layout: yolov5", "layout: yolov5, name: predictions"), "an output predictions, got: output [1"),
        ("boxes", ("layout: boxes", "layout: boxes, labels: classes"), "it has no classes"),
        ("boxes", ("layout: boxes", "layout: boxes, boxes: scores"), "output scores [N, n, 4] or [n, 4], got: [1, 16]"),
    ],
)
def test_a_file_that_does_not_fit_its_adapter(written, adapted, words, tmp_path):
    text = adapter_text(written)
    assert adapted[0] in text
    adapter = adapter_file(tmp_path, text.replace(*adapted))
    model = write_detector(tmp_path / "m.onnx", written)
    with pytest.raises(UserError, match=re.escape(words)) as error:
        load_detector(model, CPU, adapter=adapter)
    assert str(error.value).startswith(f"{model} does not fit its adapter: expected: ")


def test_labels_beyond_the_classes(tmp_path):
    adapter = adapter_file(tmp_path, adapter_text("boxes").replace(", blue square]", "]"))
    predictor = Predictor(write_detector(tmp_path / "m.onnx", "boxes"), "cpu", adapter=adapter)
    with pytest.raises(UserError, match=r"returns labels 0 to 2; expected by its adapter \(2 classes.*\): 0 to 1"):
        predictor.predict(draw_cells(tmp_path / "a.png", CELLS))


def test_labels_from_one_and_boxes_as_fractions(tmp_path):
    """As files with other conventions give them; the network itself is the same."""
    model = write_detector(tmp_path / "m.onnx", "boxes")
    graph = onnx.load(model)
    for output, value, kind in (("boxes", 1 / 128, "Mul"), ("labels", 1, "Add")):
        node = next(node for node in graph.graph.node if output in node.output)
        node.output[list(node.output).index(output)] = f"{output}_before"
        dtype = np.float32 if kind == "Mul" else np.int64
        graph.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value, dtype), f"{output}_value"))
        graph.graph.node.append(onnx.helper.make_node(kind, [f"{output}_before", f"{output}_value"], [output]))
    onnx.save(graph, model)
    text = adapter_text("boxes").replace("layout: boxes", "layout: boxes, units: fractions, first_label: 1")
    found = Predictor(model, "cpu", adapter=adapter_file(tmp_path, text)).predict(draw_cells(tmp_path / "a.png", CELLS))
    assert found_cells(found) == CELLS


def test_a_file_of_any_size_needs_the_size(tmp_path):
    model = write_detector(tmp_path / "m.onnx")
    graph = onnx.load(model)
    for dimension in graph.graph.input[0].type.tensor_type.shape.dim[2:]:
        dimension.dim_param = "side"
    onnx.save(graph, model)
    adapter = read_adapter(adapter_file(tmp_path, adapter_text("yolov8")))
    with pytest.raises(UserError, match=r"images of any size .* set input.size"):
        load_adapted(model, adapter, CPU)
    with_size = adapter.model_copy(update={"input": InputConfig(size=[128, 128])})
    assert load_adapted(model, with_size, CPU)[0].input.size == (128, 128)


def test_the_adapter_beside_a_file_opens_it(tmp_path):
    model = write_detector(tmp_path / "m.onnx")
    with pytest.raises(UserError, match="no metadata"):
        load_detector(model, CPU)
    adapter_file(tmp_path, adapter_text("yolov8"), "m.yaml")
    image = draw_cells(tmp_path / "a.png", CELLS)
    assert found_cells(Predictor(model, "cpu").predict(image)) == CELLS


def test_a_file_of_this_toolkit_needs_no_adapter(exported, tmp_path):
    (tmp_path / "best.onnx").write_bytes((exported / "best.onnx").read_bytes())
    adapter_file(tmp_path, adapter_text("yolov8"), "best.yaml")
    assert find_adapter(tmp_path / "best.onnx") is None
    with pytest.raises(UserError, match=r"best.pt cannot be opened with an adapter, which is for ONNX files"):
        find_adapter(tmp_path / "best.pt", "yolox")


def write_set(folder, names=("green square", "red square")):
    """Three images whose objects the detector finds, annotated with some classes only, and with other ids."""
    ids = {name: 4 - i for i, name in enumerate(names)}
    content = {"images": [], "annotations": [], "categories": [{"id": i, "name": name} for name, i in ids.items()]}
    for i in range(3):
        draw_cells(folder / "images" / f"{i}.png", CELLS)
        content["images"].append({"id": i, "file_name": f"{i}.png", "width": 256, "height": 192})
        for (column, row), (name, _) in CELLS.items():
            if name in ids:
                box = [64 * column, 64 * row, 64, 64]
                entry = {"id": len(content["annotations"]) + 1, "image_id": i, "category_id": ids[name], "bbox": box}
                content["annotations"].append({**entry, "area": 64 * 64, "iscrowd": 0})
    (folder / "set.json").write_text(json.dumps(content))
    return folder / "set.json"


def test_evaluate_matches_classes_by_name(tmp_path):
    """The set lacks a class of the detector, which does not count, and has its own ids."""
    adapter, model = adapter_file(tmp_path, adapter_text("yolov8")), write_detector(tmp_path / "m.onnx")
    data = write_set(tmp_path / "set")
    done = run("evaluate", model, "--adapter", adapter, "--data", data, "--json", tmp_path / "n.json", "data.workers=0")
    assert done.code == 0, done
    numbers = json.loads((tmp_path / "n.json").read_text())
    assert numbers["AP"] == 1 and set(numbers["per_class"]) == {"red square", "green square"}
    detections = json.loads((tmp_path / "predictions_set.json").read_text())
    assert {one["category_id"] for one in detections} == {3, 4}
    other = write_set(tmp_path / "other", ("red square", "circle"))
    done = run("evaluate", model, "--adapter", adapter, "--data", other, "data.workers=0")
    done.assert_error("has classes that the model does not know: circle")


def test_evaluate_needs_data(tmp_path):
    adapter, model = adapter_file(tmp_path, adapter_text("yolov8")), write_detector(tmp_path / "m.onnx")
    run("evaluate", model, "--adapter", adapter).assert_error("without a val set: name the data with --data")
    run("evaluate", model, "--adapter", "yolo").assert_error("adapter yolo does not exist")


def test_detect_with_an_adapter(tmp_path):
    adapter, model = adapter_file(tmp_path, adapter_text("yolov5")), write_detector(tmp_path / "m.onnx", "yolov5")
    image = draw_cells(tmp_path / "a.png", CELLS)
    done = run("detect", model, image, "--adapter", adapter, "--out", tmp_path / "found")
    assert done.code == 0, done
    found = json.loads((tmp_path / "found" / "a.json").read_text())["detections"]
    assert [one["name"] for one in found] == list(NAMES)


def test_the_adapters_of_the_documentation(tmp_path):
    """Each is read, and its table has every key."""
    text = (ROOT / "docs" / "labelling.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```yaml\n(.*?)^```", text, re.M | re.S)
    assert [read_adapter(adapter_file(tmp_path, block)).output.layout for block in blocks] == [
        "yolox",
        "yolov8",
        "boxes",
    ]
    for key in valid_keys(Adapter):
        short = key.rpartition(".")[2]
        assert key in ("input", "output") or f"`{key}`" in text or f"`.{short}`" in text, key
