"""What may change in a config between a stop and `--resume`, and what may not."""

from collections.abc import Mapping
from typing import Any

from detection.core.errors import UserError

# Keys (or sections) that the saved state was made with: with others it does not fit, or the rest of the run would not
# be the run that was begun. `weights` and the like only say how the network started.
FIXED = ("seed", "model", "data.classes", "optim.name", "teacher")
FREE = (
    "model.backbone.weights",
    "model.backbone.frozen_stages",
    "model.backbone.freeze_bn",
    "model.box_loss_weight",
    "model.weights",
)
# Where a run goes on inside an epoch, what decides the batches of that epoch must be as it was.
FIXED_IN_EPOCH = (
    "data.train",
    "data.batch_size",
    "data.group_by_aspect",
    "data.short_side",
    "data.long_side",
    "data.multi_scale",
    "data.progressive",
    "data.size",
    "data.augment",
    "train.accumulate",
)


def compare_configs(old: Mapping[str, Any], new: Mapping[str, Any], in_epoch: bool) -> list[str]:
    """Messages, one for each key that changed, like "optim.lr: 0.01 -> 0.02".

    Args:
        old, new: configs as plain dicts (`model_dump`).
        in_epoch: whether the run was stopped inside an epoch.

    Raises:
        UserError: a key changed that cannot; the message names all of them and what to do.
    """
    before, after = flat(old), flat(new)
    changed: list[str] = []
    refused: list[str] = []
    for key in sorted(set(before) | set(after)):
        one, two = before.get(key), after.get(key)
        if one == two:
            continue
        message = f"{key}: {one!r} -> {two!r}"
        fixed = _within(key, FIXED) and not _within(key, FREE)
        (refused if fixed or (in_epoch and _within(key, FIXED_IN_EPOCH)) else changed).append(message)
    if (one := _frozen(before)) != (two := _frozen(after)):
        refused.append(
            f"layers that are frozen because of model.backbone.weights: {one} -> {two} (the run began with "
            f"model.backbone.weights={before.get('model.backbone.weights')}; give it again)"
        )
    if refused:
        where = " (the run was stopped inside an epoch)" if in_epoch else ""
        raise UserError(
            f"--resume goes on with the run as it was{where}; these keys cannot change: {'; '.join(refused)}. "
            "Set them back, or start a new run without --resume (another output_dir keeps the old one in place)"
        )
    return changed


def _frozen(config: Mapping[str, Any]) -> str:
    """What is not trained: layers with pretrained weights alone are frozen. The optimizer's state depends on it."""
    if config.get("model.backbone.weights") is None:
        return "0 stages"
    norms = " and batch norms" if config.get("model.backbone.freeze_bn") else ""
    return f"{config.get('model.backbone.frozen_stages', 0)} stages{norms}"


def _within(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
