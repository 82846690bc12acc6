"""The shipped recipes on real photographs, and what the README promises of them. Minutes long: `make test-all`."""

import json
import math

import pytest
from conftest import ROOT

from detection import load_config
from detection.checkpoint import read_checkpoint
from detection.data.synthetic.demo import make_demo_dataset
from detection.engine.train_detector import dry_run, run_training
from detection.evaluation.score import score_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400), pytest.mark.numeric]


BY_HEART = [
    "train.minutes=6",
    "train.ema=0.98",
    "train.eval_every=100",
    "data.progressive=[]",
    "data.workers=0",
    "optim.weight_decay=0",
    "data.augment={horizontal_flip: 0}",
]


def first_images(source, target, count):
    """The annotation file cut to its first images; the categories stay."""
    content = json.loads(source.read_text())
    content["images"] = content["images"][:count]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    target.write_text(json.dumps(content))
    return target


def pointed_at(images, train, val):
    return [
        f"data.train.images={images}",
        f"data.train.annotations={train}",
        f"data.val.images={images}",
        f"data.val.annotations={val}",
    ]


@pytest.mark.parametrize("name", ["retina_ghost", "faster_rcnn_ghost"])
def test_the_papers_recipe_on_coco_images(shared_data, tmp_path, name):
    """Full size, official ids 1-90 with gaps; evaluated on official annotations with crowd and true areas."""
    coco128, mini = shared_data / "coco128", shared_data / "coco_mini"
    train = first_images(coco128 / "train_cocoids.json", tmp_path / "train.json", 8)
    val = first_images(coco128 / "val_cocoids.json", tmp_path / "val.json", 4)
    data = pointed_at(coco128 / "images", train, val)
    overrides = [*data, f"output_dir={tmp_path / 'run'}", "data.batch_size=2", "data.workers=1", "train.epochs=1"]
    config = load_config(ROOT / "configs" / f"{name}.yaml", overrides)
    assert "dry run: nothing was written" in dry_run(config)
    assert run_training(config)
    content = read_checkpoint(tmp_path / "run" / "last.pt")
    assert content["progress"]["step"] == 4 and len(content["classes"]["names"]) == 80
    assert content["classes"]["ids"][-1] == 90
    official = first_images(mini / "val.json", tmp_path / "mini.json", 8)
    evaluation = score_checkpoint(
        tmp_path / "run" / "last.pt",
        annotations=str(official),
        images=str(mini / "images"),
        predictions_file=str(tmp_path / "p.json"),
    )
    assert 0 <= evaluation.numbers["AP"] < 0.2 and math.isfinite(evaluation.numbers["APl"])


def test_the_small_recipe_reaches_its_ap_on_bccd(shared_data, tmp_path):
    """README: from scratch, in the recipe's own fourteen minutes on two cores."""
    bccd = shared_data / "bccd"
    data = pointed_at(bccd / "images", bccd / "train.json", bccd / "val.json")
    config = load_config(ROOT / "configs" / "retina_ghost_320.yaml", [*data, f"output_dir={tmp_path / 'run'}"])
    assert config.train.minutes is not None and config.train.minutes <= 15
    assert run_training(config)
    numbers = read_checkpoint(tmp_path / "run" / "best.pt")["numbers"]
    assert numbers["AP"] >= 0.48 and numbers["AP50"] >= 0.82


@pytest.mark.parametrize("name, epochs, least", [("bccd", 5, 0.35), ("cards", 6, 0.10), ("person", 1, 0.005)])
def test_ghostdet_learns_in_a_few_epochs(shared_data, tmp_path, name, epochs, least):
    """docs/ghostdet.md, a fifth of the steps. Not in minutes: a loaded machine makes fewer steps in them."""
    folder = shared_data / name
    data = pointed_at(folder / "images", folder / "train.json", folder / "val.json")
    short = ["train.minutes=null", f"train.epochs={epochs}", "train.eval_every=99", "train.ema=0.98"]
    short.append("data.progressive=[[0.5,192],[0.8,256]]")
    config = load_config(ROOT / "configs" / "ghostdet_small.yaml", [*data, *short, f"output_dir={tmp_path / 'run'}"])
    assert run_training(config)
    assert read_checkpoint(tmp_path / "run" / "best.pt")["numbers"]["AP50"] >= least


def test_ghostdet_learns_sixteen_images_by_heart(shared_data, tmp_path):
    """Assignment and losses can learn 80 classes: AP of at least 0.9 on the images of the training themselves."""
    coco128 = shared_data / "coco128"
    images = first_images(coco128 / "train_cocoids.json", tmp_path / "sixteen.json", 16)
    config = load_config(
        ROOT / "configs" / "ghostdet_small.yaml",
        [*pointed_at(coco128 / "images", images, images), *BY_HEART, f"output_dir={tmp_path / 'run'}"],
    )
    assert run_training(config)
    content = read_checkpoint(tmp_path / "run" / "best.pt")
    assert len(content["classes"]["names"]) == 80 and content["numbers"]["AP"] >= 0.9


def test_the_demo_reaches_its_ap50(tmp_path):
    """`make demo`, without its installation and images."""
    paths = make_demo_dataset(tmp_path / "demo")
    data = pointed_at(paths["images"], paths["train"], paths["val"])
    assert run_training(load_config(ROOT / "configs" / "demo.yaml", [*data, f"output_dir={tmp_path / 'run'}"]))
    assert read_checkpoint(tmp_path / "run" / "best.pt")["numbers"]["AP50"] >= 0.80
