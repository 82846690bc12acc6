"""Checkpoints: written whole or not at all, and read with care."""

import json
import resource
import signal
from unittest.mock import ANY

import pytest
import torch

from detection import UserError
from detection.checkpoint import keep_previous, read_checkpoint, save_checkpoint
from detection.core.files import remove_unfinished, write_atomically
from detection.engine.train_detector import run_training


def test_an_interrupt_inside_a_save_is_no_full_disk(tmp_path):
    def interrupted(file):
        torch.save({"a": torch.zeros(10)}, _Interrupting(file))

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "last.pt", interrupted)
    assert not list(tmp_path.iterdir())


class _Interrupting:
    """A file in whose write a signal handler raises."""

    def __init__(self, file):
        self.file = file

    def write(self, data):
        raise KeyboardInterrupt

    def flush(self):
        self.file.flush()


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"a": torch.zeros(3)})
    good = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"last\.pt could not be written.*the earlier last\.pt is untouched"):
            save_checkpoint(path, {"a": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert path.read_bytes() == good and [p.name for p in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "foreign", "weights"])
def test_bad_checkpoints_are_refused(trained, tmp_path, damage):
    path = tmp_path / "last.pt"
    whole = (trained / "last.pt").read_bytes()
    (tmp_path / "best.pt").write_bytes((trained / "best.pt").read_bytes())
    if damage == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_bytes(b"hello")
    elif damage == "foreign":
        torch.save({"model": {}}, path)
    else:
        torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(UserError, match=r"last\.pt is not a"):
        read_checkpoint(path)
    if damage == "truncated":
        with pytest.raises(UserError, match=r"best\.pt is there too"):
            read_checkpoint(path)


def test_the_checkpoint_before_the_last_is_kept_and_offered(tiny_config, tmp_path):
    assert run_training(tiny_config)
    run = tmp_path / "run"
    last = read_checkpoint(run / "last.pt")["progress"]
    # The last save comes after the evaluation, the one before it at the end of the epoch.
    assert read_checkpoint(run / "previous.pt")["progress"] == {
        **last,
        "evaluated": 1,
        "scored": 1,
        "seconds": ANY,
        "best": ANY,
        "best_epoch": ANY,
    }
    (run / "last.pt").write_bytes((run / "last.pt").read_bytes()[:1000])
    with pytest.raises(UserError, match=r"mv .*previous\.pt .*last\.pt, and --resume goes on"):
        run_training(tiny_config, resume=True)
    (run / "previous.pt").rename(run / "last.pt")
    assert run_training(tiny_config, resume=True)
    assert read_checkpoint(run / "last.pt")["progress"]["evaluated"] == 2
    assert [json.loads(line)["epoch"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_the_previous_checkpoint_may_be_this_one_already(tmp_path):
    """As a run finds them that was killed between the two steps of a save."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"a": torch.zeros(3)})
    keep_previous(path)
    keep_previous(path)
    assert {left.name for left in tmp_path.iterdir()} == {"last.pt", "previous.pt"}


@pytest.mark.parametrize("moment", ["in a write", "in a second name"])
def test_what_a_kill_leaves_of_a_save_is_cleared_away(tmp_path, monkeypatch, moment):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"a": torch.zeros(3)})
    (tmp_path / ".hidden").touch()

    def killed(*names):
        raise SystemExit("as if killed: the cleaning up below it does not run")

    monkeypatch.setattr("os.replace", killed)
    monkeypatch.setattr("os.unlink", lambda name: None)
    with pytest.raises(SystemExit):
        save_checkpoint(path, {"a": torch.ones(3)}) if moment == "in a write" else keep_previous(path)
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 3
    remove_unfinished(tmp_path)
    assert {left.name for left in tmp_path.iterdir()} == {"last.pt", ".hidden"}
    assert torch.equal(read_checkpoint(path)["a"], torch.zeros(3))
