"""From a RetinaNet's raw outputs to detections: as torchvision does it, in less time."""

from dataclasses import replace

import pytest
import torch
from conftest import run_seed
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import batched_nms

from detection.config_io import parse_config
from detection.models.build import build_model
from detection.models.postprocess import batched_nms_topk

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def network():
    source = {"images": "none", "annotations": "none"}
    raw = {
        "output_dir": "none",
        "model": {"backbone": {"width": 0.5}, "fpn_channels": 16, "head_channels": 16, "head_depth": 1},
        "data": {"train": source, "val": source},
    }
    return build_model(parse_config(raw, "test"), 7).eval()


def raw_outputs(network, spread, bias, shape=(96, 160), count=2):
    """Random logits and box deltas on the network's anchors, as forward splits them, for two images of one batch."""
    generator = torch.Generator().manual_seed(run_seed())
    images = torch.zeros(count, 3, *shape)
    features = list(network.backbone(images).values())
    lengths = [feature.shape[2] * feature.shape[3] * 9 for feature in features]
    sizes = [(shape[0], shape[1] - 30 * i) for i in range(count)]
    anchors = network.anchor_generator(ImageList(images, sizes), features)
    total = sum(lengths)
    outputs = {
        "cls_logits": torch.randn(count, total, 7, generator=generator) * spread + bias,
        "bbox_regression": torch.randn(count, total, 4, generator=generator) * 0.4,
    }
    return (
        {name: list(output.split(lengths, dim=1)) for name, output in outputs.items()},
        [list(a.split(lengths)) for a in anchors],
        sizes,
    )


@pytest.mark.parametrize(
    ("spread", "bias", "threshold", "limit"),
    [
        (1.0, -4.0, 0.05, 100),  # thousands of candidates, of the finest level more than its 1000
        (1.0, -4.0, 0.3, 100),  # a few
        (1.0, -4.0, 0.05, 5000),  # all of them are wanted
        (1.0, -4.0, 0.05, 3),
        (1.0, -9.0, 0.5, 100),  # nothing
        (0.1, 0.0, 0.0, 100),  # no threshold
        (1.0, 0.0, 1.0, 100),
    ],
)
@torch.no_grad()
def test_as_torchvision(network, spread, bias, threshold, limit):
    spec = replace(network.postprocess_spec, score_threshold=threshold, max_detections=limit)
    network.postprocess_spec = spec
    # What torchvision's method reads.
    network.score_thresh, network.nms_thresh = spec.score_threshold, spec.nms_threshold
    network.topk_candidates, network.detections_per_img = spec.pre_nms_top_k, spec.max_detections
    outputs, anchors, sizes = raw_outputs(network, spread, bias)
    expected = RetinaNet.postprocess_detections(network, outputs, anchors, sizes)
    found = network.postprocess_detections(outputs, anchors, sizes)
    assert len(found) == 2
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours["scores"], theirs["scores"], atol=1e-6, rtol=0)
        assert torch.equal(ours["labels"], theirs["labels"] + 1)
        torch.testing.assert_close(ours["boxes"], theirs["boxes"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("count", [1, 7, 50, 1000])
def test_the_best_of_nms(count):
    generator = torch.Generator().manual_seed(run_seed(1))
    corners = torch.rand(800, 2, generator=generator) * 200
    boxes = torch.cat([corners, corners + 5 + torch.rand(800, 2, generator=generator) * 60], 1)
    scores = torch.rand(800, generator=generator)
    labels = torch.randint(0, 4, (800,), generator=generator)
    expected = batched_nms(boxes, scores, labels, 0.5)
    assert 100 < len(expected) < 800
    assert torch.equal(batched_nms_topk(boxes, scores, labels, 0.5, count), expected[:count])


def test_the_best_of_identical_boxes():
    """All of a class are one object: all candidates have to be looked at for the second class's."""
    boxes = torch.tensor([[10.0, 10.0, 50.0, 50.0]]).repeat(501, 1)
    scores = torch.linspace(0.9, 0.1, 501)
    labels = torch.tensor([0] * 500 + [1])
    assert batched_nms_topk(boxes, scores, labels, 0.5, 5).tolist() == [0, 500]
