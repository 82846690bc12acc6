"""eval.background: the same run, scored while the training goes on."""

import json
from pathlib import Path

import pytest
import torch

from detection.checkpoint import read_checkpoint
from detection.core.outputs import NOTES
from detection.engine import detection_task, loop
from detection.engine.detection_task import build_trainer
from detection.engine.resume import load_checkpoint
from detection.engine.run_logger import RunLogger
from detection.engine.train_detector import run_training
from detection.evaluation import background_scoring as background
from detection.evaluation.background_scoring import BackgroundScoring
from detection.evaluation.coco_evaluator import METRICS, Evaluation, evaluate_results

pytestmark = pytest.mark.numeric


class Killed(BaseException):
    pass


def records(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"], line["memory_mb"]
    return lines


def assert_same_run(one, two):
    assert records(one) == records(two)
    assert (one / "predictions.json").read_text() == (two / "predictions.json").read_text()
    assert (one / "best_predictions.json").read_text() == (two / "best_predictions.json").read_text()
    for name in ("best.pt", "last.pt"):
        first, second = read_checkpoint(one / name), read_checkpoint(two / name)
        assert all(torch.equal(first["model"][key], second["model"][key]) for key in first["model"])
        assert first.get("numbers") == second.get("numbers")
        if name == "last.pt":
            for progress in (first["progress"], second["progress"]):
                del progress["seconds"]
            assert first["progress"] == second["progress"]
    assert not list(two.glob("pending-*")) and [path.name for path in two.glob(".*")] == [NOTES]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    from conftest import tiny_raw, write_coco

    from detection.config_io import parse_config

    root = tmp_path_factory.mktemp("background")
    write_coco(root / "data", images=8)
    return parse_config(tiny_raw(root / "data", root / "front"), "test").with_overrides(["train.epochs=2"])


@pytest.fixture(scope="module")
def front(config):
    """The folder of the run without it."""
    assert run_training(config)
    return Path(config.output_dir)


@pytest.mark.slow
def test_the_run_is_the_same(config, front, tmp_path):
    assert run_training(config.with_overrides(["eval.background=true", f"output_dir={tmp_path / 'back'}"]))
    assert_same_run(front, tmp_path / "back")


@pytest.mark.slow
def test_going_back_to_the_previous_checkpoint_of_a_finished_run(config, tmp_path):
    config = config.with_overrides(["eval.background=true", f"output_dir={tmp_path / 'back'}"])
    assert run_training(config)
    folder = tmp_path / "back"
    expected, best = records(folder), read_checkpoint(folder / "last.pt")["progress"]["best"]
    (folder / "previous.pt").rename(folder / "last.pt")
    assert read_checkpoint(folder / "last.pt")["progress"]["scored"] == 1
    assert run_training(config, resume=True)
    assert records(folder) == expected
    assert read_checkpoint(folder / "last.pt")["progress"]["best"] == best


class Scored:
    """In the place of the process: scores here, at once."""

    def __init__(self, *arguments):
        self.evaluation = evaluate_results(*arguments)

    def wait(self):
        return self.evaluation


@pytest.mark.parametrize(
    "moment",
    [
        "before the save",
        pytest.param("after the save", marks=pytest.mark.slow),
        pytest.param("at the end", marks=pytest.mark.slow),
    ],
)
def test_a_kill_loses_nothing(config, front, tmp_path, monkeypatch, moment):
    monkeypatch.setattr(detection_task, "BackgroundScoring", Scored)
    config = config.with_overrides(["eval.background=true", f"output_dir={tmp_path / 'back'}"])
    trainer = build_trainer(config)
    trainer.folder.mkdir()
    plain, saves = trainer.save, []

    def save():
        # Two saves an epoch: after its training, and after its evaluation.
        saves.append(trainer.progress.evaluated)
        number = {"before the save": 4, "after the save": 4, "at the end": 5}[moment]
        if len(saves) == number and moment != "after the save":
            raise Killed
        plain()
        if len(saves) == number:
            raise Killed

    monkeypatch.setattr(trainer, "save", save)
    with pytest.raises(Killed):
        loop.train(trainer, RunLogger(trainer.folder, 0))
    assert len(records(trainer.folder)) == {"before the save": 1, "after the save": 1, "at the end": 2}[moment]
    assert list(trainer.folder.glob("pending-*"))

    resumed = build_trainer(config)
    load_checkpoint(resumed, trainer.folder / "last.pt")
    assert loop.train(resumed, RunLogger(trainer.folder, resumed.progress.step))
    assert_same_run(front, trainer.folder)


@pytest.mark.slow
def test_best_is_the_network_that_had_the_score_not_the_one_of_later(config, tmp_path, monkeypatch):
    aps = iter([0.5, 0.9, 0.3, 0.2, 0.1])

    class Fixed:
        def __init__(self, *arguments):
            self.ap = next(aps)

        def wait(self):
            return Evaluation(dict.fromkeys(METRICS, self.ap) | {"AP": self.ap}, [])

    monkeypatch.setattr(detection_task, "BackgroundScoring", Fixed)
    config = config.with_overrides(["eval.background=true", f"output_dir={tmp_path / 'back'}", "train.patience=2"])
    trainer = build_trainer(config.with_overrides(["train.epochs=9"]))
    trainer.folder.mkdir()
    weights = {}
    plain = trainer.begin_epoch

    def begin_epoch():
        weights[trainer.progress.epoch] = {k: v.clone() for k, v in trainer.eval_model.state_dict().items()}
        plain()

    monkeypatch.setattr(trainer, "begin_epoch", begin_epoch)
    assert loop.train(trainer, RunLogger(trainer.folder, 0))
    assert [record["AP"] for record in records(trainer.folder)] == [0.5, 0.9, 0.3, 0.2, 0.1]
    # Two without a new best are known after the evaluation that follows them.
    assert trainer.progress.epoch == 5 and trainer.progress.best_epoch == 2
    best = read_checkpoint(trainer.folder / "best.pt")
    assert best["numbers"]["AP"] == 0.9
    assert all(torch.equal(best["model"][key], weights[2][key]) for key in weights[2])
    assert any(not torch.equal(best["model"][key], weights[3][key]) for key in weights[3])


def test_a_process_that_dies_is_made_good(config, monkeypatch, caplog):
    index = build_trainer(config).task.val_annotations
    scoring = BackgroundScoring(index, [], "pycocotools")
    scoring._process.kill()
    with caplog.at_level("WARNING", logger="detection"):
        background.log.propagate = True
        evaluation = scoring.wait()
    assert evaluation.numbers["AP"] == 0.0
    assert "scored here instead" in caplog.text


def test_the_process_gives_what_is_given_here(config):
    index = build_trainer(config).task.val_annotations
    results = [{"image_id": 15, "category_id": 3, "bbox": [1.0, 2.0, 30.0, 30.0], "score": 0.5}]
    found, expected = BackgroundScoring(index, results, "pycocotools").wait(), evaluate_results(index, results)
    assert found.numbers == pytest.approx(expected.numbers, nan_ok=True)
    assert found.per_class == expected.per_class
