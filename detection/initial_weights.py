"""Starts a training from the weights of another detector: every tensor that fits, and classes by their names."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from backbones import Backbone
from backbones.weights import first_non_finite
from detection.checkpoint import classes_of, config_of, read_checkpoint, weights_of
from detection.config import DetectionConfig, ModelConfig
from detection.core.errors import UserError
from detection.core.text import normalized_name
from detection.models.fpn import BackboneWithNeck

log = logging.getLogger("detection")

SHAPE_KEYS = ("detector", "backbone.name", "backbone.width", "fpn_channels", "ghostify")
"""Keys of `model` on which backbone and neck depend. Heads may differ: what does not fit there starts anew."""
MOST_NAMES = 8


@dataclass
class InitialWeightsReport:
    """What `load_initial_weights` did with each tensor of the model and each class.

    Attributes:
        matched: names of the tensors taken as they are, or row by row for each class.
        reinitialized: names of the tensors that the file lacks, or has in another shape.
        refused: names of the tensors in the file for which the model has no place.
        kept_classes, new_classes: names of the classes whose predictions the file has, and of those it lacks.
    """

    source: str
    matched: list[str] = field(default_factory=list)
    reinitialized: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    kept_classes: list[str] = field(default_factory=list)
    new_classes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        known, new = _list(self.kept_classes), _list(self.new_classes)
        return (
            f"weights {self.source}: {len(self.matched)} tensors matched, {len(self.reinitialized)} re-initialized"
            f"{_in_brackets(self.reinitialized)}, {len(self.refused)} refused{_in_brackets(self.refused)}; "
            f"{len(self.kept_classes)} of {len(self.kept_classes) + len(self.new_classes)} classes known"
            f"{f' ({known})' if known else ''}{f', new: {new}' if new else ''}"
        )


def load_initial_weights(
    model: nn.Module, config: DetectionConfig, class_names: Sequence[str], source: str
) -> InitialWeightsReport:
    """Load the weights of a trained detector (its averaged ones, if it has them) into a new model; log the report.

    Classes are matched by name, whatever their order and number; case, spaces, `_` and `-` do not matter. The
    predictions of new classes keep the initial values of the model, its score prior included. Afterwards the backbone
    counts as pretrained, so that `model.backbone.frozen_stages` and `freeze_bn` take effect.

    Args:
        model: built by `build_model(config, len(class_names))`.
        source: a checkpoint.

    Raises:
        UserError: `source` cannot be read, is of another detector, backbone, width or neck (the message names the key),
            or has numbers that are not finite. The model is not changed then.
    """
    content = read_checkpoint(source)
    _check_same_shape(config_of(content, source).model, config.model, source)
    state = weights_of(content, source)
    if bad := first_non_finite(state):
        raise UserError(f"model.weights: {source}: its tensor {bad} has numbers that are not finite (NaN or infinite)")
    theirs = classes_of(content, source).names
    number_of = {normalized_name(name): number for number, name in enumerate(theirs)}
    pairs = [(i, number_of[key]) for i, name in enumerate(class_names) if (key := normalized_name(name)) in number_of]
    kept = [class_names[i] for i, _ in pairs]
    report = InitialWeightsReport(source, kept_classes=kept, new_classes=[n for n in class_names if n not in kept])

    own = model.state_dict()
    loaded: dict[str, Tensor] = {}
    for name, value in own.items():
        given = state.get(name)
        merged = None if given is None else _merge(name, value, given, len(class_names), len(theirs), pairs)
        if merged is None:
            report.reinitialized.append(name)
        else:
            report.matched.append(name)
            loaded[name] = merged
    report.refused = [name for name in state if name not in own]
    if not loaded:
        raise UserError(f"model.weights: nothing in {source} fits this model")
    model.load_state_dict({**own, **loaded})
    log.info("%s", report)
    body: Backbone = model.backbone.body  # type: ignore[union-attr, assignment]
    body.pretrained = True
    body.freeze(config.model.backbone.frozen_stages, config.model.backbone.freeze_bn)
    return report


def freeze_parts(model: nn.Module, spec: ModelConfig) -> None:
    """Freeze what `model.freeze` names. Parts with random weights are not frozen; a warning says so."""
    pretrained = {
        "backbone": spec.weights is not None or spec.backbone.weights is not None,
        "neck": spec.weights is not None,
    }
    for part in spec.freeze:
        if not pretrained[part]:
            log.warning("model.freeze: the %s has random weights and is trained; model.weights gives it others", part)
        elif part == "backbone":
            body: Backbone = model.backbone.body  # type: ignore[union-attr, assignment]
            body.freeze(4, spec.backbone.freeze_bn)
        else:
            neck: BackboneWithNeck = model.backbone  # type: ignore[assignment]
            neck.freeze_neck()


def _merge(
    name: str, own: Tensor, given: Tensor, num_classes: int, given_classes: int, pairs: Sequence[tuple[int, int]]
) -> Tensor | None:
    """The tensor to load, or None if `given` does not fit.

    Args:
        pairs: (class of the model, class of the file) with the same name.
    """
    rows, given_rows = class_rows(name, own, num_classes), class_rows(name, given, given_classes)
    if rows is None or given_rows is None:
        return given if own.shape == given.shape else None
    if own.shape[1:] != given.shape[1:] or rows.shape[1] != given_rows.shape[1]:
        return None
    merged = own.clone()
    if rows.min() > 0:  # Faster R-CNN's background stands before the classes
        merged[: rows.min()] = given[: rows.min()]
    for i, j in pairs:
        merged[rows[i]] = given[given_rows[j]]
    return merged


def class_rows(name: str, value: Tensor, num_classes: int) -> Tensor | None:
    """Which rows of a tensor belong to which class: int64 [num_classes, k]; None if it is not divided by classes.

    Args:
        name: of the tensor in the state dict of a detector.
    """
    if re.fullmatch(r"head\.levels\.\d+\.cls_logits\.(weight|bias)", name):  # GhostDet: [C, …]
        return torch.arange(num_classes)[:, None]
    if re.fullmatch(r"head\.classification_head\.cls_logits\.(weight|bias)", name):  # RetinaNet: [A * C, …]
        return torch.arange(len(value)).view(-1, num_classes).t()
    if re.fullmatch(r"roi_heads\.box_predictor\.(cls_score|bbox_pred)\.(weight|bias)", name):
        # Faster R-CNN: [C + 1, …] and [(C + 1) * 4, …], the background first.
        return torch.arange(len(value)).view(num_classes + 1, -1)[1:]
    return None


def _check_same_shape(theirs: ModelConfig, own: ModelConfig, source: str) -> None:
    different = [
        f"model.{key} is {_shown(_get(theirs, key))} in the file and {_shown(_get(own, key))} in the config"
        for key in SHAPE_KEYS
        if _get(theirs, key) != _get(own, key)
    ]
    if different:
        raise UserError(f"model.weights: {source} is of another network: {'; '.join(different)}")


def _get(spec: ModelConfig, key: str) -> Any:
    value: Any = spec
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _shown(value: Any) -> str:
    return str(value.model_dump()) if hasattr(value, "model_dump") else repr(value)


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST_NAMES]) + (", …" if len(names) > MOST_NAMES else "")


def _in_brackets(names: Sequence[str]) -> str:
    return f" ({_list(names[:3])}{', …' if len(names) > 3 else ''})" if names else ""
