"""The command-line tools as a user runs them, and their mistakes."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, assert_clear_error, tiny_raw, write_coco
from processes import ToolProcess

TOOLS = sorted(p.stem for p in (ROOT / "tools").glob("*.py"))


@pytest.fixture()
def config_file(coco_set, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_raw(coco_set, tmp_path / "run")))
    return path


@pytest.mark.parametrize("name", TOOLS)
def test_help_has_an_example(name):
    # From nothing, as in a shell; the other tests start tools faster (see processes.py).
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), "--help"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0 and "example" in done.stdout and f"tools/{name}.py" in done.stdout


@pytest.mark.numeric
def test_train_resume_evaluate_detect(tool, config_file, coco_set, tmp_path):
    done = tool("train", config_file, "train.epochs=1", "data.workers=1")
    assert done.returncode == 0, done.stderr
    assert "TRAINING FROM SCRATCH" in done.stdout and "best.pt" in done.stdout
    done = tool("train", config_file, "--resume")
    assert done.returncode == 0 and "resumed after epoch 1" in done.stdout, done.stderr
    run = tmp_path / "run"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2

    done = tool("evaluate", run / "best.pt", "--json", tmp_path / "numbers.json", "data.workers=0")
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["AP"] == pytest.approx(max(json.loads(x)["AP"] for x in open(run / "metrics.jsonl")), abs=1e-6)
    assert set(numbers["per_class"]) == {"square", "disc"} and "square" in done.stdout

    # The results file scored by itself gives the same; other data are named by --data, their images lie beside it.
    done = tool(
        "evaluate",
        "--predictions",
        run / "predictions.json",
        "--data",
        coco_set / "annotations.json",
        "--json",
        tmp_path / "again.json",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "again.json").read_text()) == numbers
    done = tool(
        "evaluate",
        run / "best.pt",
        "--data",
        coco_set / "annotations.json",
        "--save-predictions",
        tmp_path / "p.json",
        "eval.score_threshold=0.3",
    )
    assert done.returncode == 0 and (tmp_path / "p.json").exists(), done.stderr

    done = tool("detect", run / "best.pt", coco_set / "images", "--out", tmp_path / "found", "--threshold", "0.05")
    assert done.returncode == 0 and "12 images done" in done.stdout, done.stderr
    assert len(list((tmp_path / "found").glob("*.jpg"))) == len(list((tmp_path / "found").glob("*.json"))) == 12


def test_dry_run(tool, config_file, tmp_path):
    done = tool("train", config_file, "--dry-run")
    assert done.returncode == 0 and "dry run: nothing was written" in done.stdout, done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_that_read_are_spawned_as_on_windows_and_macos(tool, config_file, tmp_path):
    done = tool("train", config_file, "train.epochs=1", "data.workers=1", start_method="spawn")
    assert done.returncode == 0 and (tmp_path / "run" / "best.pt").exists(), done.stderr


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_stopped_training_saves_and_resumes(tool, config_file, tmp_path, number):
    arguments = [config_file, "train.epochs=500", "train.eval_every=1000", "data.workers=1"]
    process = ToolProcess("train", arguments, tmp_path / "out", tmp_path / "err")
    process.wait_until((tmp_path / "run" / "last.pt").exists)
    process.send(number)  # as a terminal does: the workers get it, too
    assert process.wait(60)
    done = process.completed()
    out, err = done.stdout, done.stderr
    assert done.returncode == 130 and "--resume" in out and "Traceback" not in err, out + err
    step = int(out.split("stopped at step ")[1].split(";")[0])
    assert step >= 3
    done = tool("train", config_file, "--resume", f"train.epochs={step // 3 + 2}")
    assert done.returncode == 0 and f"step {step}" in done.stdout, done.stdout + done.stderr


# ---- one clear error each


def test_config_mistakes(tool, config_file):
    assert_clear_error(tool("train", "configs/retina_gost.yaml"), "does not exist", "did you mean")
    assert_clear_error(tool("train", config_file, "optim.lrr=1"), "unknown key 'optim.lrr'", "did you mean 'optim.lr'")


def test_data_mistakes(tool, config_file, coco_set, tmp_path):
    missing = tmp_path / "nowhere"
    assert_clear_error(tool("train", config_file, f"data.train.images={missing}"), str(missing), "does not exist")
    (coco_set / "broken.json").write_text('{"images": [')
    assert_clear_error(tool("train", config_file, f"data.val.annotations={coco_set / 'broken.json'}"), "is not JSON")
    (coco_set / "list.json").write_text('{"annotations": []}')
    assert_clear_error(
        tool("train", config_file, f"data.val.annotations={coco_set / 'list.json'}"), "not in COCO format"
    )
    content = json.loads((coco_set / "annotations.json").read_text())
    (coco_set / "none.json").write_text(json.dumps({**content, "annotations": []}))
    assert_clear_error(
        tool("train", config_file, f"data.train.annotations={coco_set / 'none.json'}"), "no annotation at all"
    )
    (coco_set / "images" / "image 2.jpg").unlink()
    assert_clear_error(tool("train", config_file), "image 2.jpg", "1 of 12 images")


def test_a_truncated_image_in_training(tool, config_file, coco_set):
    path = coco_set / "images" / "image 7.jpg"
    path.write_bytes(path.read_bytes()[:250])
    assert_clear_error(tool("train", config_file, "data.workers=1"), "image 7.jpg is truncated")


def test_unwritable_output(tool, config_file, tmp_path, trained, coco_set):
    (tmp_path / "file").write_text("")
    assert_clear_error(tool("train", config_file, f"output_dir={tmp_path / 'file' / 'run'}"), "cannot be a folder")
    done = tool("detect", trained / "best.pt", coco_set / "images", "--out", tmp_path / "file" / "x")
    assert_clear_error(done, "output folder", "cannot be written to")


def test_detect_mistakes(tool, trained, coco_set, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    image = coco_set / "images" / "image 3.jpg"
    assert_clear_error(tool("detect", trained / "best.pt", tmp_path / "notes.txt"), "neither an image nor a video")
    assert_clear_error(tool("detect", trained / "best.pt", image, "--classes", "dog"), "unknown class 'dog'")
    assert_clear_error(tool("detect", tmp_path / "no.pt", image), "does not exist")


def test_checkpoint_of_another_model(tool, trained, config_file, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(trained / "last.pt", tmp_path / "run" / "last.pt")
    before = (tmp_path / "run" / "last.pt").read_bytes()
    done = tool("train", config_file, "--resume", "model.head_channels=48")
    assert_clear_error(done, "these keys cannot change: model.head_channels: 32 -> 48", "Set them back")
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


def test_evaluate_mistakes(tool, trained, tmp_path):
    assert_clear_error(tool("evaluate"), "give a checkpoint, or both --predictions and --data")
    write_coco(tmp_path / "other", ids=(1, 2))
    content = json.loads((tmp_path / "other" / "annotations.json").read_text())
    content["categories"][0]["name"] = "dog"
    (tmp_path / "other" / "annotations.json").write_text(json.dumps(content))
    done = tool("evaluate", trained / "best.pt", "--data", tmp_path / "other" / "annotations.json")
    assert_clear_error(done, "classes that the model does not know: dog")


def test_disk_full_while_training(config_file, tmp_path):
    """A file-size limit stands in for a full disk: the first checkpoint does not fit."""
    script = ROOT / "tools" / "train.py"
    code = (
        "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); "
        f"sys.argv = ['train.py', {str(config_file)!r}]; runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert_clear_error(done, "last.pt could not be written", "disk full")
    assert not (tmp_path / "run" / "last.pt").exists()
