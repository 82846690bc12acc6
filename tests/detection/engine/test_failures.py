"""A full disk, no memory, a dropped connection, an operation that gives NaN: provoked for real."""

import contextlib
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_clear_error

from detection.checkpoint import read_checkpoint
from detection.config_io import load_config
from detection.core.errors import UserError
from detection.core.files import write_atomically
from detection.data.loader import _pass_over_lost_connections
from detection.engine import evaluations, trainer
from detection.engine.detection_task import DetectionTask
from detection.engine.run_logger import RunLogger
from detection.engine.train_detector import run_training


@pytest.fixture()
def small_disk(tmp_path):
    """A file system of 80 MB, which only root can make."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no file system of its own can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder):
    with (folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_keeps_what_was_saved(tool, tiny_file, small_disk):
    run = small_disk / "run"
    config = load_config(tiny_file, [f"output_dir={run}"])
    assert run_training(config.with_overrides(["train.epochs=1"]))
    kept = {name: (run / name).read_bytes() for name in ("last.pt", "best.pt", "metrics.jsonl", "config.yaml")}
    fill(small_disk)
    done = tool("train", tiny_file, f"output_dir={run}", "train.epochs=3", "--resume")
    assert_clear_error(done, "could not be written: No space left on device")
    assert {name: (run / name).read_bytes() for name in kept} == kept
    (small_disk / "filler").unlink()
    assert run_training(config.with_overrides(["train.epochs=3"]), resume=True)


def test_tensorboard_that_cannot_write_does_not_end_a_run(tiny_config, tmp_path, monkeypatch, capfd):
    monitor = RunLogger(tmp_path, 0)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(monitor.writer, "add_scalar", full)
    monitor.scalars({"a": 1.0}, 1)
    monitor.scalars({"a": 1.0}, 2)
    monitor.close()
    assert monitor.writer is None and "Traceback" not in capfd.readouterr().err


def test_workers_that_are_killed_while_a_file_is_written(tiny_config, monkeypatch, tmp_path):
    """Both loaders' workers die inside the second save: the file is written to the end, and the next batch tells."""
    write, saves = evaluations.save_checkpoint, []

    def kill_and_write(path, content):
        saves.append(path)
        if len(saves) == 2:
            children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
            for child in set(map(int, children)) - before:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.3)
        write(path, content)

    before = set(map(int, Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()))
    for module in (trainer, evaluations):
        monkeypatch.setattr(module, "save_checkpoint", kill_and_write)
    config = tiny_config.with_overrides(["data.workers=1", "train.epochs=2"])
    with pytest.raises(UserError, match=r"a process that reads images died \(process \d+ was killed by SIGKILL\)"):
        run_training(config)
    monkeypatch.undo()
    assert "numbers" in read_checkpoint(saves[1])
    assert read_checkpoint(tmp_path / "run" / "last.pt")["progress"]["evaluated"] == 1


def test_a_fault_that_is_not_the_disks_is_told_as_it_is(tmp_path):
    def fail(file):
        raise RuntimeError("can't allocate memory")

    with pytest.raises(RuntimeError, match="allocate memory"):
        write_atomically(tmp_path / "a", fail)
    assert not list(tmp_path.iterdir())


def test_workers_keep_silent_about_lost_connections(capsys):
    for error, heard in ((ConnectionResetError(), False), (EOFError(), False), (ValueError("bad"), True)):
        _pass_over_lost_connections(type(error), error, None)
        assert ("bad" in capsys.readouterr().err) == heard


@pytest.mark.slow
def test_out_of_memory_says_what_to_lower(tiny_file):
    """A process that may have 1.5 GB more than it starts with, and images that need far more."""
    code = (
        "import resource, sys, torch; from detection.cli.run_tool import run_tool; "
        "from detection.config_io import load_config; "
        "from detection.engine.train_detector import run_training; "
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize(); "
        "resource.setrlimit(resource.RLIMIT_AS, (used + 3 * 2**29,) * 2); "
        "run_tool(lambda: run_training(load_config(sys.argv[1], sys.argv[2:])) and 0)"
    )
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("no /proc here")
    command = [
        sys.executable,
        "-c",
        code,
        str(tiny_file),
        "data.short_side=2048",
        "data.long_side=2048",
        "data.batch_size=12",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert_clear_error(done, "out of memory on cpu with 12 images a batch", "data.batch_size=6 train.accumulate=2")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP on this system")
@pytest.mark.parametrize("nohup", [False, True])
def test_a_dropped_connection_does_not_end_a_run(tiny_file, nohup):
    """SIGHUP, and a terminal that answers with errors from then on; also where `nohup` has switched the signal off."""
    command = [sys.executable, str(ROOT / "tools" / "train.py"), str(tiny_file), "train.epochs=6"]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    finally:
        signal.signal(signal.SIGHUP, before)
    run = tiny_file.parent / "run"
    until = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.1)
    # The terminal is gone before the process can write its last lines.
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGHUP)
    process.wait(timeout=120)
    log = (run / "train.log").read_text()
    assert nohup or "the terminal was closed" in log
    assert "done: 6 epochs" in log and process.returncode == 0


def test_an_unforeseen_fault_says_what_to_go_on_from(tiny_config, monkeypatch, capsys, tmp_path):
    from detection.engine import loop

    step = loop.optimizer_step

    def fail(trainer):
        if trainer.progress.epoch == 1:
            raise ZeroDivisionError("a fault of the toolkit")
        step(trainer)

    monkeypatch.setattr(loop, "optimizer_step", fail)
    with pytest.raises(ZeroDivisionError):
        run_training(tiny_config)
    last = tmp_path / "run" / "last.pt"
    assert f"continue from {last} with --resume" in capsys.readouterr().out
    assert read_checkpoint(last)["progress"]["epoch"] == 1
    monkeypatch.setattr(loop, "optimizer_step", step)
    assert run_training(tiny_config, resume=True)


@pytest.mark.numeric
def test_detect_anomaly_names_the_operation(tiny_file, monkeypatch, capsys):
    """A loss that is finite, and whose gradient is not."""
    losses = DetectionTask.losses

    def bad(task, objective, images, targets):
        found = losses(task, objective, images, targets)
        return {**found, "bad": torch.sqrt(0 * found["classification"])}

    monkeypatch.setattr(DetectionTask, "losses", bad)
    monkeypatch.setattr(sys, "argv", ["train.py", str(tiny_file), "--detect-anomaly"])
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with pytest.raises(SystemExit, match="2"), pytest.warns(UserWarning, match="Traceback of forward"):
            runpy.run_path(str(ROOT / "tools" / "train.py"), run_name="__main__")
    finally:
        torch.autograd.set_detect_anomaly(False)
        for number, handler in before.items():
            signal.signal(number, handler)
    assert "error: --detect-anomaly: Function 'MulBackward0' returned nan" in capsys.readouterr().err
