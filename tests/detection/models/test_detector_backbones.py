"""A detector with any backbone: built from a config, trained, evaluated, fused for prediction."""

import numpy as np
import pytest
import torch
from conftest import run_seed

from detection import Predictor, UserError, build_model
from detection.checkpoint import save_checkpoint
from detection.config import DetectionConfig

pytestmark = pytest.mark.numeric

EVERY = [
    "ghostnet",
    "ghostnetv2",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mobilenet_v3_small",
    "resnet18",
    "resnet50",
    "vgg11_bn",
    "densenet121",
    "efficientnet_b0",
    "regnet_y_400mf",
    "shufflenet_v2_x0_5",
    "mnasnet0_5",
    "convnext_tiny",
    "googlenet",
    "timm/ghostnet_050",
    "timm/ghostnetv2_100",
    "timm/ghostnetv3_050",
    "timm/repghostnet_050",
    "timm/tf_efficientnet_lite0",
    "timm/mobilenetv4_conv_small",
    "timm/resnet18",
    "timm/convnext_atto",
    "timm/mobileone_s0",
]


def with_backbone(config: DetectionConfig, name: str, detector: str = "retinanet") -> DetectionConfig:
    return config.with_overrides(
        ["model.backbone.width=1.0", f"model.backbone.name={name}", f"model.detector={detector}"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("detector", ["retinanet", "faster_rcnn"])
@pytest.mark.parametrize("name", EVERY)
def test_trains_and_evaluates(name, detector, tiny_config):
    model = build_model(with_backbone(tiny_config, name, detector), 2).train()
    images = [torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8), torch.rand(3, 75, 97)]
    targets = [
        {"boxes": torch.tensor([[8.0, 8, 50, 60], [60, 20, 90, 80]]), "labels": torch.tensor([1, 2])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    first = {name: p.detach().clone() for name, p in model.backbone.body.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    for _ in range(2):
        loss = sum(model(images, targets).values())
        assert torch.isfinite(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None for p in model.parameters())
    moved = [not torch.equal(p, first[name]) for name, p in model.backbone.body.named_parameters()]
    assert sum(moved) > 0.7 * len(moved)  # blocks that begin as the identity let their inner layers move later
    with torch.no_grad():
        found = model.eval()(images)
    for detections, image in zip(found, images, strict=True):
        assert set(detections) == {"boxes", "labels", "scores"}
        assert torch.isfinite(detections["boxes"]).all()
        assert (detections["boxes"][:, 2] <= image.shape[2]).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mobilenet_v33_large", r"model\.backbone: unknown backbone.*did you mean 'mobilenet_v3_large'"),
        ("timm/repghostnet_1000", r"model\.backbone: timm .* has no network.*timm/repghostnet_100"),
        ("swin_t", r"model\.backbone: swin_t cannot be a backbone"),
    ],
)
def test_wrong_names(name, message, tiny_config):
    with pytest.raises(UserError, match=message):
        build_model(with_backbone(tiny_config, name), 2)


@pytest.mark.parametrize("detector", ["retinanet", "faster_rcnn"])
def test_the_predictor_fuses_the_backbone(detector, tiny_config, tmp_path):
    config = with_backbone(tiny_config, "timm/repghostnet_050", detector)
    model = build_model(config, 2).eval()
    classes = {"names": ["square", "disc"], "ids": [3, 7]}
    save_checkpoint(
        tmp_path / "best.pt", {"model": model.state_dict(), "config": config.model_dump(), "classes": classes}
    )
    predictor = Predictor(tmp_path / "best.pt", device="cpu", score_threshold=0.0)
    fused = predictor.model.backbone.body
    assert sum(p.numel() for p in fused.parameters()) < sum(p.numel() for p in model.backbone.body.parameters())
    images = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        for level, x in model.backbone.body(images).items():
            torch.testing.assert_close(fused(images)[level], x, rtol=1e-5, atol=1e-5)
    image = np.random.default_rng(run_seed()).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    assert np.isfinite(predictor.predict(image)["boxes"]).all()
