"""Anchor coverage compared with the anchors of the models, and the predicted memory of a training step."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from detection.config_io import parse_config
from detection.doctor.anchor_checks import DEFAULT_ANCHOR_CONFIG, AnchorConfig, best_anchor_ious, resize_boxes
from detection.doctor.memory_checks import predict_training_memory
from detection.models.build import build_model


@pytest.mark.parametrize("detector", ["retinanet", "faster_rcnn"])
@pytest.mark.parametrize("size", [(320, 240), (150, 333), (64, 64)])
def test_best_ious_match_the_anchors_of_the_model(detector, size):
    setting = AnchorConfig(detector, (16, 32, 64, 128, 256), 320, 320, "test")
    raw_config = {"output_dir": "x", "data": {"train": {"annotations": "a"}, "val": {"annotations": "a"}}}
    raw_config["model"] = {
        "detector": detector,
        "anchor_sizes": list(setting.anchor_sizes),
        "fpn_channels": 8,
        "head_channels": 8,
    }
    raw_config["model"]["backbone"] = {"width": 0.5}
    model = build_model(parse_config(raw_config, "test"), 2).eval()
    rng = np.random.default_rng(0)
    boxes = np.sort(rng.uniform(0, 1, (80, 2, 2)), axis=1).reshape(80, 4) * np.array(size * 2)
    sizes = np.tile([size], (80, 1))
    seen, frames = resize_boxes(boxes, sizes, setting)
    width, height = frames[0].astype(int).tolist()
    with torch.inference_mode():
        maps = list(model.backbone(torch.zeros(1, 3, height, width)).values())
        generator = model.anchor_generator if detector == "retinanet" else model.rpn.anchor_generator
        anchors = generator(ImageList(torch.zeros(1, 3, height, width), [(height, width)]), maps)[0]
    per_level = [m.shape[2] * m.shape[3] * n for m, n in zip(maps, generator.num_anchors_per_location(), strict=True)]
    expected = [box_iou(torch.tensor(seen), level.double()).amax(dim=1) for level in anchors.split(per_level)]
    np.testing.assert_allclose(best_anchor_ious(boxes, sizes, setting), torch.stack(expected, dim=1).numpy(), atol=1e-6)


@pytest.mark.slow
def test_memory_grows_with_the_batch_and_the_image():
    raw_config = {"output_dir": "x", "data": {"train": {"annotations": "a"}, "val": {"annotations": "a"}}}
    raw_config["data"] |= {"batch_size": 2, "short_side": 128, "long_side": 128}
    raw_config["model"] = {"backbone": {"width": 0.5}, "fpn_channels": 16, "head_channels": 16}
    config = parse_config(raw_config, "test")
    small = predict_training_memory(config, 3)
    assert small["total"] == small["weights"] + small["images"]
    large = predict_training_memory(config.with_overrides(["data.batch_size=8", "optim.name=adamw"]), 3)
    assert large["images"] == pytest.approx(4 * small["images"]) and large["weights"] > small["weights"]
    wide = predict_training_memory(config.with_overrides(["data.short_side=256", "data.long_side=256"]), 3)
    assert wide["images"] == pytest.approx(4 * small["images"], rel=0.05)


def test_input_sizes_are_multiples_of_32():
    assert DEFAULT_ANCHOR_CONFIG.resized(1.5).short_side == 480
    assert replace(DEFAULT_ANCHOR_CONFIG, short_side=800, long_side=1333).resized(0.5).long_side == 672
