"""Configs, overrides and category lists that cannot be meant: one line each, before any work."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, tiny_raw, write_coco
from run_tool import run

BOMB = "a: &a {x: 1, y: 2, z: 3}\n" + "".join(
    f"{name}: &{name} {{{', '.join(f'k{i}: *{before}' for i in range(9))}}}\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.fixture()
def plain(tmp_path: Path) -> str:
    """The text of a config that is all right."""
    write_coco(tmp_path / "set", images=2)
    return yaml.safe_dump(tiny_raw(tmp_path / "set", tmp_path / "run"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, ("line", "more than 50000 keys and values")),
        (BOMB.replace("{k0: *", "{<<: *"), ("more than 50000 keys and values",)),
        ("x: &x [*x]\n", ("an alias stands inside what it refers to",)),
        ("x: &x {y: {z: *x}}\n", ("an alias stands inside what it refers to",)),
        ("x: " + "[" * 3000 + "]" * 3000 + "\n", ("nested more than 50 deep",)),
        ("x: " + "{a: " * 3000 + "\n", ("nested more than 50 deep",)),
        ("x:\n  " + "- " * 3000 + "\n", ("nested more than 50 deep",)),
        ("seed: 1\nseed: 2\n", ("line", "key 'seed' is there already in line", "remove one of them")),
        ("optim: {lr: 1, lr: 2}\n", ("key 'lr' is there already in line",)),
        ("x: !!python/object/apply:os.system [ls]\n", ("has the tag", "only plain values are read")),
        ("x: !!timestamp 2024-02-30\n", ("has the tag",)),
        ("x: 0x_\n", ("is not YAML",)),
        ("x: " + "1:" * 200 + "1.0\n", ("a number of",)),
        ("? [1]\n: 2\n", ("is not YAML", "unhashable key")),
        ("x: \x00\n", ("is not YAML", "#x0000")),
    ],
)
@pytest.mark.parametrize("tool", ["train", "check_data"])
def test_yaml_beyond_its_limits(tmp_path, tool, text, words):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    run(tool, path).assert_error("config.yaml", *words)
    if tool == "check_data":  # YOLO's data.yaml is read by the same reader
        (tmp_path / "data.yaml").write_text(f"train: images\nnames: [a]\n{text}")
        run("convert_data", tmp_path / "data.yaml", "--to", "coco", "--out", tmp_path / "out").assert_error(*words)
        assert not (tmp_path / "out").exists()


def test_a_yaml_of_100_mb(tmp_path):
    path = tmp_path / "config.yaml"
    with path.open("wb") as file:
        file.truncate(100 << 20)
    run("train", path).assert_error("config.yaml", "is too large", "104,857,600")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed=2026-13-45", ("seed", "valid integer")),
        ("seed=2024-02-30", ("seed", "valid integer")),
        ("seed=2024-02-20", ("seed", "valid integer")),
        ("seed=-1", ("seed", "greater than or equal to 0")),
        (f"seed={2**64}", ("seed", "less than")),
        ("seed=" + "1" * 300, ("seed", "less than")),
        ("seed=" + "1" * 5000, ("seed", "a number of 5000 digits")),
        ("train.epochs=" + "1" * 300, ("train.epochs", "less than")),
        ("train.minutes=1e300", ("train.minutes", "less than")),
        ("data.batch_size=10000000000000", ("data.batch_size", "less than")),
        ("data.classes=" + "[" * 3000, ("data.classes", "nested more than 50 deep")),
        ("data.classes=&a [*a]", ("data.classes", "an alias stands inside")),
        (f"data.classes={{{', '.join(['a: 1'] * 2)}}}", ("key 'a' is there already",)),
        ("train.epochs=1 train.minutes=1", ("both say how long to train",)),
        ('output_dir="a\\0b"', ("output_dir", "NUL character")),
        ("output_dir=''", ("output_dir", "the path is empty")),
        ("output_dir=" + "x" * 300, ("output_dir", "the path is too long", "300")),
        ("data.train.annotations=" + "a/" * 3000, ("data.train.annotations", "the path is too long")),
        ('data.train.images="\\0"', ("data.train.images", "NUL character")),
        ('data.val.annotations="\\uD800.json"', ("data.val.annotations", "no file system takes")),
        ("model.backbone.weights=" + "w" * 256, ("model.backbone.weights", "the path is too long")),
        ("output_dir=.", ("output_dir", "is or contains the working directory")),
        ("output_dir=/", ("output_dir", "contains data.train")),
        ("output_dir=~/", ("output_dir", "is or contains the working directory or the home folder")),
        ("output_dir=..", ("output_dir", "is or contains the working directory")),
        ("data.train.annotations=mine/tran.json", ("data.train.annotations", "mine/tran.json", "does not exist")),
        ("data.val.images=~/nowhere", ("data.val.images: folder /", "does not exist")),
        ("data.val.annotations=/dev/zero", ("data.val.annotations", "known format")),
        ("model.backbone.weights=nowhere.pth", ("model.backbone.weights", "nowhere.pth", "does not exist")),
        ("model.backbone.weights=/dev/zero", ("model.backbone.weights", "a device")),
    ],
)
def test_overrides_that_cannot_be_meant(plain, tmp_path, monkeypatch, override, words):
    # A working directory whose parent holds no data, wherever the checkout lies.
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    path = tmp_path / "config.yaml"
    path.write_text(plain)
    outcome = run("train", path, *(override.split(" ") if override.startswith("train.epochs=1 ") else [override]))
    outcome.assert_error(*words)
    assert len(outcome.err) < 700 and not (tmp_path / "run").exists()


def test_two_categories_of_one_name(trained, tmp_path):
    """Scored by name, one of the two would get all detections and the other none."""
    path = write_coco(tmp_path / "set", images=3)
    content = json.loads(path.read_text())
    content["categories"].append({"id": 99, "name": "disc"})
    path.write_text(json.dumps(content))
    words = ("annotations.json: categories 7, 99 have the same name 'disc'", "rename all but one")
    run("evaluate", trained / "best.pt", "--data", path).assert_error(*words)
    run("evaluate", "--predictions", trained / "predictions.json", "--data", path).assert_error(*words)
    run("convert_data", path, "--to", "voc", "--out", tmp_path / "out").assert_error(*words)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny_raw(tmp_path / "set", tmp_path / "run")))
    run("train", tmp_path / "config.yaml").assert_error(*words)
    found = run("check_data", path)
    assert found.code == 1 and "'disc': ids 7, 99" in found.out, found.out


def test_two_yolo_classes_of_one_name(tmp_path):
    from small_sets import write_yolo

    root = write_yolo(tmp_path)
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [a, a]\n")
    outcome = run("convert_data", root / "data.yaml", "--to", "coco", "--out", tmp_path / "out")
    outcome.assert_error("data.yaml", "categories 1, 2 have the same name 'a'")


NO_TORCH = """
import sys
sys.path[:0] = {paths}
from run_tool import run
for tool, arguments, words in {rows}:
    outcome = run(tool, *arguments)
    outcome.assert_error(*words)
    loaded = [name for name in ("torch", "torchvision") if name in sys.modules]
    assert not loaded, (tool, arguments, loaded)
