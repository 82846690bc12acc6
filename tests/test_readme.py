"""The commands of README.md and docs/ as printed, in a folder that has what they name, made small by overrides."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, made_once
from readme_commands import Command, add_weights, commands, make_place, python_blocks

sys.path.append(str(ROOT / "tests" / "hostile"))
from run_tool import run

# By how they begin.
NOT_RUN = {
    "make demo": "trains for eight minutes; its commands are those of tests/detection/data/test_demo_data.py",
    "make test": "is what runs this",
    "pip install": "installs from the network",
    "curl ": "fetches from the network",
    "cd examples/": "needs npm and its registry: make test-examples",
    "python tools/detect.py runs/mine/best.pt 0 ": "needs a camera",
    "python tools/detect.py runs/mine/best.pt rtsp:": "needs a stream",
    "python tools/pretrain.py configs/pretrain/ghostnet_imagenet.yaml model.width=1.1 'teacher=": "fetches a teacher's "
    "weights from the hub",
    "python tools/pretrain.py configs/zoo/ghostnet.yaml": "needs the weights of a package",
    "torchrun --nnodes 2": "needs two machines",
    "python -c ": "a step towards ncnn, whose converter is not installed",
    "pnnx ": "is not installed",
    "python tools/train.py configs/ghostdet_small.yaml data.train.annotations=…": "the data are left to the reader",
    "python tools/benchmark.py configs/ghostdet_small.yaml": "needs ONNX files of other projects",
}
IN_PLACE_OF = {
    # Several GPUs; tests/detection/engine/test_distributed.py has two processes.
    "torchrun --nproc-per-node 8 ": "python ",
    "torchrun --nproc-per-node 4 ": "python ",
    "torchrun --nproc-per-node 2 ": "python ",
    " --serve": "",  # runs until Ctrl-C; tests/detection/report/test_browse.py asks it
    "--classes car bus": "--classes square disc",  # those of the checkpoint that is there
    # The bfloat16 kernels of some processors now and then give NaN for images of this size.
    " train.amp=bf16": "",
    " CONFIG": " configs/mine.yaml",
    "configs/demo.yaml": "configs/mine.yaml",
    "archive/": "holiday/",
    "yolox_nano.onnx": "detector.onnx",  # a file of another project
    "--adapter yolox": "--adapter detector.yaml",
    "/tmp/coco_like.json": "coco_like.json",
    "data.{train,val}.images=data/bccd/images ": "",  # a shell expands it; this is the default
    "data.{train,val}.images=$B/images ": "",
}
if importlib.util.find_spec("nncf") is None:  # an extra that `make test-all` installs
    IN_PLACE_OF["--format onnx openvino"] = "--format onnx"
NETWORK = "model.fpn_channels=16 model.head_channels=16 model.head_depth=1"
TINY = "device=cpu data.workers=0 train.ema=0"
IMAGES = "data.batch_size=4 data.short_side=64 data.long_side=64 data.multi_scale=[] data.progressive=[]"
# What makes a tool's command small enough for a test.
SHRUNK = {
    "train": f"{TINY} {NETWORK} {IMAGES} data.augment.mosaic=0 train.report=false",
    "pretrain": f"{TINY} data.size=32 data.batch_size=4",
    "evaluate": "",
    "detect": "",
    "label": "",
    "check_data": "--workers 1",
    "convert_data": "",
    "report": "",
    "export": "",
    "browse": "data.workers=0 --batches 1",
    "quantize": "",
    "convert_weights": "",
    "make_crops": "",
    "make_coco_like": "",
    "ghostify": "--size 64 --count 2",
    "redundancy": "--size 64 --count 1",
    "benchmark": "",
    "dev/annotation_speed": "",
    "dev/evaluation_speed": "--images 5 --detections 3 --classes 2",
    "dev/folder_speed": "",
    "dev/training_speed": f"{TINY} {NETWORK} {IMAGES} --steps 1",
}
COMMANDS = [command for command in commands() if not command.text.startswith(tuple(NOT_RUN))]
# The network of the checkpoints that are there, for trainings that start from one.
NETWORK_OF_WEIGHTS = "model.backbone.width=0.5 model.fpn_channels=32"
# In `make test`; all others, and these again in the order of the pages, in `make test-all`.
FAST = (
    "python tools/train.py configs/retina_ghost_320.yaml output_dir=runs/mine data.train",
    "python tools/train.py configs/retina_ghost.yaml --dry-run",
    "python tools/check_data.py mine/train.json",
    "python tools/evaluate.py runs/mine/best.pt",
    "python tools/evaluate.py --predictions",
    "python tools/detect.py runs/mine/best.pt photo.jpg",
    "python tools/label.py",
    "python tools/evaluate.py detector.onnx",
    "python tools/convert_data.py",
)
# Once each, although several pages print some of them.
FIRST = list({c.text: c for c in reversed(COMMANDS) if c.text.startswith(FAST)}.values())[::-1]
ASSIGNMENT = re.compile(r"""([A-Z]+)=(\S+|"[^"]*"|\$\(.*\))""")
SECTIONS = list(dict.fromkeys(command.section for command in COMMANDS))


