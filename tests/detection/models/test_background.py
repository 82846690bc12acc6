"""Ignored regions and classes without complete annotations: where nothing is trained as background."""

import pytest
import torch
from conftest import run_seed
from detectors import small_config
from test_models import target

from detection import build_model
from detection.models.background import anchors_inside, background_mask, points_inside
from detection.models.losses import retina_losses
from detection.models.task_aligned import Assignment, aligned_losses

pytestmark = pytest.mark.numeric

POINTS = torch.tensor([[4.0, 4], [12, 4], [4, 12], [12, 12]])
NONE_POSITIVE = torch.zeros(2, 4, dtype=torch.bool)
OPEN = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


def region(box, label):
    return {"ignored_boxes": torch.tensor([box]).float(), "ignored_labels": torch.tensor([label])}


def test_without_the_optional_fields_there_is_no_mask():
    assert background_mask([OPEN, OPEN], 3, NONE_POSITIVE, points_inside(POINTS)) is None
    none = {"ignored_boxes": torch.zeros(0, 4), "ignored_labels": torch.zeros(0, dtype=torch.int64)}
    assert background_mask([none, OPEN], 3, NONE_POSITIVE, points_inside(POINTS)) is None


def test_a_region_frees_its_points_from_its_class_unless_they_have_an_object():
    positive = torch.tensor([[False, True, False, False], [False] * 4])
    mask = background_mask([region([0, 0, 16, 8], 2), OPEN], 3, positive, points_inside(POINTS))
    expected = torch.ones(2, 4, 3, dtype=torch.bool)
    expected[0, 0, 1] = False  # Point 1 lies in the region as well, but an object is assigned to it.
    assert torch.equal(mask, expected)


def test_a_class_without_complete_annotations_is_background_nowhere():
    complete = {"complete_classes": torch.tensor([True, False, True])}
    mask = background_mask([complete, OPEN], 3, NONE_POSITIVE, points_inside(POINTS))
    assert mask.tolist() == [[[True, False, True]], [[True] * 3]]
    both = background_mask([complete, region([0, 0, 16, 8], 3)], 3, NONE_POSITIVE, points_inside(POINTS))
    assert not both[0, :, 1].any() and both[0, :, [0, 2]].all()
    assert both[1].tolist() == [[True, True, False]] * 2 + [[True] * 3] * 2


def test_an_anchor_lies_in_a_region_that_has_half_of_its_area():
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 20], [0, 0, 10, 21], [50, 50, 60, 60]])
    found = anchors_inside(anchors)(torch.tensor([[[-5.0, -5, 30, 10], [0, 0, 0, 0]]]))
    assert found.tolist() == [[[True, True, False, False], [False] * 4]]


def test_the_masked_loss_by_hand():
    """Of two classes and three points, the second is positive; what is masked is missing from the sum, and no more."""
    logits = torch.randn(1, 3, 2, generator=torch.Generator().manual_seed(run_seed()))
    box = torch.tensor([[[0.0, 0, 8, 8]] * 3])
    assigned = Assignment(
        positive=torch.tensor([[False, True, False]]),
        boxes=box,
        labels=torch.tensor([[0, 1, 0]]),
        weight=torch.tensor([[0.0, 1.0, 0.0]]),
        quality=torch.tensor([[0.0, 0.7, 0.0]]),
    )

    def loss(background):
        points, strides = torch.full((3, 2), 4.0), torch.full((3,), 8.0)
        parts = aligned_losses(logits, torch.zeros(1, 3, 4, 3), box, points, strides, assigned, background)
        return parts["classification"]

    def negative(x):
        return 0.75 * torch.sigmoid(x) ** 2 * torch.nn.functional.softplus(x)

    everywhere = torch.ones(1, 3, 2, dtype=torch.bool)
    assert torch.equal(loss(everywhere), loss(None))
    masked = everywhere.clone()
    masked[0, 0, 1] = masked[0, 2, 0] = False
    torch.testing.assert_close(loss(masked), loss(None) - negative(logits[0, 0, 1]) - negative(logits[0, 2, 0]))
    # An object of a class without complete annotations is an object all the same.
    torch.testing.assert_close(
        loss(torch.tensor([[[True, False]]])), loss(None) - negative(logits[0, 0, 1]) - negative(logits[0, 2, 1])
    )


