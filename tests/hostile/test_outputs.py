"""Outputs that would overwrite an input of the same command, or a file that this toolkit did not write."""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import write_coco
from run_tool import run

from detection.core.errors import UserError
from detection.core.outputs import NOTES, begin_output, is_own, note_output, write_output
from detection.data.image_io import images_below
from detection.engine.run_folder import user_files
from detection.evaluation.journal import Journal
from detection.inference.sources import find_items

USERS = b"the user's own"
PHOTO = "set/images/image 3.jpg"
LAYER = "ghostnet_conv_stem"
INPUT, FOREIGN = "is an input of the same command", "this toolkit did not write it"


@pytest.fixture()
def place(trained, tmp_path, monkeypatch):
    """Copies of a run and its data, a file of the user's for each row, and this as the working directory."""
    write_coco(tmp_path / "set", seed=1)
    (tmp_path / "run").mkdir()
    for name in ("best.pt", "config.yaml", "metrics.jsonl", "best_predictions.json"):
        shutil.copy(trained / name, tmp_path / "run")
    shutil.copy(trained / "best_predictions.json", tmp_path / "found.json")
    shutil.copy(tmp_path / PHOTO, tmp_path / f"{LAYER}.png")
    for name in ("v.mp4", "w.pth"):
        (tmp_path / name).write_bytes(USERS)
    (tmp_path / "run" / "best.torchscript").symlink_to("best.pt")
    (tmp_path / "found").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


DATA = ("--data", "set/annotations.json")
FILE = ("--predictions", "found.json", *DATA)
VAL = ("data.val.annotations=set/annotations.json", "data.val.images=set/images", "device=cpu")
NETWORKS = ("--cost", "ghostnet")
LATENCY = ("run/best.pt", "--runs", "1", "--no-memory", "--backends", "eager")

REDUNDANCY = ("redundancy", "ghostnet", "--width", "0.5", "--layer", "conv_stem")

