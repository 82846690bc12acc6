"""Costs of whole detectors, their tables, and tools/benchmark.py."""

import csv
import shutil
from pathlib import Path

import cost_tables as tables
import pytest
import torch
from conftest import ROOT, assert_clear_error
from torchvision.models import detection as tv

from backbones.cost import measure_cost
from detection import UserError, build_model, load_config
from detection.benchmark.cost_report import CostRow, format_rows, parse_size
from detection.benchmark.detector_cost import detector_costs, network_costs

SMALL = "configs/retina_ghost_320.yaml"
TWO_STAGE = "configs/faster_rcnn_ghost.yaml"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("build", "weights"),
    [
        (tv.retinanet_resnet50_fpn, tv.RetinaNet_ResNet50_FPN_Weights.COCO_V1),
        (tv.fasterrcnn_resnet50_fpn, tv.FasterRCNN_ResNet50_FPN_Weights.COCO_V1),
    ],
)
def test_multiply_adds_match_torchvision(build, weights):
    """torchvision counts at 800x800 and, for Faster R-CNN, 1000 proposals."""
    with torch.device("meta"):
        model = build(weights=None, weights_backbone=None)
    rows = {row.part: row for row in detector_costs("x", model, (800, 800))}
    assert rows["total"].macs / 1e9 == pytest.approx(weights.meta["_ops"], abs=0.006)


@pytest.mark.parametrize("config", [SMALL, TWO_STAGE])
def test_parts_add_up_to_the_detector(config):
    *parts, total = network_costs(config, (64, 96), num_classes=3)
    assert [row.part for row in parts] == ["backbone", "neck", "head"] and total.part == "total"
    for field in ("parameters", "macs", "activations", "memory"):
        assert sum(getattr(row, field) for row in parts) == getattr(total, field) > 0
    with torch.device("meta"):
        model = build_model(load_config(config), 3)
        features = model.backbone.body.eval()
        backbone = measure_cost(features, torch.zeros(1, 3, 64, 96))[""]
    assert total.parameters == sum(p.numel() for p in model.parameters())
    assert (parts[0].parameters, parts[0].macs) == (backbone.parameters, backbone.macs)


def test_second_stage_is_counted_for_1000_proposals():
    rows = {row.part: row for row in network_costs(TWO_STAGE, (64, 64), num_classes=3, layers=True)}
    assert rows["head.box_head.fc6"].macs == 1000 * 7 * 7 * 256 * 1024
    assert rows["head.box_predictor.cls_score"].macs == 1000 * 1024 * 4


def test_cost_grows_with_the_padded_image():
    sizes = ((128, 128), (100, 97), (256, 128))
    small, padded, large = (network_costs(SMALL, size)[-1] for size in sizes)
    assert padded == small and padded.size == (128, 128)
    assert large.macs == pytest.approx(2 * small.macs, rel=0.01)
    assert large.memory == pytest.approx(2 * small.memory, rel=0.02)


def test_neck_and_head_dominate_the_cost():
    """At 320 px GhostNet costs about 0.3 GMAC, a 256-channel RetinaNet neck and head fifteen."""
    backbone, neck, head, _ = network_costs("configs/retina_ghost.yaml", (320, 320))
    assert 0.2e9 < backbone.macs < 0.35e9
    assert 14.5e9 < neck.macs + head.macs < 15.5e9


def test_sizes_and_weights_come_from_the_config(tmp_path):
    path = tmp_path / "mine.yaml"
    text = (ROOT / SMALL).read_text().replace("weights: null", "weights: elsewhere.pth")
    path.write_text(text.replace("short_side: 320", "short_side: 150"))
    assert network_costs(str(path))[0].size == (160, 320)


def test_backbone_with_a_width_and_layers():
    (row,) = network_costs("ghostnet@0.5")
    assert (row.part, row.size, row.parameters) == ("backbone", (224, 224), 651_252)
    rows = network_costs("ghostnet@0.5", (64, 64), layers=True)
    layers = rows[1:]
    assert "blocks.0.0.ghost1.primary_conv.0" in [row.part for row in layers]
    assert sum(row.macs for row in layers) == rows[0].macs
    assert sum(row.parameters for row in layers) == rows[0].parameters
    names = [row.part for row in network_costs(SMALL, (64, 64), layers=True)]
    assert "backbone.blocks.0.0.ghost1.primary_conv.0" in names
    assert any(name.startswith("neck.layer_blocks.") for name in names)
    assert any(name.startswith("head.classification_head.") for name in names)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("ghostnett", "did you mean 'ghostnet'"),
        ("ghostnet@wide", "width 'wide' is not a number"),
        ("ghostnet@0", "width must be positive"),
        ("configs/retina_gost.yaml", "does not exist"),
    ],
)
def test_mistakes(target, message):
    with pytest.raises(UserError, match=message):
        network_costs(target)


def test_image_too_small_for_the_network():
    class Deep(torch.nn.Module):
        def forward(self, images):
            return torch.nn.functional.max_pool2d(images, 64)

    with torch.device("meta"):
        model = torch.nn.Module()
        model.backbone, model.head = Deep(), torch.nn.Identity()
    with pytest.raises(UserError, match="an image of 32x32 pixels is too small for deep"):
        detector_costs("deep", model, (32, 32))


