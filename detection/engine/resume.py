"""Resume a training from its last.pt: load each section, checked, and compare the configs."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbones.weights import first_non_finite
from detection.checkpoint import classes_of, load_model_state, read_checkpoint, section, set_rng_state
from detection.config import check
from detection.config_check import migrate
from detection.core import distributed
from detection.core.errors import UserError
from detection.engine.trainer import Trainer
from detection.engine.training_progress import TrainingProgress

log = logging.getLogger("detection")

# Keys (or sections) that must not change: the saved state would not fit, or it would be another training. `weights` and
# the like only say how the network started.
FIXED = ("seed", "model", "data.classes", "optim.name", "teacher")
FREE = (
    "model.backbone.weights",
    "model.backbone.frozen_stages",
    "model.backbone.freeze_bn",
    "model.box_loss_weight",
    "model.weights",
)
# These decide the batches of an epoch and must not change within it.
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
STATE = {torch.optim.SGD: {"momentum_buffer"}, torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}}
"""What each optimizer keeps of a parameter."""


def load_checkpoint(trainer: Trainer, path: Path) -> None:
    """Restore a training from a last.pt.

    Raises:
        UserError: it is unreadable, incomplete, or of another model or other data.
    """
    content = read_checkpoint(path, trainer.task.format)
    if "optimizer" not in content:
        raise UserError(f"{path} holds weights alone; a run is resumed from its last.pt")
    values = section(content, "progress", path)
    # Files of version 0.1 know no scores that come later.
    progress = _load_progress({"scored": values.get("evaluated", 0)} | values, path)
    _compare_with_saved_config(trainer, content, path, in_epoch=progress.batch > 0)
    if progress.batch > 0 and progress.batch >= len(trainer.sampler):
        raise UserError(
            f"{path} was written after batch {progress.batch} of an epoch, and an epoch has {len(trainer.sampler)} "
            "now: the data have changed; train from the start, without --resume"
        )
    classes = classes_of(content, path)
    if classes.names != trainer.task.classes.names:
        raise UserError(f"{path} was trained on other classes: {', '.join(classes.names)}")
    load_model_state(trainer.objective, section(content, "model", path), path)
    if trainer.ema is not None:
        # A training that had no average so far starts it from its weights.
        average = section(content, "ema", path) or trainer.model.state_dict()
        load_model_state(trainer.ema.module, average, path)
    _load_optimizer(trainer.optimizer, content["optimizer"], path)
    scaler = section(content, "scaler", path)
    if trainer.scaler.is_enabled() and scaler:
        with section_errors(path, "scaler"):
            trainer.scaler.load_state_dict(scaler)
    trainer.progress = progress
    if trainer.ema is not None:
        trainer.ema.n_averaged.fill_(progress.step)
    _load_rng(section(content, "rng", path), distributed.rank(), path)


@contextlib.contextmanager
def section_errors(path: Path, name: str) -> Iterator[None]:
    """Turn errors of missing values and of values of another type into a UserError that names the section."""
    try:
        yield
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is not a whole checkpoint: its section {name!r} cannot be used: {reason}") from None


def _load_progress(values: Mapping[str, Any], path: Path) -> TrainingProgress:
    """The counters of the section "progress"; those that older files lack have their initial value.

    Raises:
        UserError: a value is of another type, or negative.
    """
    with section_errors(path, "progress"):
        progress = TrainingProgress(**values)
        for field in dataclasses.fields(progress):
            value, initial = getattr(progress, field.name), field.default
            if value is None and initial is None:
                continue
            is_number = isinstance(value, int if isinstance(initial, int) else (int, float))
            if isinstance(value, bool) or not is_number or not (initial is None or 0 <= value < 2**62):
                raise ValueError(f"{field.name} is {value!r}")
    return progress


def _load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], path: Path) -> None:
    """Load an optimizer's state and the settings of its groups.

    Raises:
        UserError: it is of another optimizer or network, incomplete, or has numbers that are not finite.
    """
    before = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    with section_errors(path, "optimizer"):
        optimizer.load_state_dict(dict(state))
        for old, new in zip(before, optimizer.param_groups, strict=True):
            for key, value in old.items():
                if not _same_kind(value, new[key]):
                    raise ValueError(f"{key} is {new[key]!r}")
        known = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        for parameter, values in optimizer.state.items():
            if parameter not in known or set(values) != STATE[type(optimizer)]:
                raise ValueError(f"it is of another optimizer, or of other parameters ({', '.join(map(str, values))})")
            tensors = {name: value for name, value in values.items() if value is not None or name != "momentum_buffer"}
            for name, value in tensors.items():
                if value.shape not in (parameter.shape, torch.Size()) or not value.is_floating_point():
                    raise ValueError(f"{name} has the shape {list(value.shape)}, a parameter {list(parameter.shape)}")
            if bad := first_non_finite(tensors):
                raise ValueError(f"{bad} has numbers that are not finite")


def _load_rng(states: Any, rank: int, path: Path) -> None:
    """Set the random generators of the process `rank`; a rank that the file lacks keeps its own."""
    # One state for each process; one alone, not in a list, in the files of version 0.1.
    states = states if isinstance(states, list) else [states]
    if rank < len(states):
        with section_errors(path, "rng"):
            set_rng_state(states[rank])


def _same_kind(one: Any, other: Any) -> bool:
    """Whether both are of one type; all numbers are of one type. Members of tuples and shapes of tensors count, too."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape
    if isinstance(one, tuple | list):
        return isinstance(other, tuple | list) and len(one) == len(other) and all(map(_same_kind, one, other))
    numbers = [isinstance(value, int | float) and not isinstance(value, bool) for value in (one, other)]
    return all(numbers) or (type(one) is type(other) and not any(numbers))