# Command, output that is an input: --force does not help.
INPUTS = {
    "evaluate --json CHECKPOINT": (("evaluate", "run/best.pt", *VAL, "--json", "run/best.pt"), "run/best.pt"),
    "evaluate --save-predictions VAL": (
        ("evaluate", "run/best.pt", *VAL, "--save-predictions", "set/annotations.json"),
        "set/annotations.json",
    ),
    "evaluate --save-predictions IMAGE": (("evaluate", "run/best.pt", *VAL, "--save-predictions", PHOTO), PHOTO),
    "evaluate --predictions --json PREDICTIONS": (("evaluate", *FILE, "--json", "found.json"), "found.json"),
    "evaluate --predictions --json DATA": (
        ("evaluate", *FILE, "--json", "set/annotations.json"),
        "set/annotations.json",
    ),
    "check_data --html JSON": (
        ("check_data", "set/annotations.json", "--html", "set/annotations.json"),
        "set/annotations.json",
    ),
    "check_data --json JSON": (
        ("check_data", "set/annotations.json", "--json", "set/annotations.json"),
        "set/annotations.json",
    ),
    "check_data --fix JSON": (
        ("check_data", "set/annotations.json", "--fix", "set/annotations.json"),
        "set/annotations.json",
    ),
    "check_data --html IMAGE": (("check_data", "set/annotations.json", "--html", PHOTO), PHOTO),
    "report, numbers over the annotations": (
        ("report", *FILE, "--out", "set/annotations.html"),
        "set/annotations.json",
    ),
    "report, numbers over the predictions": (("report", *FILE, "--out", "found.html"), "found.json"),
    "report, numbers of a run over its predictions": (
        ("report", "run", *VAL, "--out", "run/best_predictions.html"),
        "run/best_predictions.json",
    ),
    "benchmark --out CONFIG": (
        ("benchmark", "--cost", "run/config.yaml", "--out", "run/config.yaml"),
        "run/config.yaml",
    ),
    "benchmark --out CHECKPOINT": (("benchmark", *LATENCY, "--out", "run/best.pt"), "run/best.pt"),
    "detect beside the image": (("detect", "run/best.pt", PHOTO, "--out", "set/images"), PHOTO),
    "detect beside the video": (("detect", "run/best.pt", "v.mp4", "--out", "."), "v.mp4"),
    "convert_weights --out FILE": (("convert_weights", "w.pth", "--out", "w.pth"), "w.pth"),
    "ghostify --out CHECKPOINT": (
        ("ghostify", "run/best.pt", "--init", "random", "--out", "run/best.pt"),
        "run/best.pt",
    ),
    "ghostify --out WEIGHTS": (
        ("ghostify", "ghostnet", "--weights", "w.pth", "--init", "random", "--out", "w.pth"),
        "w.pth",
    ),
    "redundancy over its image": ((*REDUNDANCY, "--images", f"{LAYER}.png", "--out", "."), f"{LAYER}.png"),
    "export, a link to the checkpoint": (("export", "run/best.pt", "--format", "torchscript"), "run/best.torchscript"),
}
# Command, output that is the user's: --force overwrites it.
USERS_FILES = {
    "evaluate --json": (("evaluate", *FILE, "--json", "mine.json"), "mine.json"),
    "evaluate --json, of a checkpoint": (("evaluate", "run/best.pt", *VAL, "--json", "mine.json"), "mine.json"),
    "evaluate --save-predictions": (("evaluate", "run/best.pt", *VAL, "--save-predictions", "mine.json"), "mine.json"),
    "evaluate, what is cut off": (
        ("evaluate", "run/best.pt", *VAL, "--save-predictions", "new.json"),
        "new.json.part0",
    ),
    "evaluate, by default": (("evaluate", "run/best.pt", *VAL), "run/predictions_annotations.json"),
    "check_data --json": (("check_data", "set/annotations.json", "--json", "mine.json"), "mine.json"),
    "check_data --html": (("check_data", "set/annotations.json", "--html", "mine.html"), "mine.html"),
    "check_data --fix": (("check_data", "set/annotations.json", "--fix", "mine.json"), "mine.json"),
    "check_data --fix, the changes": (
        ("check_data", "set/annotations.json", "--fix", "mine.json"),
        "mine.changes.json",
    ),
    "check_data --fix, the other set": (
        ("check_data", "set/annotations.json", "--val", "set/annotations.json", "--fix", "mine.json"),
        "mine_val.json",
    ),
    "report --out": (("report", *FILE, "--out", "mine.html"), "mine.html"),
    "report --out, the numbers": (("report", *FILE, "--out", "mine.html"), "mine.json"),
    "benchmark --out": (("benchmark", *NETWORKS, "--out", "mine.txt"), "mine.txt"),
    "benchmark --plot": (("benchmark", *LATENCY, "--plot", "mine.png"), "mine.png"),
    "detect, an annotation file": (("detect", "run/best.pt", PHOTO, "--out", "."), "image 3.json"),
    "detect, a video": (("detect", "run/best.pt", "v.mp4", "--out", "found"), "found/v.mp4"),
    "detect, the JSON of a video": (("detect", "run/best.pt", "v.mp4", "--out", "found"), "found/v.json"),
    "export": (("export", "run/best.pt", "--format", "onnx", "--out", "mine.onnx"), "mine.onnx"),
    "export, by default": (("export", "run/best.pt", "--format", "torch_export"), "run/best.pt2"),
    "export, the second file": (("export", "run/best.pt", "--format", "openvino", "--out", "m.xml"), "m.bin"),
    "quantize": (("quantize", "run/best.pt"), "run/best.int8.onnx"),
    "quantize, the table": (("quantize", "run/best.pt", "--out", "."), "best.quantized.md"),
    "convert_weights": (("convert_weights", "w.pth", "--out", "mine.pth"), "mine.pth"),
    "ghostify": (("ghostify", "ghostnet", "--init", "random", "--out", "mine.pth"), "mine.pth"),
    "redundancy": ((*REDUNDANCY, "--images", PHOTO, "--out", "found"), f"found/{LAYER}.csv"),
    "browse": (("browse", "run/config.yaml", "--batches", "1", "--out", "."), "index.html"),
    "browse, an image": (("browse", "run/config.yaml", "--batches", "1", "--out", "."), "batch_0000_01.jpg"),
    "make_demo_data": (("make_demo_data", "--out", "."), "val.json"),
    "make_demo_data, an image": (("make_demo_data", "--out", "set"), "set/images/train_000299.jpg"),
    "make_coco_like": (("make_coco_like", "--out", "mine.json", "--images", "2"), "mine.json"),
    "detect, an image": (("detect", "run/best.pt", PHOTO, "--out", "."), "image 3.jpg"),
}


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_are_never_overwritten(name, place):
    arguments, output = INPUTS[name]
    before = contents(place)
    for more in ((), ("--force",)):
        run(*arguments, *more).assert_error(output, INPUT)
    assert contents(place) == before