# ---- formats


@pytest.mark.parametrize(("text", "size"), [("320", (320, 320)), ("800x1333", (800, 1333)), ("1", (1, 1))])
def test_parse_size(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "320x0", "800x", "x800", "-3", "3.5", "800x1333x3", "wide", "123456"])
def test_parse_size_errors(text):
    with pytest.raises(UserError, match="expected: a side, like 320, or HEIGHTxWIDTH"):
        parse_size(text)


def test_formats():
    rows = [CostRow("net, small", (32, 64), "total", 1_234_567, 2_345_678_901, 3_456_789, 4_567_890)]
    text = format_rows(rows, "text").splitlines()
    assert len(text) == 2 and text[1].split()[-4:] == ["1.235", "2.346", "3.46", "4.6"]
    assert len(text[0]) == len(text[1])
    layer = CostRow("net", (1, 1), "conv", 432, 2_654_208, 98_304, 0)
    assert format_rows([layer], "text").split()[-4:] == ["0.000432", "0.002654", "0.09830", "0.0"]
    markdown = format_rows(rows, "markdown").splitlines()
    assert markdown[1].startswith("| --- | --- | --- | ---: |")
    assert markdown[2] == "| net, small | 32x64 | total | 1.235 | 2.346 | 3.46 | 4.6 |"
    (found,) = csv.DictReader(format_rows(rows, "csv").splitlines())
    assert found["network"] == "net, small" and found["macs"] == "2345678901" and found["memory_bytes"] == "4567890"


# ---- tables


def documents() -> dict[str, str]:
    return {file: (ROOT / file).read_text() for file in tables.FILES}


def test_documents_hold_every_table():
    text = documents()
    assert tables.table_names(text["docs/costs.md"], "docs/costs.md") == ["ghostnet", "classics", "detectors"]


def test_a_row_of_each_kind_is_up_to_date():
    text = documents()["docs/costs.md"]
    row = tables._compare("Ghost-VGG-16, s=5, d=3", lambda: tables.ghost_vgg16(ratio=5), 32, "3.3", "65")
    for cells in (row, tables._detector(SMALL, (320, 320))):
        assert f"| {' | '.join(cells)} |" in text, "run `make tables`"


@pytest.mark.slow
def test_all_tables_are_up_to_date(tmp_path):
    for file in tables.FILES:
        shutil.copy(ROOT / file, tmp_path / Path(file).name)
    lines = tables.update_tables([str(tmp_path / Path(file).name) for file in tables.FILES])
    assert len(lines) >= 3
    assert not [line for line in lines if line.endswith("updated")], "run `make tables`"


def test_update_replaces_what_lies_between_the_markers(tmp_path, monkeypatch):
    monkeypatch.setitem(tables.TABLES, "ghostnet", lambda: "| new |")
    path = tmp_path / "x.md"
    path.write_text("before\n<!-- table:ghostnet -->\n| old |\n| old |\n<!-- /table -->\nafter\n")
    assert tables.update_tables([str(path)]) == [f"{path}: table ghostnet updated"]
    assert path.read_text() == "before\n<!-- table:ghostnet -->\n| new |\n<!-- /table -->\nafter\n"
    assert tables.update_tables([str(path)]) == [f"{path}: table ghostnet unchanged"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table:ghostnet -->\n| a |\n", "is not closed"),
        ("<!-- table:gostnet -->\n<!-- /table -->\n", "there is no table 'gostnet'"),
        ("<!-- table:ghostnet -->\n<!-- table:classics -->\n<!-- /table -->\n", "is not closed"),
    ],
)
def test_broken_markers(tmp_path, text, message):
    (tmp_path / "x.md").write_text(text)
    with pytest.raises(UserError, match=message):
        tables.update_tables([str(tmp_path / "x.md")])
    assert (tmp_path / "x.md").read_text() == text
    with pytest.raises(UserError, match="does not exist"):
        tables.update_tables([str(tmp_path / "absent.md")])


# ---- the tool


def test_tool(tool, tmp_path):
    done = tool("benchmark", "--cost", SMALL, "ghostnet@0.5", "--size", "64x96")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[2] for line in lines[1:]] == ["backbone", "neck", "head", "total", "backbone"]
    assert {line[1] for line in lines[1:]} == {"64x96"}
    out = tmp_path / "costs.csv"
    done = tool("benchmark", "--cost", "ghostnet@0.5", "--format", "csv", "--out", out)
    assert done.returncode == 0 and str(out) in done.stdout, done.stderr
    assert out.read_text().splitlines()[1].startswith("ghostnet@0.5,224,224,backbone,651252,")


def test_tool_mistakes(tool, tmp_path):
    assert_clear_error(tool("benchmark", "--cost", "ghostnett"), "unknown backbone 'ghostnett'", "did you mean")
    assert_clear_error(tool("benchmark", "--cost", "ghostnet", "--size", "0x3"), "size '0x3'")
    done = tool("benchmark", "--cost", "ghostnet@0.5", "--out", tmp_path / "no" / "x")
    assert_clear_error(done, "cannot be written")
    done = tool("benchmark", "--size", "320")
    assert done.returncode == 2 and "name a NETWORK to be timed, or one of --peers --cost" in done.stderr
