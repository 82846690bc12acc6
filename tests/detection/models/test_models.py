"""Detectors: torchvision's protocol, labels, edge cases."""

import copy

import pytest
import torch
from conftest import run_seed
from detectors import small_config

from detection import UserError, build_model
from detection.config_io import parse_config
from detection.models.transform import NormalizeAndBatch

pytestmark = pytest.mark.numeric


def target(boxes=((8.0, 8, 40, 40),), labels=(1,)):
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }


@pytest.mark.parametrize("detector, most", [("retinanet", 5 * 3), ("ghostdet", 3), ("faster_rcnn", 3 * 5)])
def test_candidates_are_what_may_become_a_detection(detector, most):
    """Of each level of a RetinaNet, of an image of the others; a proposal of Faster R-CNN may be of any class."""
    raw = small_config(detector).model_dump()
    raw["eval"] |= {"score_threshold": 0.0, "nms_threshold": 1.0, "pre_nms_top_k": 3, "max_detections": 400}
    torch.manual_seed(run_seed())
    model = build_model(parse_config(raw, "test"), 5).eval()
    with torch.no_grad():
        (found,) = model([torch.rand(3, 96, 96)])
    assert 0 < len(found["boxes"]) <= most


@pytest.mark.parametrize("detector", ["retinanet", "faster_rcnn", "ghostdet"])
@pytest.mark.parametrize("backbone", ["ghostnet", "mobilenet_v2", "mobilenet_v3_large"])
def test_protocol(detector, backbone):
    model = build_model(small_config(detector, backbone), 5)
    images = [torch.rand(3, 64, 96), torch.randint(0, 256, (3, 70, 50), dtype=torch.uint8)]
    losses = model.train()(images, [target(labels=(5,)), target(boxes=(), labels=())])
    assert losses and all(loss.dim() == 0 and torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    unused = [n for n, p in model.named_parameters() if p.grad is None]
    assert not unused
    with torch.no_grad():
        found = model.eval()(images)
    for detections, image in zip(found, images, strict=True):
        assert set(detections) == {"boxes", "labels", "scores"}
        boxes = detections["boxes"]
        assert boxes.shape == (len(detections["scores"]), 4) and len(boxes) <= 100
        assert ((detections["labels"] >= 1) & (detections["labels"] <= 5)).all()
        assert (boxes[:, 2] <= image.shape[2]).all() and (boxes[:, 3] <= image.shape[1]).all()


@pytest.mark.parametrize(
    "detector, norm",
    [
        pytest.param("retinanet", "group", marks=pytest.mark.slow),
        ("retinanet", "batch"),
        pytest.param("faster_rcnn", "none", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("num_classes", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_learns_every_label(detector, norm, num_classes):
    """Also the first and the last label: the place where an off-by-one with the background would show.

    Four images, as the norms of a pyramid's top levels see one value of each: those of two alike images vary by
    noise alone.
    """
    model = build_model(
        small_config(detector, head_norm=norm, box_loss="giou", anchor_sizes=[16, 32, 64, 128, 256]), num_classes
    )
    images, targets = zip(*(coloured_boxes(num_classes, k) for k in range(4)), strict=True)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    steps = 120 if detector == "faster_rcnn" else 60  # two stages, of which the second waits for the first
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    model.train()
    for _ in range(steps):
        loss = sum(model(list(images), list(targets)).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    for module in model.modules():  # statistics of the last batch, as four images make poor running ones
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        model(list(images), list(targets))
        found = model.eval()(list(images))
    for detections, expected in zip(found, targets, strict=True):
        best = {}
        for box, label, score in zip(*(detections[name] for name in ("boxes", "labels", "scores")), strict=True):
            best.setdefault(int(label), (float(score), box))
        for label, corners in zip(expected["labels"].tolist(), expected["boxes"], strict=True):
            score, box = best[label]
            assert score > 0.3
            torch.testing.assert_close(box, corners, rtol=0, atol=8)


def coloured_boxes(count, k):
    """An image [3, 64, 128] with one box of each label, told apart by colour; where each lies depends on k."""
    image = torch.full((3, 64, 128), 110, dtype=torch.uint8)
    boxes = []
    for i in range(count):
        x, y = 4 + 40 * ((i + k) % 3) + 2 * k, (14, 22, 6, 18)[k]
        image[:, y : y + 40, x : x + 32] = 0
        image[i, y : y + 40, x : x + 32] = 255
        boxes.append((x, y, x + 32, y + 40))
    return image, target(boxes, range(1, count + 1))


def test_retinanet_has_no_logit_for_the_background():
    model = build_model(small_config(), 7)
    assert model.head.classification_head.cls_logits.out_channels == 7 * 9


def test_widths_depth_and_norm():
    model = build_model(small_config(fpn_channels=48, head_channels=24, head_depth=2, head_norm="group"), 2)
    tower = model.head.classification_head.conv
    assert len(tower) == 2 and tower[0][0].in_channels == 48 and tower[1][0].out_channels == 24
    assert isinstance(tower[0][1], torch.nn.GroupNorm)
    faster = build_model(small_config("faster_rcnn", fpn_channels=48, head_channels=64), 2)
    assert faster.roi_heads.box_head.fc6.out_features == 64
    assert faster.roi_heads.box_predictor.cls_score.out_features == 3


def test_p6_comes_from_c5_even_where_channels_are_equal():
    channels = 80  # C5 of GhostNet 0.5
    model = build_model(small_config(fpn_channels=channels), 2)
    seen = []
    model.backbone.fpn.extra_blocks.p6.register_forward_hook(lambda m, inputs, out: seen.append(inputs[0]))
    features = {}
    model.backbone.body.register_forward_hook(lambda m, i, out: features.update(out))
    with torch.no_grad():
        model.eval()([torch.rand(3, 64, 64)])
    assert torch.equal(seen[0], features["c5"])


def test_normalisation_is_the_backbones_and_padding_is_zero():
    transform = NormalizeAndBatch((0.5, 0.4, 0.3), (0.2, 0.25, 0.5), size_divisible=32)
    image = torch.randint(0, 256, (3, 20, 40), dtype=torch.uint8)
    batch, _ = transform([image, torch.zeros(3, 33, 10)])
    assert batch.tensors.shape == (2, 3, 64, 64) and batch.image_sizes == [(20, 40), (33, 10)]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.5, 0.4, 0.3), (0.2, 0.25, 0.5)))
    torch.testing.assert_close(batch.tensors[0, :, :20, :40], (image / 255 - mean) / std)
    assert (batch.tensors[0, :, 20:] == 0).all() and (batch.tensors[1, :, :, 10:] == 0).all()
    with pytest.raises(ValueError, match=r"must be \[3, H, W\]"):
        transform([torch.zeros(1, 8, 8)])


@pytest.mark.parametrize("detector", ["retinanet", "faster_rcnn", "ghostdet"])
def test_uint8_and_float_images_give_the_same(detector):
    model = build_model(small_config(detector), 3).eval()
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        a, b = model([image])[0], model([image / 255])[0]
    torch.testing.assert_close(a["boxes"], b["boxes"], rtol=1e-4, atol=1e-3)


def test_a_batch_gives_what_single_images_of_its_size_give():
    model = build_model(small_config(), 3).eval()
    images = [torch.rand(3, 64, 96) for _ in range(3)]
    with torch.no_grad():
        together = model(images)
        for image, expected in zip(images, together, strict=True):
            torch.testing.assert_close(model([image])[0]["scores"], expected["scores"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"backbone": {"name": "resnet5"}}, "unknown backbone 'resnet5'"),
        (
            {"backbone": {"weights": "nowhere.pth"}},
            r"model\.backbone\.weights: weights file nowhere\.pth does not exist",
        ),
    ],
)
def test_mistakes_are_user_errors(update, message):
    raw = small_config().model_dump()
    raw["model"]["backbone"].update(update["backbone"])
    with pytest.raises(UserError, match=message):
        build_model(parse_config(raw, "test"), 2)


def test_a_detector_needs_a_class():
    with pytest.raises(UserError, match="at least one class"):
        build_model(small_config(), 0)


def test_batch_norm_in_the_head_is_of_each_level_and_takes_a_single_value():
    """P6 and P7 of a 64-pixel image are 1x1: batch norm in training refuses those for a batch of one."""
    model = build_model(small_config(head_norm="batch"), 3).train()
    losses = model([torch.rand(3, 64, 64)], [target()])
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    norms = model.head.towers["cls"].norms[0]
    assert len(norms) == 5
    means = [norm.running_mean for norm in norms]
    assert not torch.equal(means[0], means[1])
    # The two levels of a single value used the running statistics and left them alone.
    assert [int(norm.num_batches_tracked) for norm in norms] == [1, 1, 1, 0, 0]


def test_a_tiny_first_image_does_not_spoil_a_faster_rcnn(tiny_config):
    """torchvision's RoIAlign guesses the pyramid's scales from the first image in its frame, and keeps them."""
    small_config = tiny_config.with_overrides(["model.detector=faster_rcnn", "eval.score_threshold=0"])
    torch.manual_seed(run_seed())
    model = build_model(small_config, 2).eval()
    fresh = copy.deepcopy(model)
    image = torch.randint(0, 256, (3, 96, 96), dtype=torch.uint8)
    with torch.no_grad():
        model([image[:, :41, :41]])
        (found,), (expected,) = model([image]), fresh([image])
    assert len(expected["boxes"]) and torch.equal(found["boxes"], expected["boxes"])
