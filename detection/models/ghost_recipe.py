"""Ghost modules in a detector: the `model.ghostify` section of a config."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from backbones import Backbone, WeightsError
from backbones.ghost_conversion import GhostReport, ghostify
from backbones.weights import load_weights, read_weights
from detection.config import BackboneConfig, GhostifyConfig
from detection.core.commands import command
from detection.core.errors import UserError
from detection.zoo.names import find_backbone


def part_of(name: str) -> str:
    """Which of backbone, neck and head a module of a detector belongs to, by its name."""
    if name.startswith("backbone.body."):
        return "backbone"
    return "neck" if name.startswith("backbone.") else "head"


def ghostify_by(
    spec: GhostifyConfig, model: nn.Module, *, example: Any = None, calibration: Iterable[Any] | None = None
) -> GhostReport:
    """`backbones.ghostify` as the config says, whatever `parts` it names. Raises ValueError, see there."""
    return ghostify(
        model,
        spec.ratio,
        spec.kernel_size,
        include=spec.include,
        exclude=spec.exclude,
        min_channels=spec.min_channels,
        example=example,
        calibration=calibration,
    )


def ghostify_detector(
    model: nn.Module, spec: GhostifyConfig, *, example: Any = None, calibration: Iterable[Any] | None = None
) -> GhostReport:
    """Ghostify the parts that the config names, in place.

    Args:
        example, calibration: as for `backbones.ghostify`; an input is a tuple of one list of images [3, H, W].

    Raises:
        UserError: a pattern matches nothing, or nothing is left to replace.
    """
    elsewhere = [
        name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and part_of(name) not in spec.parts
    ]
    try:
        chosen = spec.model_copy(update={"exclude": [*spec.exclude, *elsewhere]})
        report = ghostify_by(chosen, model, example=example, calibration=calibration)
    except ValueError as error:
        raise UserError(f"model.ghostify: {error}") from error
    if not report.replaced:
        raise UserError(
            f"model.ghostify replaces no convolution in {', '.join(spec.parts)}: widen include or parts, or lower "
            f"min_channels ({command('ghostify')} lists what is kept and why)"
        )
    return report


def recipe_config(report: GhostReport, parts: list[Any]) -> GhostifyConfig:
    """The config section that ghostifies a detector of the same architecture as the report describes."""
    return GhostifyConfig(
        parts=parts,
        ratio=report.recipe["ratio"],
        kernel_size=report.recipe["kernel_size"],
        min_channels=report.recipe["min_channels"],
        include=report.recipe["include"],
        exclude=report.recipe["exclude"],
    )


def load_ghosted_backbone(body: Backbone, spec: BackboneConfig) -> None:
    """Load `spec.weights`, if any, into a backbone that has been ghosted, and freeze what the config says.

    Raises:
        UserError: weights that cannot be had or do not fit, those of the plain backbone among them.
    """
    if spec.weights is None:
        return
    try:
        weights = find_backbone(spec.weights, spec.name, spec.width) or ""
        state_dict, source = read_weights(weights, spec.name, spec.width)
        if not any(key.endswith(".cheap.weight") for key in state_dict) and any(
            key.endswith(".cheap.weight") for key in body.state_dict()
        ):
            raise WeightsError(
                f"{source} is of a plain {spec.name}, but model.ghostify has ghosted the backbone. Fit a ghosted one "
                f"to it first: {command('ghostify')} {spec.name} --weights {spec.weights} --images FOLDER "
                "--out ghosted.pth"
            )
        load_weights(body, state_dict, source)
        body.pretrained = True
        body.freeze(spec.frozen_stages, spec.freeze_bn)
    except ValueError as error:  # WeightsError is one
        raise UserError(f"model.backbone.weights: {error}") from error


def raw_outputs(model: Any, batch: Any) -> Any:
    """The outputs of a detector before postprocessing: its pyramid features and the outputs of its head.

    Args:
        model: a detector of this toolkit.
        batch: a list of images [3, H, W], or a tuple with such a list.
    """
    images: list[Tensor] = batch[0] if isinstance(batch, tuple) else batch
    batched, _ = model.transform(images)
    features = list(model.backbone(batched.tensors).values())
    return model.head(features) if hasattr(model, "head") else [features, model.rpn.head(features)]
