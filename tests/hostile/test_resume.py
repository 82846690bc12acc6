"""A run's folder that was damaged before --resume: one line that names the file and what is wrong with it."""

import copy

import pytest
import torch
import yaml
from conftest import tiny_raw, write_coco
from run_tool import run

from detection import checkpoint
from detection.checkpoint import save_checkpoint
from detection.config_io import parse_config
from detection.core.errors import UserError
from detection.data.loader import iterate
from detection.engine.deferred_evaluation import DeferredEvaluation
from detection.engine.detection_task import build_trainer
from detection.engine.loop import optimizer_step, train_step
from detection.engine.resume import load_checkpoint
from detection.engine.run_folder import read_metrics


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run after its first step, and its last.pt."""
    root = tmp_path_factory.mktemp("begun")
    write_coco(root / "set")
    raw = tiny_raw(root / "set", root / "run")
    (root / "config.yaml").write_text(yaml.safe_dump(raw))
    trainer = build_trainer(parse_config(raw, "test"))
    trainer.folder.mkdir()
    trainer.objective.train()
    train_step(trainer, *next(iterate(trainer.train_loader)), group=1)
    optimizer_step(trainer)
    trainer.save()
    load_checkpoint(trainer, trainer.folder / "last.pt")
    trainer.content = checkpoint.read_checkpoint(trainer.folder / "last.pt")
    return trainer


def first_state(content):
    return next(iter(content["optimizer"]["state"].values()))


def without(*keys):
    def remove(content):
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return remove


def with_value(*keys_and_value):
    *keys, last, value = keys_and_value

    def change(content):
        for key in keys:
            content = content[key]
        content[last] = value

    return change


# Name: (what is done to the content of last.pt, words of the message).
DAMAGES = {
    **{f"no {key}": (without(key), key) for key in ("config", "classes", "model", "ema", "scaler", "progress", "rng")},
    "weights alone": (without("optimizer"), "weights alone"),
    "progress: a list": (with_value("progress", []), "progress"),
    "progress: a text": (with_value("progress", "step", "5"), "step is '5'"),
    "progress: negative": (with_value("progress", "epoch", -1), "epoch is -1"),
    "progress: huge": (with_value("progress", "step", 10**30), "step is 1000"),
    "progress: unknown": (with_value("progress", "mood", 1), "mood"),
    "progress: a bool": (with_value("progress", "batch", True), "batch is True"),
    "progress: best a text": (with_value("progress", "best", "high"), "best is 'high'"),
    "progress: beyond the epoch": (with_value("progress", "batch", 400), "after batch 400 of an epoch"),
    "config: key missing": (without("config", "data"), "key 'data' is missing"),
    "config: a text": (with_value("config", "data", "batch_size", "many"), "data.batch_size"),
    "classes: others": (with_value("classes", {"names": ["a", "b"], "ids": [1, 2]}), "trained on other classes: a, b"),
    "classes: numbers": (with_value("classes", "names", [1, 2]), "classes"),
    "model: a tensor less": (lambda content: content["model"].popitem(), "1 tensors missing"),
    "model: numbers": (with_value("model", {"a": 1}), "model"),
    "ema: a list": (with_value("ema", [1]), "ema"),
    "optimizer: empty": (with_value("optimizer", {}), "optimizer"),
    "optimizer: no groups": (with_value("optimizer", "param_groups", []), "optimizer"),
    "optimizer: groups of numbers": (with_value("optimizer", "param_groups", [1, 2]), "optimizer"),
    "optimizer: text in a group": (
        with_value("optimizer", "param_groups", 0, "weight_decay", "a"),
        "weight_decay is 'a'",
    ),
    "optimizer: state a list": (with_value("optimizer", "state", [1]), "optimizer"),
    "optimizer: shape": (
        lambda content: first_state(content).update(exp_avg=torch.zeros(7, 7)),
        "exp_avg has the shape",
    ),
    "optimizer: NaN": (lambda content: first_state(content)["exp_avg"].fill_(torch.nan), "exp_avg has numbers that"),
    "optimizer: part missing": (lambda content: first_state(content).pop("exp_avg_sq"), "of another optimizer"),
    "optimizer: text": (lambda content: first_state(content).update(exp_avg="a"), "optimizer"),
    "optimizer: step a text": (lambda content: first_state(content).update(step="a"), "optimizer"),
    "rng: empty": (with_value("rng", {}), "rng"),
    "rng: text": (with_value("rng", ["a"]), "rng"),
    "rng: generator cut": (with_value("rng", 0, "torch", torch.zeros(3, dtype=torch.uint8)), "rng"),
    "rng: numpy": (with_value("rng", 0, "numpy", ("MT19937", [1], 2, 0, 0.0)), "rng"),
    "processes: a text": (with_value("processes", "two"), "processes"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_last_pt(begun, monkeypatch, name):
    damage, words = DAMAGES[name]
    path = begun.folder / "last.pt"
    content = copy.deepcopy(begun.content)
    damage(content)
    # Not written and read again, which takes a second.
    monkeypatch.setattr(checkpoint, "read_torch_file", lambda path: content)
    with pytest.raises(UserError) as error:
        load_checkpoint(begun, path)
    begun.optimizer.load_state_dict(begun.content["optimizer"])
    assert str(path) in str(error.value) and words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"epoch": 1, "AP": 0.1}\n{"epoch": 2, "AP"', "line 2 is not JSON"),
        ("[" * 100_000, "line 1 is not JSON"),
        ('\n{"epoch": 1}\n', "line 1 is not JSON"),
        ("[1]\n", "line 1 is not the record of an evaluation"),
        ('{"epoch": "1"}\n', "line 1 is not the record"),
        (b"\xff\xfe\n", "line 1 is not JSON"),
    ],
)
def test_a_torn_metrics_file(begun, tmp_path, text, words):
    """Seen before anything is built, and left as it is."""
    data = text.encode() if isinstance(text, str) else text
    path = begun.folder / "metrics.jsonl"
    path.write_bytes(data)
    try:
        run("train", begun.folder.parent / "config.yaml", "--resume").assert_error(str(path), words, "that line")
        assert path.read_bytes() == data
    finally:
        path.unlink()


def test_metrics_of_an_absent_and_a_linked_file(tmp_path):
    assert read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").symlink_to("nowhere")
    with pytest.raises(UserError, match="nowhere"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"record": {}}, "record"),
        ({"record": {"epoch": 2, "step": 1, "seconds": 1}}, "not of epoch 1"),
        ({"results": "[{"}, "results"),
        ({"results": '[{"image_id": 1}]'}, "has no 'category_id'"),
    ],
)
def test_a_damaged_pending_evaluation(begun, tmp_path, change, words):
    record = {"epoch": 1, "step": 1, "seconds": 1.0}
    save_checkpoint(tmp_path / "pending-1.pt", {"record": record, "results": "[]", **change})
    with pytest.raises(UserError, match=words):
        DeferredEvaluation.resume(tmp_path, 1, begun.task)