@pytest.mark.parametrize("name", USERS_FILES)
def test_files_of_the_user_are_not_overwritten(name, place):
    arguments, output = USERS_FILES[name]
    (place / output).write_bytes(USERS)
    before = contents(place)
    run(*arguments).assert_error(output, FOREIGN, "--force")
    assert contents(place) == before


@pytest.mark.parametrize(
    "name",
    ["evaluate --json", "check_data --html", "report --out", "benchmark --out", "detect, an image", "redundancy"],
)
def test_own_outputs_are_overwritten_and_edited_ones_are_not(name, place):
    arguments, output = USERS_FILES[name]
    (place / output).write_bytes(USERS)
    for more in (("--force",), ()):
        assert run(*arguments, *more).code == 0
        assert (place / output).read_bytes() != USERS
    with (place / output).open("a") as file:
        file.write("edited")
    run(*arguments).assert_error(output, "something changed it since")


def test_files_of_a_run_are_own_until_they_are_edited(place):
    """Those of a run from before there were notes, or copied without them."""
    files = [place / "run" / name for name in ("predictions.json", "report.html", "report.json")]
    for path in (*files, place / "predictions.json"):
        path.write_text("[]")
    assert all(map(is_own, files)) and not is_own(place / "predictions.json")
    assert not any(is_own(place / "run" / name) for name in ("best.pt", "config.yaml", "metrics.jsonl"))
    write_output(files[0], lambda file: file.write(b"[1]"))
    files[0].write_text("edited")
    (place / "run" / "metrics.jsonl").unlink()
    assert not any(map(is_own, files))


def test_detections_are_own_also_where_a_kill_left_them(place):
    """An image file whose JSON is missing, and both of a call that ended."""
    detect = ("detect", "run/best.pt", PHOTO, "--out", "found", "--device", "cpu")
    results = [place / "found" / f"image 3{suffix}" for suffix in (".jpg", ".json")]
    assert run(*detect).code == 0
    assert all(map(is_own, results))
    assert run(*detect).code == 0
    results[1].unlink()
    assert run(*detect, "--resume").code == 0
    results[0].write_bytes(USERS)
    run(*detect).assert_error("image 3.jpg", FOREIGN)
    assert results[0].read_bytes() == USERS


def test_a_file_in_place_is_always_noted(tmp_path, monkeypatch):
    """A kill just after a file was put in its place, and one just before."""
    path = tmp_path / "numbers.json"
    replace = os.replace
    for kill in ("after", "before"):

        def killed(source, target, kill=kill):
            if kill == "after":
                replace(source, target)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", killed)
            write_output(path, lambda file, kill=kill: file.write(kill.encode()))
        assert path.read_text() == "after" and is_own(path)


