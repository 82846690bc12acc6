"""Packages that are not installed, and paths that are not there: both are told before any work."""

import json
import subprocess
import sys

import pytest
from processes import ROOT
from run_tool import run

from detection.evaluation import score

# Command, package that is hidden, the extra that brings it. The files are no checkpoints and no images: whoever reads
# them first says something else.
COMMANDS = {
    "export onnx, onnx": (("export", "a.pt", "--format", "onnx"), "onnx", "onnx"),
    "export onnx, onnxslim": (("export", "a.pt", "--format", "onnx"), "onnxslim", "onnx"),
    "export onnx, onnxruntime": (("export", "a.pt", "--format", "onnx"), "onnxruntime", "onnx"),
    "export openvino": (("export", "a.pt", "--format", "openvino"), "openvino", "openvino"),
    "quantize": (("quantize", "a.pt"), "onnxruntime", "onnx"),
    "quantize openvino": (("quantize", "a.pt", "--format", "openvino"), "nncf", "quantize"),
    "quantize both": (
        ("quantize", "a.pt", "--format", "onnx", "openvino", "--precision", "fp16"),
        "openvino",
        "openvino",
    ),
    "detect --track": (("detect", "a.pt", "a.mp4", "--track"), "norfair", "track"),
    "detect with ONNX": (("detect", "a.onnx", "a.jpg"), "onnxruntime", "onnx"),
    "detect with OpenVINO": (("detect", "a.xml", "a.jpg"), "openvino", "openvino"),
    "label with ONNX": (("label", "a.onnx", ".", "--out", "new"), "onnxruntime", "onnx"),
    "evaluate ONNX": (("evaluate", "a.onnx"), "onnxruntime", "onnx"),
    "evaluate OpenVINO": (("evaluate", "a.xml"), "openvino", "openvino"),
    "evaluate --backend": (("evaluate", "a.pt", "--backend", "faster-coco-eval"), "faster_coco_eval", "fast-eval"),
    "score a file": (
        ("evaluate", "--predictions", "a.json", "--data", "a.json", "--backend", "faster-coco-eval"),
        "faster_coco_eval",
        "fast-eval",
    ),
    "report": (("report", "a.onnx"), "onnxruntime", "onnx"),
    "benchmark": (("benchmark", "a.xml"), "openvino", "openvino"),
    "benchmark --backends": (("benchmark", "a.pt", "--backends", "onnxruntime"), "onnxslim", "onnx"),
    "folder_speed": (("dev/folder_speed", "a.pt", ".", "--exported", "a.onnx"), "onnxruntime", "onnx"),
    "evaluation_speed": (("dev/evaluation_speed",), "faster_coco_eval", "fast-eval"),
    "browse": (("browse", "CONFIG", "--checkpoint", "a.onnx"), "onnxruntime", "onnx"),
    "redundancy": (("redundancy", "timm/resnet18", "--images", "a.jpg"), "timm", "timm"),
    "redundancy --weights": (("redundancy", "ghostnet", "--weights", "timm", "--images", "a.jpg"), "timm", "timm"),
    "ghostify": (("ghostify", "timm/resnet18"), "timm", "timm"),
    "train, backbone": (("train", "CONFIG", "model.backbone.name=timm/resnet18"), "timm", "timm"),
    "train, weights": (("train", "CONFIG", "model.backbone.weights=timm"), "timm", "timm"),
    "train, backend": (("train", "CONFIG", "eval.backend=faster-coco-eval"), "faster_coco_eval", "fast-eval"),
    "train, wandb": (("train", "CONFIG", "train.wandb=mine"), "wandb", "wandb"),
    "pretrain, teacher": (
        ("pretrain", "PRETRAIN", "teacher.name=timm/resnet18", "teacher.weights=pretrained"),
        "timm",
        "timm",
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_missing_package_is_told_before_any_work(name, tiny_file, tmp_path, monkeypatch):
    arguments, package, extra = COMMANDS[name]
    for file in ("a.pt", "a.onnx", "a.xml", "a.jpg", "a.mp4", "a.json"):
        (tmp_path / file).write_text("nothing")
    if "PRETRAIN" in arguments:
        images = tmp_path / "images"
        for split in ("train", "val"):
            (images / split).mkdir(parents=True)
        (tmp_path / "pretrain.yaml").write_text(
            f"output_dir: {tmp_path / 'run'}\ndata: {{train: {images}/train, val: {images}/val}}\n"
        )
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    names = {"CONFIG": tiny_file, "PRETRAIN": "pretrain.yaml"}
    before = sorted(tmp_path.rglob("*"))
    done = run(*[names.get(word, word) for word in arguments])
    done.assert_error(f"needs {package.replace('_', '-')}: pip install -e '.[{extra}]'")
    assert sorted(tmp_path.rglob("*")) == before and done.out == ""


def test_the_backend_of_a_checkpoint_is_known_before_it_detects(trained, monkeypatch, tmp_path):
    def load(*arguments, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(score, "load_detector", load)
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    arguments = ("device=cpu", "eval.backend=faster-coco-eval", "--save-predictions", tmp_path / "p.json")
    run("evaluate", trained / "best.pt", *arguments).assert_error("pip install -e '.[fast-eval]'")


# Paths that are not there, in every place of a command line: {} is one, FILE and DIR are there.
PATHS = [
    ["evaluate", "{}"],
    ["evaluate", "FILE", "--data", "{}"],
    ["evaluate", "FILE", "--images", "{}"],
    ["evaluate", "--data", "FILE", "--predictions", "{}"],
    ["detect", "{}", "FILE"],
    ["detect", "FILE", "{}"],
    ["detect", "FILE", "FILE", "DIR", "{}"],
    ["detect", "FILE", "FILE", "--adapter", "{}"],
    ["evaluate", "FILE", "--adapter", "{}.yaml"],
    ["label", "{}", "DIR", "--out", "new"],
    ["label", "FILE", "{}", "--out", "new"],
    ["label", "FILE", "--data", "{}", "--out", "new"],
    ["export", "{}", "--format", "onnx"],
    ["quantize", "{}"],
    ["quantize", "FILE", "--calibration", "{}"],
    ["report", "{}"],
    ["report", "DIR", "{}"],
    ["report", "--predictions", "{}", "--data", "FILE"],
    ["report", "DIR", "--data", "{}"],
    ["report", "DIR", "--images", "{}"],
    ["benchmark", "{}.pt"],
    ["benchmark", "{}.onnx"],
    ["benchmark", "{}.yaml"],
    ["benchmark", "FILE.pt", "--image", "{}"],
    ["benchmark", "--cost", "{}.yaml"],
    ["convert_weights", "{}"],
    ["convert_weights", "FILE", "--image", "{}"],
    ["convert_weights", "FILE", "--val", "{}"],
    ["convert_data", "{}", "--to", "voc", "--out", "new"],
    ["convert_data", "train={}", "--to", "voc", "--out", "new"],
    ["convert_data", "FILE", "--images", "{}", "--to", "voc", "--out", "new"],
    ["ghostify", "{}.pt"],
    ["ghostify", "{}.yaml"],
    ["ghostify", "resnet18", "--weights", "{}"],
    ["ghostify", "resnet18", "--images", "{}"],
    ["redundancy", "resnet18", "--images", "{}"],
    ["redundancy", "resnet18", "--images", "FILE", "--weights", "{}"],
    ["make_crops", "{}", "--out", "new"],
    ["make_crops", "FILE", "--images", "{}", "--out", "new"],
    ["make_coco_like", "--out", "new.json", "--photographs", "{}"],
    ["check_data", "{}"],
    ["check_data", "{}.json"],
    ["check_data", "{}.yaml"],
    ["check_data", "FILE", "--images", "{}"],
    ["check_data", "FILE", "--val", "{}"],
    ["check_data", "FILE", "--val", "FILE", "--val-images", "{}"],
]
SCRIPT = """
import json, sys
sys.path[:0] = [{root!r}, {tests!r}, {hostile!r}]
from run_tool import run
for arguments in json.load(sys.stdin):
    done = run(*arguments)
    print(json.dumps([arguments, done.code, done.err, "torch" in sys.modules]), flush=True)
    if "torch" in sys.modules:
        break
"""


def test_a_mistyped_path_is_told_before_torch_is_imported(tmp_path):
    """All of them in one process, as starting one takes longest."""
    for name in ("a", "a.pt"):
        (tmp_path / name).write_text("nothing")
    names = {"FILE": "a", "DIR": str(tmp_path), "FILE.pt": "a.pt"}
    commands = [[names.get(word, word.replace("{}", "no/such")) for word in row] for row in PATHS]
    script = SCRIPT.format(
        root=str(ROOT), tests=str(ROOT / "tests" / "helpers"), hostile=str(ROOT / "tests" / "hostile")
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=240,
        check=False,
    )
    ended = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = [row for row in ended if row[1] != 2 or row[3] or "no/such" not in row[2] or row[2].count("error: ") != 1]
    assert not wrong and len(ended) == len(commands), (wrong, done.stderr)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.pt"]
