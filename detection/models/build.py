"""`build_model`: from a config to a torchvision-style detector."""

import logging

from torch import nn

from backbones import Backbone, WeightsError, build_backbone
from detection.config import BackboneConfig, DetectionConfig
from detection.core.errors import UserError
from detection.core.limits import parameter_limit
from detection.models.faster_rcnn import build_faster_rcnn
from detection.models.fpn import BackboneWithFPN
from detection.models.ghost_pan import BackboneWithPAN
from detection.models.ghost_recipe import ghostify_detector, load_ghosted_backbone
from detection.models.ghostdet import GhostDet
from detection.models.postprocess_spec import PostprocessSpec
from detection.models.retinanet import build_retinanet
from detection.zoo.names import find_backbone

log = logging.getLogger("detection")


def build_model(config: DetectionConfig, num_classes: int) -> nn.Module:
    """Build the detector that the config describes.

    Args:
        num_classes: object classes, without background. Labels are 1…num_classes for every detector, 0 is
            background; this is the one place where the toolkit turns its count into torchvision's.

    Returns:
        A module with torchvision's protocol: (list of images [3, H, W], uint8 or float in [0, 1]; list of targets
        {boxes float32 [n, 4] xyxy in pixels, labels int64 [n]}) -> dict of losses while training, else list of
        {boxes, labels, scores}. `model.postprocess_spec` holds the thresholds of `config.eval`. `model.weights` and
        `model.freeze` of the config are not applied here, as they need the class names
        (`detection.initial_weights`).

    Raises:
        UserError: unknown backbone, weights that cannot be loaded or do not fit, `model.ghostify` that replaces
            nothing, or more parameters than `detection.core.limits` allows.
    """
    if num_classes < 1:
        raise UserError(f"a detector needs at least one class, the data have {num_classes}")
    spec = config.model
    # Weights of a ghosted backbone fit only once it is ghosted.
    load_later = spec.ghostify is not None and "backbone" in spec.ghostify.parts
    try:
        with parameter_limit({"model.backbone.name": spec.backbone.name, "model.backbone.width": spec.backbone.width}):
            body = build_backbone(
                spec.backbone.name,
                width=spec.backbone.width,
                weights=None if load_later or spec.weights is not None else _backbone_weights(spec.backbone),
                frozen_stages=spec.backbone.frozen_stages,
                freeze_bn=spec.backbone.freeze_bn,
            )
    except WeightsError as error:
        raise UserError(f"model.backbone.weights: {error}") from error
    except ValueError as error:
        raise UserError(f"model.backbone: {error}") from error
    sizes = {f"model.{key}": getattr(spec, key) for key in ("fpn_channels", "head_channels", "head_depth")}
    with parameter_limit({**sizes, "classes": num_classes}):
        model = _build_detector(config, body, num_classes)
    if spec.ghostify is not None:
        ghostify_detector(model, spec.ghostify)
    if load_later and spec.weights is None:
        load_ghosted_backbone(body, spec.backbone)
    return model


def _backbone_weights(spec: BackboneConfig) -> str | None:
    return find_backbone(spec.weights, spec.name, spec.width)


def _build_detector(config: DetectionConfig, body: Backbone, num_classes: int) -> nn.Module:
    spec = config.model
    postprocess_spec = PostprocessSpec.of(config.eval)
    if spec.detector == "retinanet":
        neck = BackboneWithFPN(body, ("c3", "c4", "c5"), spec.fpn_channels, extra="p6p7")
        return build_retinanet(
            neck,
            num_classes,
            head_channels=spec.head_channels,
            head_depth=spec.head_depth,
            norm=spec.head_norm,
            norm_groups=spec.head_groups,
            box_loss=spec.box_loss,
            box_loss_weight=spec.box_loss_weight,
            anchor_sizes=spec.anchor_sizes,
            postprocess_spec=postprocess_spec,
        )
    if spec.detector == "ghostdet":
        return GhostDet(
            BackboneWithPAN(body, spec.fpn_channels),
            num_classes,
            head_depth=spec.head_depth,
            box_loss_weight=spec.box_loss_weight,
            postprocess_spec=postprocess_spec,
        )
    neck = BackboneWithFPN(body, ("c2", "c3", "c4", "c5"), spec.fpn_channels, extra="pool")
    return build_faster_rcnn(
        neck,
        num_classes,
        head_channels=spec.head_channels,
        anchor_sizes=spec.anchor_sizes,
        postprocess_spec=postprocess_spec,
    )
