"""tools/dev/ghostdet_ablation.py still trains each of its variants, and each differs from what is shipped."""

import json
import re

import pytest
from conftest import ROOT

PROGRAM = "dev/ghostdet_ablation"
"""As seen from tools/."""
CHOICES = re.findall(
    r"^@choice\ndef (\w+)", (ROOT / "tools" / "dev" / "ghostdet_ablation.py").read_text(), re.MULTILINE
)
TINY = [
    "device=cpu",
    "model.backbone.width=0.5",
    "model.fpn_channels=32",
    "data.short_side=96",
    "data.long_side=96",
    "data.progressive=[]",
    "data.workers=0",
    "train.minutes=null",
    "train.epochs=2",
    "train.report=false",
]


def last_loss(tool, command, coco_set, folder):
    sources = [f"data.{split}.images={coco_set / 'images'}" for split in ("train", "val")]
    sources += [f"data.{split}.annotations={coco_set / 'annotations.json'}" for split in ("train", "val")]
    done = tool(*command, ROOT / "configs" / "ghostdet_small.yaml", *TINY, *sources, f"output_dir={folder}")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line][-1]


@pytest.mark.numeric
@pytest.mark.slow
def test_each_choice_undone_is_another_training(tool, coco_set, tmp_path):
    losses = {"shipped": last_loss(tool, ["train"], coco_set, tmp_path / "shipped")}
    for name in CHOICES:
        losses[name] = last_loss(tool, [PROGRAM, name], coco_set, tmp_path / name)
    assert len(CHOICES) == 9 and len(set(losses.values())) == 10, losses


def test_its_help_names_all_choices(tool):
    done = tool(PROGRAM, "--help")
    assert done.returncode == 0 and all(name in done.stdout for name in CHOICES)
