"""GhostDet: assignment and losses against hand-worked cases, and the detector as a whole."""

import math

import pytest
import torch
from conftest import run_seed
from torch.nn import functional as F

from backbones import build_backbone
from detection.models.ghost_pan import BackboneWithPAN
from detection.models.ghostdet import GhostDet, boxes_of, points_of
from detection.models.postprocess_spec import PostprocessSpec
from detection.models.task_aligned import (
    Assignment,
    aligned_losses,
    assign,
    distribution_focal_loss,
    pad_targets,
    sides_of,
)

pytestmark = pytest.mark.numeric


def grid():
    """Four points of stride 8 in a 16 px square, and one of stride 16."""
    points = torch.tensor([[4.0, 4], [12, 4], [4, 12], [12, 12], [8, 8]])
    return points, torch.tensor([8.0, 8, 8, 8, 16])


def test_a_box_gets_the_points_that_score_and_place_it_best():
    points, strides = grid()
    boxes, labels, real = pad_targets([torch.tensor([[0.0, 0, 16, 16]])], [torch.tensor([1])])
    found = torch.tensor([[0.0, 0, 16, 16], [0, 0, 8, 16], [0, 0, 16, 16], [0, 0, 4, 4], [0, 0, 16, 12]])[None]
    scores = torch.tensor([[0.1, 0.5], [0.9, 0.9], [0.9, 0.8], [0.9, 0.9], [0.1, 0.7]])[None]
    target = assign(scores, found, points, strides, boxes, labels, real, candidates=3)
    # score * IoU^6: 0.5, 0.9 / 64, 0.8, 0.9 / 4096, 0.7 * 0.75^6 = 0.125
    assert target.positive.tolist() == [[True, False, True, False, True]]
    # The best metric stands for the best IoU, the others in proportion.
    expected = [0.5 / 0.8, 0, 1, 0, 0.7 * 0.75**6 / 0.8]
    torch.testing.assert_close(target.quality[0], torch.tensor(expected))
    torch.testing.assert_close(target.weight[0], torch.tensor(expected))
    assert target.labels[0][target.positive[0]].tolist() == [1, 1, 1]
    torch.testing.assert_close(target.boxes[0, 0], torch.tensor([0.0, 0, 16, 16]))


def test_a_point_that_two_boxes_want_takes_the_one_it_overlaps_more():
    points, strides = grid()
    boxes, labels, real = pad_targets([torch.tensor([[0.0, 0, 16, 16], [0, 0, 8, 8]])], [torch.tensor([0, 1])])
    found = torch.tensor([[0.0, 0, 8, 8]]).repeat(5, 1)[None]
    target = assign(torch.full((1, 5, 2), 0.5), found, points, strides, boxes, labels, real)
    assert target.labels[0].tolist()[:1] == [1] and target.positive[0].tolist() == [True] * 5
    # The second box has its centre 4 px from points 1, 2 and 3: not within it, nor within a cell; and the coarse
    # point (8, 8) lies within half a stride of its centre (4, 4).
    assert target.labels[0].tolist() == [1, 0, 0, 0, 1]


def test_a_box_finer_than_the_grid_still_gets_a_point_and_an_image_without_boxes_none():
    points, strides = grid()
    tiny = torch.tensor([[0.0, 0, 2, 2]])
    boxes, labels, real = pad_targets([tiny, torch.zeros(0, 4)], [torch.tensor([0]), torch.zeros(0, dtype=torch.int64)])
    found = torch.tensor([[0.0, 0, 8, 8]]).repeat(5, 1).expand(2, -1, -1)
    target = assign(torch.full((2, 5, 1), 0.5), found, points, strides, boxes, labels, real)
    assert target.positive[0].tolist() == [True, False, False, False, True]
    assert not target.positive[1].any() and target.quality[1].sum() == 0


