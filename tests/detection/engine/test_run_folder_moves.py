"""The folder of a run: who may train in it, and what is never moved or overwritten."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from detection import UserError
from detection.engine.run_folder import LOCK, check_output_dir, locked, move_aside, user_files
from detection.engine.train_detector import run_training

FORK = multiprocessing.get_context("fork")


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture()
def run(tmp_path):
    """A folder as a training leaves it."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("best.pt", "last.pt", "config.yaml", "metrics.jsonl", "events.out.tfevents.1"):
        (folder / name).write_text('{"epoch": 1}\n' if name == "metrics.jsonl" else name)
    return folder


@pytest.fixture()
def holder(run):
    """Another process that trains in `run`, and a child of it that outlives it, as a DataLoader worker may."""
    child = FORK.Value("i", 0)

    def train():
        with locked(run):
            worker = FORK.Process(target=time.sleep, args=(60,))
            worker.start()
            child.value = worker.pid
            time.sleep(60)

    process = FORK.Process(target=train)
    process.start()
    while not child.value:
        time.sleep(0.01)
    yield process
    process.kill()
    process.join()
    os.kill(child.value, signal.SIGKILL)


def test_a_second_training_is_refused_and_moves_nothing(tiny_config, run, holder):
    before = contents(run)
    for resume in (False, True):
        with pytest.raises(UserError, match=rf"is in use: process {holder.pid} on host {os.uname().nodename}"):
            check_output_dir(tiny_config, resume)
    with pytest.raises(UserError, match="is in use"):
        run_training(tiny_config)
    assert contents(run) == before and not (run.parent / "run.old1").exists()


def test_tools_refuse_a_second_training_before_they_import_torch(tiny_file, run, holder):
    code = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    for extra in ([], ["--resume"]):
        command = [sys.executable, "-c", code, str(ROOT / "tools" / "train.py"), str(tiny_file), *extra]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
        assert done.returncode == 2 and f"process {holder.pid}" in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_lock_ends_with_its_process_even_if_workers_live_on(tiny_config, run, holder):
    holder.kill()
    holder.join()
    assert (run / LOCK).exists()
    check_output_dir(tiny_config)
    with locked(run):
        assert (run / LOCK).read_text().split()[0] == str(os.getpid())
    assert not (run / LOCK).exists()


def test_a_lock_on_a_removed_file_does_not_count(run, monkeypatch):
    """Between open() and lock, the holder of the file may end and remove it."""
    import fcntl

    lock, first = fcntl.lockf, []

    def late(file, operation):
        if not first:
            first.append(file)
            (run / LOCK).unlink()
        lock(file, operation)

    monkeypatch.setattr(fcntl, "lockf", late)
    with locked(run):
        assert (run / LOCK).exists()


def test_a_file_system_without_locks_gets_a_warning(run, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    said = []
    monkeypatch.setattr("fcntl.lockf", refuse)
    monkeypatch.setattr("detection.engine.run_folder.log.warning", lambda text, *values: said.append(text % values))
    with locked(run):
        pass
    assert len(said) == 1 and "cannot be locked (Operation not supported)" in said[0]
    assert not (run / LOCK).exists()


def test_a_start_that_fails_leaves_no_folder(tiny_config, tmp_path):
    config = tiny_config.with_overrides([f"output_dir={tmp_path / 'new' / 'run'}", "data.val.annotations=nowhere.json"])
    with pytest.raises(UserError):
        run_training(config)
    assert not (tmp_path / "new").exists()


def test_what_other_tools_write_is_known(run):
    for name in ("best.onnx", "best.int8.xml", "best.int8.bin", "best.quantized.md", "trace.json", "pending-3.pt"):
        (run / name).touch()
    (run / "detections" / "sub").mkdir(parents=True)
    for name in ("a.jpg", "a.json", "sub/b.json"):
        (run / "detections" / name).touch()
    assert user_files(run) == []
    (run / "detections" / "holiday.jpg").touch()
    (run / "best_of_mine.onnx").touch()
    assert user_files(run) == ["best_of_mine.onnx", "detections"]


def test_a_run_with_other_files_beside_it_is_not_moved(tiny_config, run):
    (run / "images").mkdir()
    (run / "train.json").write_text("mine")
    before = contents(run)
    for start in (check_output_dir, run_training):
        with pytest.raises(UserError, match=r"besides it images, train\.json\. Move these"):
            start(tiny_config)
    assert contents(run) == before
    check_output_dir(tiny_config, resume=True)


@pytest.mark.parametrize("name", ["config.yaml", "predictions.json", "report.html", "train.log", "pending-1.pt"])
def test_a_first_run_overwrites_no_file_of_the_users(tiny_config, tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    for start in (check_output_dir, run_training):
        with pytest.raises(UserError, match=f"overwrite, and is of no run: {name}"):
            start(tiny_config)
    assert contents(tmp_path / "run") == {name: b"mine"}


def test_user_files_and_what_a_stopped_start_left_are_no_obstacle(tiny_config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    check_output_dir(tiny_config)
    for name in ("config.yaml", "environment.json", "train.log"):
        (tmp_path / "run" / name).write_text("[]")
    check_output_dir(tiny_config)


@pytest.mark.parametrize("output_dir", ["set", ".", "set/images", "set/annotations.json"])
def test_the_folder_of_the_data_is_refused(tiny_config, tmp_path, output_dir):
    before = contents(tmp_path)
    config = tiny_config.with_overrides([f"output_dir={tmp_path / output_dir}"])
    for start in (check_output_dir, run_training):
        with pytest.raises(UserError, match=r"output_dir .* (is|contains) data\.train\.(images|annotations)"):
            start(config)
    assert contents(tmp_path) == before


def test_the_folder_of_the_weights_is_refused(tiny_config, run, tmp_path):
    config = tiny_config.with_overrides([f"model.backbone.weights={run / 'best.pt'}"])
    with pytest.raises(UserError, match=r"contains model\.backbone\.weights"):
        check_output_dir(config)
    check_output_dir(config, resume=True)


def test_a_run_is_moved_to_where_its_link_points(run, tmp_path):
    (tmp_path / "link").symlink_to(run)
    assert move_aside(tmp_path / "link") == tmp_path / "run.old1"
    assert not run.exists() and (tmp_path / "link").is_symlink()


def test_the_working_directory_is_not_moved(tiny_config, run, monkeypatch):
    monkeypatch.chdir(run)
    for name in (".", ".."):
        config = tiny_config.with_overrides([f"output_dir={name}"])
        if name == "..":
            (run.parent / "last.pt").touch()
        with pytest.raises(UserError, match=r"is or contains the working directory|contains data\."):
            check_output_dir(config)


@pytest.mark.parametrize("name", ["x" * 300, "nul\0byte", "config.yaml/run"])
def test_names_that_cannot_be_folders(tiny_config, tmp_path, name):
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match="cannot be a folder"):
        check_output_dir(tiny_config.model_copy(update={"output_dir": str(tmp_path / name)}))
