"""Take up the sections of a last.pt, each checked, as somebody may have changed the file or cut it."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbones.weights import first_not_finite
from detection.checkpoint import set_rng_state
from detection.core.errors import UserError

STATE = {torch.optim.SGD: {"momentum_buffer"}, torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}}
"""What each optimizer keeps of a parameter."""


@contextlib.contextmanager
def section_errors(path: Path, name: str) -> Iterator[None]:
    """Whatever Python says of a value that is missing or of another type: a UserError that names the section."""
    try:
        yield
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is not a whole checkpoint: its section {name!r} cannot be used: {reason}") from None


def load_counters(kind: type, values: Mapping[str, Any], path: Path) -> Any:
    """A dataclass `kind` of numbers (`Progress`) out of the section "progress"; what older files lack is as it begins.

    Raises:
        UserError: a value is of another type, or negative where it counts.
    """
    with section_errors(path, "progress"):
        found = kind(**values)
        for field in dataclasses.fields(kind):
            value, begin = getattr(found, field.name), field.default
            wanted = int if isinstance(begin, int) else (int, float)
            if value is None and begin is None:
                continue
            if isinstance(value, bool) or not isinstance(value, wanted) or not (begin is None or 0 <= value < 2**62):
                raise ValueError(f"{field.name} is {value!r}")
    return found


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], path: Path) -> None:
    """Take up an optimizer's state and the settings of its groups.

    Raises:
        UserError: it is of another optimizer or network, incomplete, or has numbers that are not finite.
    """
    before = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    with section_errors(path, "optimizer"):
        optimizer.load_state_dict(dict(state))
        for old, new in zip(before, optimizer.param_groups, strict=True):
            for key, value in old.items():
                if not _alike(value, new[key]):
                    raise ValueError(f"{key} is {new[key]!r}")
        known = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        for parameter, values in optimizer.state.items():
            if parameter not in known or set(values) != STATE[type(optimizer)]:
                raise ValueError(f"it is of another optimizer, or of other parameters ({', '.join(map(str, values))})")
            tensors = {name: value for name, value in values.items() if value is not None or name != "momentum_buffer"}
            for name, value in tensors.items():
                if value.shape not in (parameter.shape, torch.Size()) or not value.is_floating_point():
                    raise ValueError(f"{name} has the shape {list(value.shape)}, a parameter {list(parameter.shape)}")
            if bad := first_not_finite(tensors):
                raise ValueError(f"{bad} has numbers that are not finite")


def load_rng(states: Any, rank: int, path: Path) -> None:
    """Set the random generators of the process `rank`; a process that the file does not know keeps its own."""
    # One state for each process; one alone, not in a list, in the files of version 0.1.
    states = states if isinstance(states, list) else [states]
    if rank < len(states):
        with section_errors(path, "rng"):
            set_rng_state(states[rank])


def _alike(one: Any, other: Any) -> bool:
    """Of one type; numbers are, and so are the members of tuples."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape
    if isinstance(one, tuple | list):
        return isinstance(other, tuple | list) and len(one) == len(other) and all(map(_alike, one, other))
    numbers = [isinstance(value, int | float) and not isinstance(value, bool) for value in (one, other)]
    return all(numbers) or (type(one) is type(other) and not any(numbers))
