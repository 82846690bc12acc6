"""RetinaNet's losses against torchvision's, and the matching of anchors by hand."""

import pytest
import torch
from conftest import run_seed
from detectors import small_config
from torchvision.models.detection import RetinaNet

from detection import build_model
from detection.models.losses import BACKGROUND, IGNORED, match_anchors, negative_focal_loss, retina_losses

pytestmark = pytest.mark.numeric


def batch(counts, classes, size=96, seed=0):
    generator = torch.Generator().manual_seed(run_seed(seed))
    targets = []
    for count in counts:
        corner = torch.rand(count, 2, generator=generator) * (size - 30)
        sides = 4 + torch.rand(count, 2, generator=generator) * 60
        boxes = torch.cat([corner, (corner + sides).clamp(max=size)], dim=1)
        targets.append({"boxes": boxes, "labels": torch.randint(1, classes + 1, (count,), generator=generator)})
    return torch.rand(len(counts), 3, size, size, generator=generator), targets


@pytest.mark.parametrize("box_loss", ["giou", "l1"])
@pytest.mark.parametrize("counts", [(3, 1, 8), (0, 5), (0, 0), (1,)])
@pytest.mark.parametrize("classes", [1, 7])
def test_losses_and_gradients_equal_torchvisions(box_loss, counts, classes):
    torch.manual_seed(run_seed(1))
    model = build_model(
        small_config(head_norm="group", box_loss=box_loss, anchor_sizes=[16, 32, 64, 128, 256]), classes
    )
    images, targets = batch(counts, classes)
    batched, _ = model.transform(list(images))
    features = list(model.backbone(batched.tensors).values())
    with torch.no_grad():
        outputs = {k: v + 0.5 * torch.randn_like(v) for k, v in model.head(features).items()}
    anchors = model.anchor_generator(batched, features)
    found = []
    for compute in (model.compute_loss, lambda t, o, a: RetinaNet.compute_loss(model, shifted(t), o, a)):
        heads = {name: value.clone().requires_grad_() for name, value in outputs.items()}
        losses = compute(targets, heads, anchors)
        sum(losses.values()).backward()
        found.append((losses, {name: head.grad for name, head in heads.items()}))
    for name, expected in found[1][0].items():
        torch.testing.assert_close(found[0][0][name], expected, rtol=1e-5, atol=1e-6)
    for name, expected in found[1][1].items():
        torch.testing.assert_close(found[0][1][name], expected, rtol=1e-4, atol=1e-7)


def shifted(targets):
    return [{"boxes": t["boxes"], "labels": t["labels"] - 1} for t in targets]


def test_gradient_of_the_focal_loss_is_exact():
    """Against finite differences, in double precision, far out on both sides too."""
    coder = build_model(small_config(), 2).head.regression_head.box_coder
    logits = torch.tensor([[[-30.0, -2.0], [0.3, 40.0], [1.5, -0.7]]], dtype=torch.float64, requires_grad=True)
    deltas = torch.zeros(1, 3, 4, dtype=torch.float64)
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40], [0, 0, 9, 11]], dtype=torch.float64)
    boxes, labels = [torch.tensor([[0.0, 0, 10, 10]], dtype=torch.float64)], [torch.tensor([1])]

    def loss(x):
        return retina_losses(x, deltas, anchors, boxes, labels, coder, "l1")["classification"]

    assert torch.autograd.gradcheck(loss, (logits,))
    assert torch.isfinite(loss(logits))


def test_matching_by_hand():
    anchors = torch.tensor(
        [[0.0, 0, 10, 10], [0, 0, 10, 22], [0, 0, 10, 24], [50, 50, 60, 60], [100, 100, 140, 140], [0, 0, 10, 40]]
    )
    boxes = torch.tensor([[0.0, 0, 10, 10], [100, 100, 110, 110]])
    # IoU with the first box: 1, 0.4545, 0.4167, 0, 0, 0.25. The second one's best anchor has an IoU of 1/16 only.
    assert match_anchors(boxes, anchors).tolist() == [0, IGNORED, IGNORED, BACKGROUND, 1, BACKGROUND]
    assert match_anchors(boxes[:0], anchors).tolist() == [BACKGROUND] * 6
    far = torch.tensor([[500.0, 500, 510, 510]])
    assert match_anchors(far, anchors).tolist() == [BACKGROUND] * 6


def test_an_anchor_without_a_box_never_spoils_the_loss():
    """Deltas of anchors far from any object can be anything; times zero weight they must not become NaN."""
    coder = build_model(small_config(), 1).head.regression_head.box_coder
    anchors = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]])
    deltas = torch.tensor([[[0.1, 0, 0, 0], [-1e4, 1e4, -1e3, -1e3]]], requires_grad=True)
    logits = torch.zeros(1, 2, 1)
    losses = retina_losses(logits, deltas, anchors, [anchors[:1]], [torch.tensor([0])], coder, "giou")
    losses["bbox_regression"].backward()
    assert torch.isfinite(losses["bbox_regression"]) and torch.isfinite(deltas.grad).all()
    assert (deltas.grad[0, 1] == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_box_that_is_not_finite_shows_in_the_loss(bad):
    coder = build_model(small_config(), 1).head.regression_head.box_coder
    anchors = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]])
    boxes = [torch.tensor([[0.0, 0, 10, 10], [1, 1, bad, 20]])]
    losses = retina_losses(
        torch.zeros(1, 2, 1), torch.zeros(1, 2, 4), anchors, boxes, [torch.tensor([0, 0])], coder, "giou"
    )
    assert not torch.isfinite(losses["bbox_regression"])


def test_negative_focal_loss_by_hand():
    # p = 0.5: 0.75 * 0.25 * ln 2
    assert negative_focal_loss(torch.zeros(1)).item() == pytest.approx(0.75 * 0.25 * 0.693147, rel=1e-5)
