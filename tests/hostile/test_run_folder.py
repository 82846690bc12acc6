"""Folders that a training must not begin in."""

from dataclasses import dataclass

import pytest
from run_tool import run

OURS = ("best.pt", "last.pt", "config.yaml", "metrics.jsonl")


@dataclass
class Row:
    files: tuple[str, ...]
    """In the folder `run`, before the command."""
    arguments: tuple[str, ...]
    words: tuple[str, ...]


def train(*overrides: str) -> tuple[str, ...]:
    return ("train", "CONFIG", *overrides)


ROWS = {
    "images beside a run": Row((*OURS, "images/1.jpg"), train(), ("besides it images. Move these",)),
    "notes beside a run": Row((*OURS, "a", "b", "c", "d"), train(), ("a, b, c and 1 more",)),
    "the user's config": Row(("config.yaml",), train(), ("is of no run: config.yaml",)),
    "the user's predictions": Row(("predictions.json",), train(), ("is of no run: predictions.json",)),
    "folder of the data": Row((), train("output_dir=DIR/set"), ("contains data.train.images", "another output_dir")),
    "folder of the images": Row((), train("output_dir=DIR/set/images"), ("is data.train.images",)),
    "a folder above all": Row((), train("output_dir=/"), ("contains data.train.images",)),
    "its own weights": Row(OURS, train("model.backbone.weights=DIR/run/best.pt"), ("model.backbone.weights",)),
    "a file": Row((), train("output_dir=DIR/config.yaml"), ("output_dir", "config.yaml")),
    "below a file": Row((), train("output_dir=DIR/config.yaml/run"), ("cannot be a folder", "config.yaml")),
    "a name too long": Row((), train(f"output_dir=DIR/{'x' * 300}"), ("output_dir", "the path is too long")),
    "nothing to resume": Row(("best.pt",), train("--resume"), ("there is no", "last.pt to go on from")),
    "nothing to resume, pretraining": Row((), ("pretrain", "PRETRAIN", "--resume"), ("last.pt to go on from",)),
    "class folders": Row(("dog/1.jpg",), ("pretrain", "PRETRAIN", "data.train=DIR/run"), ("is data.train",)),
}


@pytest.mark.parametrize("name", ROWS)
def test_folders_that_no_training_begins_in(name, tiny_file, tmp_path):
    row = ROWS[name]
    for file in row.files:
        (tmp_path / "run" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / file).write_text(file)
    pretrain = tmp_path / "pretrain.yaml"
    pretrain.write_text(f"output_dir: {tmp_path / 'run'}\ndata: {{train: {tmp_path}/a, val: {tmp_path}/b}}\n")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    names = {"CONFIG": str(tiny_file), "PRETRAIN": str(pretrain)}
    run(*[names.get(word, word.replace("DIR", str(tmp_path))) for word in row.arguments]).assert_error(*row.words)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before