def _compare_with_saved_config(trainer: Trainer, content: Mapping[str, Any], path: Path, in_epoch: bool) -> None:
    """Log which keys of the config changed. Raises UserError for one that must not change."""
    source = f"config in {path}"
    saved = check(type(trainer.config), migrate(section(content, "config", path), source), source)
    old, new = saved.model_dump(), trainer.config.model_dump()
    # What counts is how many images all processes together take at a time.
    old["data"]["batch_size"] *= content.get("processes", 1)
    new["data"]["batch_size"] *= distributed.world_size()
    for message in compare_configs(old, new, in_epoch):
        log.info("changed since the run was stopped: %s", message)


def compare_configs(old: Mapping[str, Any], new: Mapping[str, Any], in_epoch: bool) -> list[str]:
    """Messages, one for each key that changed, like "optim.lr: 0.01 -> 0.02".

    Args:
        old, new: configs as plain dicts (`model_dump`).
        in_epoch: whether the training stopped within an epoch.

    Raises:
        UserError: keys changed that must not change; the message names them all and what to do.
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
        keys = ("model.weights", "model.backbone.weights")
        given = " ".join(f"{key}={before[key]}" for key in keys if before.get(key) is not None)
        hint = f" (the run began with {given}; give it again)" if given else ""
        refused.append(f"layers that are frozen because they have weights: {one} -> {two}{hint}")
    if refused:
        where = " (the run was stopped inside an epoch)" if in_epoch else ""
        raise UserError(
            f"--resume goes on with the run as it was{where}; these keys cannot change: {'; '.join(refused)}. "
            "Set them back, or start a new run without --resume (another output_dir keeps the old one in place)"
        )
    return changed


def _frozen(config: Mapping[str, Any]) -> str:
    """Which layers are frozen, on which the optimizer's state depends: only layers with pretrained weights are."""
    if config.get("model.backbone.weights") is None and config.get("model.weights") is None:
        return "0 stages"
    norms = " and batch norms" if config.get("model.backbone.freeze_bn") else ""
    parts = "".join(f" and the {part}" for part in config.get("model.freeze", ()))
    return f"{config.get('model.backbone.frozen_stages', 0)} stages{norms}{parts}"


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
