"""`key=value` on the command line: what it changes besides its key, and how its value is read."""

import shlex
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, tiny_raw, write_coco
from small_sets import write_voc, write_yolo

from detection import UserError, load_config
from detection.config import DetectionConfig
from detection.config_io import read_config, save_config
from detection.data.load_split import read_split
from detection.data.prepare.convert import convert_data
from detection.pretraining.classification_config import ClassificationConfig

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PRETRAIN = [*sorted((ROOT / "configs" / "pretrain").glob("*.yaml")), ROOT / "configs" / "zoo" / "ghostnet.yaml"]
TIMED = ROOT / "configs" / "retina_ghost_320.yaml"


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Format -> annotations to train and to validate on."""
    root = tmp_path_factory.mktemp("sets")
    coco = write_coco(root / "coco", images=2)
    yolo = write_yolo(root) / "data.yaml"
    voc = write_voc(root)
    (voc / "ImageSets" / "Main" / "val.txt").write_text("b\n")
    return {"coco": (coco, coco), "yolo": (yolo, yolo), "voc": (voc, voc)}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
@pytest.mark.parametrize("kind", ["coco", "yolo", "voc"])
def test_annotations_are_enough_for_every_config(sets, path, kind):
    data = load_config(path, [f"data.{s}.annotations={a}" for s, a in zip(("train", "val"), sets[kind], strict=True)])
    for split in ("train", "val"):
        assert read_split(data.data, split).format == kind


def test_other_annotations_drop_what_described_the_earlier_ones(tmp_path):
    raw = tiny_raw(tmp_path, tmp_path / "run")
    raw["data"]["train"] = {"annotations": "a.json", "images": "images", "format": "coco", "split": "val"}
    raw["data"]["val"] = dict(raw["data"]["train"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    overrides = ["data.train.images=kept", "data.train.annotations=b.yaml"]
    for config in (
        load_config(tmp_path / "config.yaml", overrides),
        load_config(tmp_path / "config.yaml", overrides[::-1]),
        load_config(tmp_path / "config.yaml").with_overrides(overrides),
    ):
        assert config.data.train.model_dump() == {
            "annotations": "b.yaml",
            "images": "kept",
            "format": "auto",
            "split": None,
            "complete_classes": None,
            "weight": 1.0,
        }
        assert config.data.val.model_dump() == raw["data"]["val"]  # not named, not changed
    moved = load_config(tmp_path / "config.yaml", ["data.train.images=moved"]).data.train
    assert (moved.annotations, moved.images, moved.format) == ("a.json", "moved", "coco")


def test_entries_of_a_list_are_overridden_by_their_place(tmp_path):
    raw = tiny_raw(tmp_path, tmp_path / "run")
    described = {"images": "images", "complete_classes": ["a"], "weight": 2.0}
    raw["data"]["train"] = [{"annotations": "a.json"}, {"annotations": "b.json", **described}]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    first, second = load_config(path, ["data.train.0.images=2026", "data.train.1.annotations=c.json"]).data.train
    assert (first.annotations, first.images) == ("a.json", "2026")
    assert (second.annotations, second.images, second.complete_classes, second.weight) == ("c.json", None, None, 2)
    assert load_config(path, ["data.train={annotations: d.json}"]).data.train.annotations == "d.json"
    one = load_config(path, ["data.train=[{annotations: d.json}]"])
    assert [source.annotations for source in one.data.train_sources()] == ["d.json"]
    save_config(one, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == one
    for override, words in (
        ("data.train.annotations=d.json", r"data\.train is a list of 2; name one of its entries \(data\.train\.0, …\)"),
        ("data.train.2.annotations=d.json", "is a list of 2"),
        ("data.train=[]", r"data\.train: list should have at least 1 item"),
        (
            "data.train.1.weight=0",
            r"command line \(data\.train\.1\.weight=0\): data\.train\.1\.weight: .*greater than 0",
        ),
        ("data.train.1.wieght=1", r"unknown key 'data\.train\.1\.wieght' \(did you mean 'data\.train\.1\.weight'\?\)"),
    ):
        with pytest.raises(UserError, match=words):
            load_config(path, [override])


def test_a_yaml_alias_does_not_tie_two_places_together(tmp_path):
    text = yaml.safe_dump(tiny_raw(tmp_path, tmp_path / "run"))
    assert "&id001" in text and "*id001" in text  # train and val
    (tmp_path / "config.yaml").write_text(text)
    data = load_config(tmp_path / "config.yaml", ["data.val.annotations=other.json"]).data
    assert data.val.annotations == "other.json" and data.train.annotations == str(tmp_path / "annotations.json")


@pytest.mark.parametrize(
    ("schema", "path"), [(DetectionConfig, p) for p in CONFIGS] + [(ClassificationConfig, p) for p in PRETRAIN]
)
def test_the_budget_that_is_named_counts(schema, path):
    for load in (
        lambda override: read_config(schema, path, [override]),
        lambda o: read_config(schema, path).with_overrides([o]),
    ):
        train = load("train.epochs=3").train
        assert (train.epochs, train.minutes) == (3, None)
        assert load("train.minutes=2").train.minutes == 2


def test_both_budgets_are_one_too_many():
    with pytest.raises(UserError, match=r"train\.epochs=3 and train\.minutes=2: both say how long to train"):
        load_config(TIMED, ["train.epochs=3", "train.minutes=2"])
    # As docs and own scripts said before: null is no budget.
    for overrides in (["train.minutes=null", "train.epochs=3"], ["train.epochs=3", "train.minutes=null"]):
        train = load_config(TIMED, overrides).train
        assert (train.epochs, train.minutes) == (3, None)
    assert load_config(TIMED, ["train.ema=0"]).train.minutes == 14


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("output_dir=2026", "2026"),
        ("output_dir=2024-02-30", "2024-02-30"),
        ("output_dir=a: b #1/[x]", "a: b #1/[x]"),
        ("output_dir='null'", "null"),
        ("train.amp=off", "off"),
        ("train.wandb=1e3", "1e3"),
        ("train.wandb=null", None),
        ("model.backbone.weights=*.pth", "*.pth"),
        ("data.multi_scale=[64, 96]", [64, 96]),
        ("data.classes={thing: [a, b]}", {"thing": ["a", "b"]}),
        ("model.ghostify={parts: [neck]}", ["neck"]),
    ],
)
def test_how_a_value_is_read(override, value):
    found = load_config(TIMED, [override])
    for name in override.partition("=")[0].split("."):
        found = getattr(found, name)
    assert getattr(found, "parts", found) == value


@pytest.mark.parametrize("to", ["coco", "voc", "yolo"])
@pytest.mark.parametrize("transfer", ["copy", "none"])
def test_what_convert_data_prints_is_what_a_config_takes(sets, tmp_path, to, transfer):
    if (to, transfer) == ("yolo", "none"):
        pytest.skip("YOLO finds labels by the images' places")
    out = tmp_path / "my set #1"
    report = convert_data([f"{s}={sets['coco'][0]}" for s in ("train", "val", "test")], to, out, transfer=transfer)
    said = report.partition("in a config:\n")[2].partition("\n\nto evaluate on test, after ghostdet evaluate FILE:\n")
    for path in CONFIGS[:2] + CONFIGS[-2:]:
        config = load_config(path, shlex.split(said[0]))
        assert [read_split(config.data, split).format for split in ("train", "val")] == [to, to]
        index = read_split(config.with_overrides(shlex.split(said[2])).data, "val", alone=True)
        assert "test" in index.source and len(index) == 2


def test_the_home_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = "output_dir: ~/run\nmodel: {backbone: {weights: ~/w.pth}}\ndata:\n  train: {annotations: ~/a.json}\n"
    (tmp_path / "config.yaml").write_text(f"{text}  val: {{annotations: ~/b.json, images: ~/c}}\n")
    overridden = ["output_dir=~/run", "model.backbone.weights=~/w.pth", "data.train.annotations=~/a.json"]
    overridden += ["data.val.annotations=~/b.json", "data.val.images=~/c"]
    for config in (load_config(tmp_path / "config.yaml"), load_config(TIMED, overridden)):
        found = [config.output_dir, config.model.backbone.weights, config.data.train.annotations]
        found += [config.data.val.annotations, config.data.val.images]
        assert found == [str(tmp_path / name) for name in ("run", "w.pth", "a.json", "b.json", "c")]
    assert load_config(TIMED, ["model.backbone.weights=timm"]).model.backbone.weights == "timm"
    teacher = "teacher={name: a, weights: ~/t.pth}"
    config = read_config(
        ClassificationConfig, PRETRAIN[0], ["data.train=~/a", "data.val=~/b", "model.weights=~/w", teacher]
    )
    assert config.teacher is not None
    found = [config.data.train, config.data.val, config.model.weights, config.teacher.weights]
    assert found == [str(tmp_path / name) for name in ("a", "b", "w", "t.pth")]