def test_the_gradient_of_the_masked_focal_loss_is_exact():
    coder = build_model(small_config(), 2).head.regression_head.box_coder
    logits = torch.tensor([[[-3.0, -2.0], [0.3, 4.0], [1.5, -0.7]]], dtype=torch.float64, requires_grad=True)
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40], [0, 0, 9, 11]], dtype=torch.float64)
    mask = torch.tensor([[[True, False], [False, True], [True, True]]])

    def loss(x, background=mask):
        labels = [torch.tensor([1])]
        deltas = torch.zeros(1, 3, 4, dtype=torch.float64)
        return retina_losses(x, deltas, anchors, [anchors[:1]], labels, coder, "l1", lambda positive: background)[
            "classification"
        ]

    assert torch.autograd.gradcheck(loss, (logits,))
    assert torch.equal(loss(logits, torch.ones_like(mask)), loss(logits, None))


@pytest.mark.parametrize("detector", ["ghostdet", "retinanet"])
def test_nothing_is_learned_where_nothing_is_known(detector):
    """The gradients of the logits, in the detector as a whole: exactly zero where masked, unchanged elsewhere."""
    torch.manual_seed(run_seed())
    model = build_model(small_config(detector, anchor_sizes=[16, 32, 64, 128, 256]), 3).train()
    images = [torch.rand(3, 96, 96), torch.rand(3, 96, 96)]
    kept = []
    model.head.register_forward_hook(lambda module, given, output: kept.append(output["cls_logits"]))

    def run(*targets):
        torch.manual_seed(run_seed())
        losses = model(images, list(targets))
        (logits_grad,) = torch.autograd.grad(sum(losses.values()), kept[-1])
        return losses, logits_grad

    one, two = target(labels=(1,)), target(boxes=((30.0, 30, 90, 90),), labels=(2,))
    losses, plain = run(one, two)
    assert (plain != 0).float().mean() > 0.9
    again, same = run(one | {"ignored_boxes": torch.zeros(0, 4), "ignored_labels": torch.zeros(0).long()}, two)
    assert torch.equal(plain, same) and all(torch.equal(losses[name], again[name]) for name in losses)

    _, federated = run(one | {"complete_classes": torch.tensor([True, True, False])}, two)
    assert (federated[0, :, 2] == 0).all()
    close(federated[..., :2], plain[..., :2])
    close(federated[1], plain[1])

    _, ignoring = run(one, two | region([-1000, -1000, 2000, 2000], 3))
    close(ignoring[0], plain[0])
    close(ignoring[1, :, :2], plain[1, :, :2])
    positive = ignoring[1, :, 2] != 0  # only where the object is, which is of class 2, there is none of class 3
    assert 0 < positive.sum() < 0.3 * len(positive)
    close(ignoring[1, positive, 2], plain[1, positive, 2])


def close(one, two):
    """Equal but for the order in which gradients are added."""
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-9)


def test_faster_rcnn_samples_no_background_in_ignored_regions():
    torch.manual_seed(run_seed())
    model = build_model(small_config("faster_rcnn"), 3).train()
    left = region([0, 0, 50, 96], 2)
    one = target(boxes=((60.0, 10, 90, 40),))
    anchors = [torch.tensor([[0.0, 0, 20, 20], [60, 10, 90, 40], [70, 60, 96, 96], [40, 0, 60, 20], [45, 0, 65, 20]])]
    assert model.rpn.assign_targets_to_anchors(anchors, [one])[0][0].tolist() == [0, 1, 0, 0, 0]
    assert model.rpn.assign_targets_to_anchors(anchors, [one | left])[0][0].tolist() == [-1, 1, 0, -1, 0]
    for targets, expected in (([one], {0, 1}), ([one | left], {0, 1})):
        proposals, _, labels, _ = model.roi_heads.select_training_samples([anchors[0].clone()], targets)
        assert set(labels[0].tolist()) == expected
        assert len(proposals[0]) == (4 if "ignored_boxes" in targets[0] else 6)  # and the object itself
    # With nothing but ignored regions there is still a loss.
    everywhere = {**OPEN, **region([0, 0, 96, 96], 1)}
    losses = model([torch.rand(3, 96, 96)], [everywhere])
    assert all(torch.isfinite(loss) for loss in losses.values())