def test_the_best_point_of_each_box_weighs_as_much_however_badly_it_is_found():
    """The first box is found well, the second by points whose boxes are far too large, the third not at all."""
    points, strides = points_of([(8, 8), (4, 4), (2, 2)], torch.device("cpu"))
    truth = torch.tensor([[0.0, 0, 32, 32], [40, 40, 48, 48], [40, 8, 44, 12]])
    boxes, labels, real = pad_targets([truth], [torch.tensor([0, 0, 0])])
    half = torch.where(points[:, :1] < 36, 16.0, 28.0)
    found = torch.cat([points - half, points + half], dim=1)
    # The points about the third box have found something beside it.
    beside = (points[:, 0] > 36) & (points[:, 1] < 36)
    found[beside] = torch.tensor([50.0, 50, 60, 60])
    target = assign(torch.full((1, len(points), 1), 0.01), found[None], points, strides, boxes, labels, real)
    for i, best in enumerate((1.0, 64 / 56**2, 0.0)):
        mine = target.positive[0] & (target.boxes[0] == truth[i]).all(dim=1)
        assert target.weight[0][mine].max() == 1
        torch.testing.assert_close(target.quality[0][mine].max(), torch.tensor(best), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_a_batch_is_assigned_as_its_images_are(seed):
    generator = torch.Generator().manual_seed(run_seed(seed))
    points, strides = points_of([(8, 8), (4, 4), (2, 2)], torch.device("cpu"))
    counts = [0, 1, 7, 3]
    corners = [torch.rand(n, 2, generator=generator) * 40 for n in counts]
    boxes = [torch.cat([c, c + 1 + torch.rand(len(c), 2, generator=generator) * 30], dim=1) for c in corners]
    labels = [torch.randint(0, 3, (n,), generator=generator) for n in counts]
    scores = torch.rand(4, len(points), 3, generator=generator)
    middle = points + torch.randn(4, len(points), 2, generator=generator) * 3
    half = 2 + torch.rand(4, len(points), 2, generator=generator) * 20
    found = torch.cat([middle - half, middle + half], dim=-1)
    whole = assign(scores, found, points, strides, *pad_targets(boxes, labels))
    for i in range(4):
        alone = assign(scores[i : i + 1], found[i : i + 1], points, strides, *pad_targets([boxes[i]], [labels[i]]))
        assert torch.equal(alone.positive[0], whole.positive[i])
        torch.testing.assert_close(alone.quality[0], whole.quality[i])
        assert torch.equal(alone.labels[0][alone.positive[0]], whole.labels[i][whole.positive[i]])
    assert (whole.quality <= 1).all() and (whole.quality >= 0).all()


def test_distribution_focal_loss_by_hand():
    logits = torch.tensor([[0.0, 1.0, 2.0, 0.0]])
    log_p = F.log_softmax(logits, dim=-1)[0]
    found = distribution_focal_loss(logits.expand(3, -1), torch.tensor([1.25, 2.0, 99.0]))
    by_hand = [-(0.75 * log_p[1] + 0.25 * log_p[2]), -log_p[2], -(0.01 * log_p[2] + 0.99 * log_p[3])]
    torch.testing.assert_close(found, torch.stack(by_hand), rtol=1e-4, atol=1e-4)


def test_losses_by_hand():
    """One point with its box found exactly, one negative."""
    points, strides = torch.tensor([[4.0, 4], [12, 4]]), torch.tensor([8.0, 8])
    logits = torch.tensor([[[0.4, -1.0], [0.3, -2.0]]])
    box = torch.tensor([[[0.0, 0, 8, 8], [0, 0, 8, 8]]])
    distances = torch.zeros(1, 2, 4, 3)
    target = Assignment(
        positive=torch.tensor([[True, False]]),
        boxes=box,
        labels=torch.tensor([[0, 0]]),
        weight=torch.tensor([[0.8, 0.0]]),
        quality=torch.tensor([[0.5, 0.0]]),
    )
    losses = aligned_losses(logits, distances, box, points, strides, target)
    assert losses["bbox_regression"].item() == pytest.approx(0, abs=1e-6)
    # Half a stride to each side, between the bins 0 and 1 of three that are equally likely; 0.8 in all counts as 1.
    assert losses["distances"].item() == pytest.approx(0.8 * math.log(3))

    def negative(x):
        p = 1 / (1 + math.exp(-x))
        return 0.75 * p * p * math.log1p(math.exp(x))

    p = 1 / (1 + math.exp(-0.4))
    positive = -0.8 * (0.5 * math.log(p) + 0.5 * math.log(1 - p))
    assert losses["classification"].item() == pytest.approx(positive + negative(-1) + negative(0.3) + negative(-2))


def test_gradients_are_those_of_the_losses():
    points, strides = grid()
    boxes, labels, real = pad_targets([torch.tensor([[1.0, 1, 13, 14]])], [torch.tensor([0])])
    logits = torch.randn(1, 5, 2, dtype=torch.float64, requires_grad=True)
    distances = torch.randn(1, 5, 4, 4, dtype=torch.float64, requires_grad=True)
    points, strides, boxes = points.double(), strides.double(), boxes.double()
    with torch.no_grad():
        target = assign(logits.sigmoid(), boxes_of(distances, points, strides), points, strides, boxes, labels, real)

    def total(logits, distances):
        found = boxes_of(distances, points, strides)
        return sum(aligned_losses(logits, distances, found, points, strides, target).values())

    assert torch.autograd.gradcheck(total, (logits, distances))


def test_points_and_boxes_are_inverse():
    points, strides = points_of([(4, 4), (2, 2), (1, 1)], torch.device("cpu"))
    assert points[0].tolist() == [4, 4] and points[1].tolist() == [12, 4] and points[16].tolist() == [8, 8]
    assert strides.tolist() == [8] * 16 + [16] * 4 + [32]
    logits = torch.full((1, len(points), 4, 8), -100.0)
    logits[..., 2] = 100  # two strides each way
    boxes = boxes_of(logits, points, strides)
    torch.testing.assert_close(boxes[0, 0], torch.tensor([-12.0, -12, 20, 20]))
    torch.testing.assert_close(sides_of(boxes[0], points), (2 * strides)[:, None].expand(-1, 4))


def build(classes=3, width=0.5):
    torch.manual_seed(run_seed())
    neck = BackboneWithPAN(build_backbone("ghostnet", width=width), 32)
    return GhostDet(neck, classes, postprocess_spec=PostprocessSpec())


@pytest.mark.parametrize("size", [(64, 96), (320, 320)])
def test_protocol(size):
    model = build()
    images = [
        torch.randint(0, 256, (3, *size), dtype=torch.uint8),
        torch.randint(0, 256, (3, 50, 40), dtype=torch.uint8),
    ]
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    one = {"boxes": torch.tensor([[5.0, 5, 40, 30]]), "labels": torch.tensor([3])}
    for targets in ([one, nothing], [nothing, nothing]):
        losses = model.train()(images, targets)
        assert set(losses) == {"classification", "bbox_regression", "distances"}
        total = sum(losses.values())
        assert torch.isfinite(total)
        total.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    model.postprocess_spec = PostprocessSpec(score_threshold=0.0)
    with torch.inference_mode():
        found = model.eval()(images)
    assert all(10 < len(f["boxes"]) <= 100 and f["labels"].min() >= 1 and f["labels"].max() <= 3 for f in found)
    assert (found[1]["boxes"] <= torch.tensor([40.0, 50, 40, 50])).all() and (found[1]["boxes"] >= 0).all()


def test_a_box_that_is_no_number_is_not_passed_over():
    model = build().train()
    bad = {"boxes": torch.tensor([[5.0, 5, float("nan"), 30]]), "labels": torch.tensor([3])}
    losses = model([torch.zeros(3, 64, 64, dtype=torch.uint8)], [bad])
    assert not torch.isfinite(sum(losses.values()))