def test_a_file_that_is_written_in_place_is_own_while_it_grows(tmp_path):
    path = tmp_path / "v.mp4"
    with path.open("w") as file:
        begin_output(path)
        file.write("half")
    assert is_own(path)
    note_output(path)
    assert is_own(path)
    path.write_text("something else")
    assert not is_own(path)


@pytest.mark.timeout(20)
def test_notes_that_are_no_file_of_ours_are_left_alone(tmp_path):
    (tmp_path / "users").write_text("mine\n")
    for make in (
        lambda notes: notes.symlink_to("../users"),
        os.mkfifo,
        Path.mkdir,
        lambda notes: notes.write_text("[" * 100_000 + "\n[1]\n{}\n\0\n"),
    ):
        folder = tmp_path / f"folder{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        make(folder / NOTES)
        write_output(folder / "numbers.json", lambda file: file.write(b"{}"))
        assert (folder / "numbers.json").read_text() == "{}"
        regular = (folder / NOTES).is_file() and not (folder / NOTES).is_symlink()
        assert is_own(folder / "numbers.json") == regular
    assert (tmp_path / "users").read_text() == "mine\n"


def test_an_output_is_named_once(place):
    run("check_data", "set/annotations.json", "--json", "a.json", "--html", "./a.json").assert_error("named twice")


def test_other_data_leave_the_predictions_of_the_run(place):
    """The val set that the run was trained with is another one than --data, whatever it is called."""
    assert run("evaluate", "run/best.pt", "device=cpu").code == 0
    before = (place / "run" / "predictions.json").read_bytes()
    for other in (("--data", "set/annotations.json"), VAL):
        done = run("evaluate", "run/best.pt", "device=cpu", *other)
        assert done.code == 0 and "run/predictions_annotations.json\n(not to predictions.json" in done.out
        assert (place / "run" / "predictions.json").read_bytes() == before
    assert sorted(path.name for path in (place / "run").glob("predictions*")) == [
        "predictions.json",
        "predictions_annotations.json",
    ]
    own = json.loads((place / "run" / "predictions_annotations.json").read_text())
    assert own != json.loads(before)


def test_a_damaged_journal_is_told(tmp_path):
    path = tmp_path / "predictions.json.part0"
    journal = Journal(path, {"checkpoint": "a"}, resume=False)
    journal.add([1], [])
    journal.file.close()
    assert is_own(path) and Journal(path, {"checkpoint": "a"}, resume=True).images == {1}
    for damaged in ('{"images": [2]}\n', "[]\n", "\x00\n"):
        path.write_text('{"checkpoint": "a"}\n' + damaged)
        with pytest.raises(UserError, match=r"part0, line 2 is damaged: evaluate without --resume"):
            Journal(path, {"checkpoint": "a"}, resume=True)
    path.write_text("\x00\n")
    assert not Journal(path, {"checkpoint": "a"}, resume=True).images


def test_what_tools_write_into_a_run_is_no_reason_to_refuse_the_next_one(place):
    """The commands of `make demo`, which may be called again."""
    for _ in range(2):
        assert run("evaluate", "run/best.pt", "device=cpu", "--json", "run/evaluation.json").code == 0
        assert run("evaluate", "run/best.pt", *VAL, "--json", "run/mine.json").code == 0
        assert run("detect", "run/best.pt", PHOTO, "--out", "run/detections", "--device", "cpu").code == 0
    assert user_files(place / "run") == []
    (place / "run" / "mine.json").write_bytes(USERS)
    assert user_files(place / "run") == ["mine.json"]


def test_the_notes_are_no_part_of_a_set(place):
    """Folders that are read may hold outputs of ours."""
    assert run("detect", "run/best.pt", PHOTO, "--out", "set/images/found", "--device", "cpu").code == 0
    assert (place / "set/images/found" / NOTES).is_file()
    found = find_items(["set/images"])
    assert len(found) == 13 and not any(NOTES in item.source for item in found)
    assert not any(NOTES in name for name in images_below(Path("set/images")))