@pytest.fixture()
def place(tmp_path, trained, exported, tmp_path_factory, monkeypatch) -> Path:
    def make(root: Path) -> None:
        make_place(root / "home", trained, exported / "best.onnx")

    home = made_once(tmp_path_factory, "readme", make) / "home"
    shutil.copytree(home, tmp_path / "home", symlinks=True)
    monkeypatch.chdir(tmp_path / "home" / "checkout")
    return tmp_path / "home" / "checkout"


def shrink(tool: str, words: list[str]) -> list[str]:
    more = SHRUNK[tool].split()
    if tool in ("train", "pretrain"):
        # One of the two budgets, as both are an error.
        more.append("train.minutes=0.01" if any(w.startswith("train.minutes=") for w in words) else "train.epochs=1")
        if "--resume" in words:
            more[-1] = "train.epochs=2"
        if any(w.startswith("model.weights=") for w in words):
            more += NETWORK_OF_WEIGHTS.split()
    if tool == "evaluate" and "--predictions" not in words:
        more.append("data.workers=0")
    if tool == "make_coco_like":
        # Files below 16 MB get no index.
        more += ("--images 8 --boxes 20" if "--photographs" in words else "--images 5000 --boxes 40000").split()
    if tool == "benchmark" and "--peers" in words:
        more += ["--runs", "1", "--size", "64", "--backends", "eager"]
    return more


def execute(command: Command, variables: dict[str, str]) -> None:
    text = command.text
    for printed, instead in IN_PLACE_OF.items():
        text = text.replace(printed, instead)
    for name, value in sorted(variables.items(), reverse=True):
        text = text.replace(f"${name}", value)
    text = text.removesuffix(" &").removesuffix(" …")
    if assignment := ASSIGNMENT.fullmatch(text):
        variables[assignment[1]] = _shell(f"echo {assignment[2]}").strip()
        return
    words = shlex.split(text)
    while words[0] != "python" and ("=" in words[0] or words[0] == "taskset"):
        words = words[3:] if words[0] == "taskset" else words[1:]
    if words[0] == "ghostdet":
        if words[1] == "--help":
            done = subprocess.run(
                [sys.executable, "-m", "detection", "--help"], capture_output=True, text=True, cwd=ROOT
            )
            assert done.returncode == 0, done.stderr
            return
        words = ["python", f"tools/{words[1]}.py", *words[2:]]
    if words[0] == "mkdir":
        Path(words[1]).mkdir()
        return
    assert words[0] == "python", f"{command.section}, line {command.line}: {text!r} is neither run nor in NOT_RUN"
    if not words[1].startswith("tools/"):
        done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return
    tool = words[1].removeprefix("tools/").removesuffix(".py")
    outcome = run(tool, *words[2:], *shrink(tool, words))
    # The doctor's 1 is that it found something.
    assert outcome.code in ((0, 1) if tool == "check_data" else (0,)), (
        f"{command.section}, line {command.line}: {text}\n{outcome}"
    )
    assert "error: " not in outcome.err, outcome.err


def _shell(text: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", text], capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}
    ).stdout


@pytest.mark.parametrize("section", list(dict.fromkeys(command.section for command in FIRST)))
def test_first_commands(place, section):
    for command in FIRST:
        if command.section == section:
            execute(command, {})


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS)
def test_all_commands(place, section):
    add_weights(place)
    # The variables of a shell that has run all pages.
    variables: dict[str, str] = {}
    for command in COMMANDS:
        if command.section == section or ASSIGNMENT.fullmatch(command.text):
            execute(command, variables)


def test_of_voc_the_folder(place):
    """The third format, which README.md only names in a comment."""
    first = next(c for c in COMMANDS if "data.train.annotations=mine/data.yaml" in c.text)
    execute(Command(first.section, first.line, first.text.replace("mine/data.yaml", "VOC2007")), {})


@pytest.mark.parametrize("config", ["ghostdet_small", "ghostdet_medium_coco", "faster_rcnn_ghost"])
def test_the_first_command_with_another_config(place, config):
    first = next(c for c in COMMANDS if "data.train.annotations=mine/train.json" in c.text)
    text = f"{first.text.replace('retina_ghost_320', config)} --dry-run"
    execute(Command(first.section, first.line, text), {})


@pytest.mark.parametrize("page", ["README.md", "docs/inference.md", "docs/data.md"])
def test_python(place, page):
    blocks = python_blocks(page)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), {})


def test_each_command_is_run_or_has_a_reason():
    found = commands()
    assert len(found) > 50
    for start in NOT_RUN:
        assert any(command.text.startswith(start) for command in found), f"{start!r} is in none of the pages"
    for start in FAST:
        assert any(command.text.startswith(start) for command in COMMANDS), f"{start!r} is in none of the pages"
    assert any("tools/train.py" in command.text for command in found)