"""


def test_a_mistaken_config_is_refused_before_torch_is_imported(plain, tmp_path):
    """Which takes ten seconds and 860 MB. All in one process of its own, as this one has imported it."""
    (tmp_path / "config.yaml").write_text(plain)
    (tmp_path / "pretrain.yaml").write_text(f"output_dir: {tmp_path}/run\ndata: {{train: nowhere, val: nowhere}}\n")
    config, pretrain = str(tmp_path / "config.yaml"), str(tmp_path / "pretrain.yaml")
    data = f"data.train={tmp_path}", f"data.val={tmp_path}"
    rows: list[tuple[str, list[str], tuple[str, ...]]] = [
        ("train", [], ("required: CONFIG\n", "python tools/train.py configs/")),
        ("pretrain", [], ("required: CONFIG\n", "python tools/pretrain.py configs/pretrain/")),
        ("browse", [], ("required: CONFIG\n", "python tools/browse.py configs/")),
        ("check_data", [], ("required: CONFIG|JSON|DIR\n", "python tools/check_data.py configs/")),
        ("train", ["train.epochs=3"], ("required: CONFIG (train.epochs=3 is an override)",)),
        ("pretrain", [pretrain], ("data.train: folder nowhere does not exist",)),
        ("pretrain", [pretrain, *data, "model.weights=no.pth"], ("model.weights: weights file no.pth",)),
        (
            "pretrain",
            [pretrain, *data, "teacher={name: a, weights: no.pth}"],
            ("teacher.weights: weights file no.pth",),
        ),
        ("browse", [config, "--checkpoint", "no.pt"], ("no.pt",)),
        ("browse", [config, "--split", "val", "data.val.annotations=no.json"], ("data.val.annotations",)),
    ]
    for tool in ("train", "browse", "check_data"):
        rows += [
            (tool, [config, "optim.lrr=1"], ("unknown key 'optim.lrr'",)),
            (tool, [config, "data.train.annotations=no.json"], ("data.train.annotations: annotation file no.json",)),
            (tool, [config, "data.train.annotations=no.yaml"], ("data.train.annotations: YAML file no.yaml",)),
            (tool, [config, "data.train.annotations=no/"], ("data.train.annotations: annotation file no ",)),
            (tool, [config, "data.train.images=no"], ("data.train.images: folder no does not exist",)),
        ]
        if tool != "browse":  # which builds no network of it
            rows.append(
                (tool, [config, "model.backbone.weights=no.pth"], ("model.backbone.weights: weights file no.pth",))
            )
    paths = [str(ROOT), str(ROOT / "tests" / "helpers"), str(ROOT / "tests" / "hostile")]
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH.format(paths=paths, rows=rows)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
