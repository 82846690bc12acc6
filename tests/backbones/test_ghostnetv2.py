"""GhostNetV2 against timm's independent implementation."""

import pytest
import timm
import torch

from backbones import WeightsError, build_backbone, load_weights, read_weights
from backbones.ghostnetv2 import GhostNetV2

TIMM_NAMES = {1.0: "ghostnetv2_100", 1.3: "ghostnetv2_130", 1.6: "ghostnetv2_160"}


@pytest.mark.numeric
@pytest.mark.parametrize("width", TIMM_NAMES)
def test_equals_timm(width, as_trained):
    reference = as_trained(timm.create_model(TIMM_NAMES[width]))
    classifier = GhostNetV2(width).eval()
    assert list(classifier.state_dict()) == list(reference.state_dict())
    classifier.load_state_dict(reference.state_dict())
    backbone = build_backbone("ghostnetv2", width=width).eval()
    report = load_weights(backbone, reference.state_dict())
    assert len(report.matched) == len(backbone.state_dict()) and not report.unexpected
    images = torch.randn(1, 3, 97, 131)
    with torch.no_grad():
        torch.testing.assert_close(classifier(images), reference(images), rtol=1e-5, atol=1e-5)
        features = backbone(images)
        x = reference.act1(reference.bn1(reference.conv_stem(images)))
        for i, stage in enumerate(reference.blocks):
            x = stage(x)
            if i in (2, 4, 6, 8):
                torch.testing.assert_close(features[f"c{i // 2 + 1}"], x, rtol=1e-5, atol=1e-5)


def test_parameters():
    # The paper's table 1: 6.1 M parameters, 167 M multiply-adds at width 1.0.
    assert sum(p.numel() for p in GhostNetV2().parameters()) / 1e6 == pytest.approx(6.1, abs=0.1)


def test_multiply_adds():
    from backbones.cost import measure_cost

    with torch.device("meta"):
        cost = measure_cost(GhostNetV2().eval(), torch.zeros(1, 3, 224, 224))[""]
    assert cost.macs / 1e6 == pytest.approx(167, rel=0.03)


def test_published_layout(tmp_path):
    """Nested under state_dict, with the profiler's leftovers, as in ck_ghostnetv2_10.pth.tar."""
    network = GhostNetV2()
    junk = {}
    for name, _ in network.named_modules():
        prefix = f"{name}." if name else ""
        junk |= {f"{prefix}total_ops": torch.zeros(1).double(), f"{prefix}total_params": torch.zeros(1).double()}
    path = tmp_path / "ck_ghostnetv2_10.pth.tar"
    weights = network.state_dict()
    torch.save({"state_dict": {**weights, **junk}, "epoch": 399}, path)
    backbone = build_backbone("ghostnetv2", weights=str(path))
    assert backbone.pretrained
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, weights[key]), key
    classifier = GhostNetV2()
    assert not load_weights(classifier, *read_weights(path, "ghostnetv2", 1.0)).unexpected
    assert torch.equal(classifier.classifier.weight, network.classifier.weight)


def test_version_1_and_other_widths_raise():
    with pytest.raises(WeightsError, match=r"lacks tensors of the network \(blocks\.2\.0\.ghost1\.short_conv"):
        load_weights(build_backbone("ghostnetv2"), build_backbone("ghostnet").state_dict())
    with pytest.raises(WeightsError, match=r"does not have \(blocks\.2\.0\.ghost1\.short_conv"):
        load_weights(build_backbone("ghostnet"), build_backbone("ghostnetv2").state_dict())
    with pytest.raises(WeightsError, match="another width"):
        load_weights(build_backbone("ghostnetv2", width=1.3), GhostNetV2().state_dict())


@pytest.mark.parametrize("width", TIMM_NAMES)
def test_hub_ids(width):
    # HF_HUB_OFFLINE is set in conftest, so the hub's own client refuses.
    with pytest.raises(WeightsError, match=rf"{TIMM_NAMES[width]}\.in1k could not be fetched"):
        build_backbone("ghostnetv2", width=width, weights="timm")
