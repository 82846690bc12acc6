"""The schema, and the shipped configs."""

from pathlib import Path

import pytest
import torch
import yaml

from detection import UserError, build_model, load_config
from detection.config import DetectionConfig
from detection.config_check import RENAMED, valid_keys
from detection.config_io import parse_config, save_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
GOOD = "output_dir: runs/x\ndata:\n  train: {images: i, annotations: a}\n  val: {images: i, annotations: a}\n"

LIST = """output_dir: runs/x
data:
  train:
    - annotations: a
    - {annotations: b, weight: 2}
  val: {annotations: a}
"""


@pytest.fixture()
def config_file(tmp_path):
    def write(text):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_build_and_run(path):
    config = load_config(path)
    assert config.output_dir == f"runs/{path.stem}"
    model = build_model(config, 3).train()
    targets = [{"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([3])}] * 2
    images = [torch.zeros(3, 64, 64, dtype=torch.uint8), torch.zeros(3, 48, 64, dtype=torch.uint8)]
    losses = model(images, targets)
    assert all(torch.isfinite(loss) for loss in losses.values())


@pytest.mark.parametrize("name", ["ghostdet_small", "ghostdet_nano"])
def test_weights_of_the_zoo_fit_the_configs_for_own_data(name):
    """A fine-tuning by configs/NAME.yaml starts from weights that configs/zoo/NAME.yaml trains."""
    zoo, own = (load_config(CONFIGS[0].parent / folder / f"{name}.yaml") for folder in ("zoo", ""))
    assert zoo.output_dir == f"runs/zoo/{name}" and zoo.model.backbone.weights is not None
    zoo.model.backbone.weights = None
    shapes = [{k: v.shape for k, v in build_model(config, 80).state_dict().items()} for config in (zoo, own)]
    assert shapes[0] == shapes[1]
    assert zoo.data.short_side == own.data.short_side == 320


def test_there_is_a_config_for_each_row_of_the_papers_table():
    names = {p.stem for p in CONFIGS}
    for detector in ("retina", "faster_rcnn"):
        for backbone in ("ghost", "mobilenet_v2", "mobilenet_v3_large"):
            assert f"{detector}_{backbone}" in names


def test_the_papers_recipe():
    retina, faster = (load_config(CONFIGS[0].with_name(f"{n}_ghost.yaml")) for n in ("retina", "faster_rcnn"))
    assert retina.model.backbone.width == faster.model.backbone.width == 1.1
    assert (retina.optim.lr, faster.optim.lr, retina.optim.lr_reference_batch) == (0.01, 0.02, 16)
    for config in (retina, faster):
        assert (config.data.short_side, config.data.long_side) == (800, 1333)
        assert (config.optim.name, config.train.epochs) == ("sgd", 12)
        assert [round(12 * m) for m in config.optim.milestones] == [8, 11]


def test_an_old_key_beside_its_new_one():
    """In what an earlier version wrote, the old name alone is taken as the new one."""
    raw = {**yaml.safe_load(GOOD), "optim": {"lr_batch": 4}}
    assert parse_config(raw, "best.pt").optim.lr_reference_batch == 4
    raw["optim"]["lr_reference_batch"] = 8
    message = r"best\.pt: 'optim\.lr_batch' is the old name of 'optim\.lr_reference_batch', which is there too: remove"
    with pytest.raises(UserError, match=message):
        parse_config(raw, "best.pt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "optimm: {}\n", r"config\.yaml, line 5: unknown key 'optimm' \(did you mean 'optim'\?\)"),
        (GOOD + "optim: {learning_rate: 1}\n", r"line 5: unknown key 'optim.learning_rate'"),
        (GOOD + "optim:\n  momentun: 1\n", r"line 6: unknown key 'optim.momentun' \(did you mean 'optim.momentum'\?\)"),
        (GOOD + "optim:\n  lr_batch: 1\n", r"line 6: .*'optim.lr_batch': it is called 'optim.lr_reference_batch' now"),
        (GOOD + "epochs: 3\n", r"unknown key 'epochs' \(did you mean 'train.epochs'\?\)"),
        (GOOD + "model: {num_classes: 80}\n", r"the number of classes comes from the data"),
        (GOOD + "optim: {lr: fast}\n", r"optim.lr: input should be a valid number.*'fast'"),
        (GOOD + "optim: {lr: -1}\n", r"optim.lr: input should be greater than 0, not -1"),
        (GOOD + "optim: {lr: .nan}\n", r"optim.lr: "),
        (GOOD + "model: {detector: yolo}\n", r"'retinanet', 'faster_rcnn' or 'ghostdet'"),
        (GOOD + "device: gpu\n", r"device: "),
        (GOOD + "model: {anchor_sizes: [8, 16]}\n", r"anchor_sizes: .*at least 5"),
        ("output_dir: x\n", r"key 'data' is missing"),
        (GOOD.replace("annotations: a", "annotation: a"), r"unknown key 'data.train.annotation'"),
        (
            LIST.replace("wei", "wie"),
            r"line 5: unknown key 'data.train.1.wieght' \(did you mean 'data.train.1.weight'\?\)",
        ),
        (LIST.replace("2", "-2"), r"line 5: data.train.1.weight: input should be greater than 0, not -2"),
        (LIST.replace("- annotations", "- image"), r"line 4: unknown key 'data.train.0.image'.*'data.train.0.images'"),
        (LIST.replace("- annotations", "- images"), r"key 'data.train.0.annotations' is missing"),
        ("- a\n- b\n", r"must hold keys and values"),
        ("a: [1\n", r"is not YAML: .*line 2"),
        ("", r"must hold keys and values"),
    ],
)
def test_mistakes_are_named(config_file, text, message):
    with pytest.raises(UserError, match=message):
        load_config(config_file(text))


def test_scale_and_sides_are_checked(config_file):
    path = config_file(GOOD)
    with pytest.raises(UserError, match=r"command line \(data.augment.scale=\[2, 1\]\).*low <= high"):
        load_config(path, ["data.augment.scale=[2, 1]"])
    with pytest.raises(UserError, match="is below short_side"):
        load_config(path, ["data.long_side=10"])
    for overrides, words in (
        (["data.progressive=[[0.5, 64], [0.2, 96]]"], "ascending shares"),
        (["data.progressive=[[0.5, 900]]"], "must not be above short_side"),
        (["data.progressive=[[0.5, 64]]", "data.multi_scale=[64]"], "leave one of them out"),
    ):
        with pytest.raises(UserError, match=words):
            load_config(path, overrides)
    assert load_config(path, ["data.progressive=[[0.5, 64], [0.7, 96]]"]).data.progressive == [(0.5, 64), (0.7, 96)]


def test_a_missing_file_suggests_the_nearest():
    with pytest.raises(UserError, match=r"retina_ghots\.yaml does not exist \(did you mean .*retina_ghost"):
        load_config(CONFIGS[0].with_name("retina_ghots.yaml"))


def test_overrides(config_file):
    path = config_file(GOOD)
    config = load_config(
        path,
        ["optim.lr=1e-3", "train.minutes=2.5", "model.backbone.weights=null", "data.train.images=a b/c=d", "seed=7"],
    )
    assert config.optim.lr == 1e-3 and config.train.minutes == 2.5 and config.seed == 7
    assert config.data.train.images == "a b/c=d"
    with pytest.raises(UserError, match=r"command line \(optim.lrr=1\): unknown key 'optim.lrr'"):
        load_config(path, ["optim.lrr=1"])
    with pytest.raises(UserError, match="not of the form key=value"):
        load_config(path, ["resume"])
    with pytest.raises(UserError, match="'output_dir' holds a value"):
        load_config(path, ["output_dir.x=1"])


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_renamed_keys(config_file, tmp_path, old, new):
    """An old key is an error of a user, and today's key where the toolkit wrote it."""
    with pytest.raises(UserError, match=rf"{old}=0\.5\): unknown key '{old}': it is called '{new}' now"):
        load_config(config_file(GOOD), [f"{old}=0.5"])
    raw = load_config(config_file(GOOD)).model_dump()
    *sections, name = new.split(".")
    place = raw
    for section in sections:
        place = place[section]
    place[old.rpartition(".")[2]] = 1
    del place[name]
    path = config_file(yaml.safe_dump(raw))
    with pytest.raises(UserError, match=rf"unknown key '{old}': it is called '{new}' now"):
        load_config(path)
    (tmp_path / "last.pt").touch()
    for config in (load_config(path, ["seed=3"]), parse_config(raw, "checkpoint")):
        value = config.model_dump()
        for section in new.split("."):
            value = value[section]
        assert value == 1
    assert name not in place


def test_saved_config_reads_back_equal(config_file, tmp_path):
    config = load_config(config_file(GOOD), ["optim.lr=0.3", "train.minutes=3"])
    save_config(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config
    assert parse_config(config.model_dump(), "x") == config


def test_keys_that_other_programs_set_exist():
    keys = set(valid_keys(DetectionConfig))
    for key in """output_dir seed device model.detector model.backbone.name model.backbone.width model.backbone.weights
        model.backbone.frozen_stages data.train.images data.train.annotations data.train.format data.val.images
        data.batch_size data.workers optim.name optim.lr optim.weight_decay train.epochs train.minutes train.amp
        train.ema train.accumulate train.eval_every""".split():
        assert key in keys


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_configs_have_no_yaml_surprises(path):
    # `off` is a boolean in YAML 1.1 unless quoted; the schema must have caught or read it as meant.
    raw = yaml.safe_load(path.read_text())
    assert raw.get("train", {}).get("amp", "off") in ("off", "bf16", "fp16")
