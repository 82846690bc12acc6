"""One file holds all state of a run. It is written atomically and read without running any code in it."""

import contextlib
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from backbones.file_limits import UnreadableFile
from backbones.torch_files import read_torch_file
from backbones.weights import first_non_finite
from detection.config import DetectionConfig
from detection.config_io import parse_config
from detection.core.errors import UserError
from detection.core.files import hard_link, open_regular_file, shown, write_atomically
from detection.weights_file import read_weights_file

FORMAT = "ghostnet-detection/1"


def _is_plain(value: Any) -> bool:
    return isinstance(value, dict) and not any(isinstance(part, Tensor) for part in value.values())


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(key, str) and isinstance(part, Tensor) for key, part in value.items()
    )


def is_classes(value: Any) -> bool:
    """Whether it is the section "classes" of a checkpoint."""
    if not isinstance(value, dict):
        return False
    names, ids = value.get("names"), value.get("ids")
    return (
        isinstance(names, list | tuple)
        and isinstance(ids, list | tuple)
        and all(isinstance(name, str) for name in names)
        and all(type(number) is int for number in ids)
        and 0 < len(names) == len(ids) == len(set(names))
    )


def _is_numbers(value: Any) -> bool:
    return _is_plain(value) and all(isinstance(value.get(k), int | float | None) for k in ("AP", "AP50"))


# What a section must be, and in words.
SECTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "config": (_is_plain, "a dict of plain values"),
    "classes": (is_classes, "names (different strings) and as many ids (integers)"),
    "model": (_is_state, "a dict of tensors"),
    "ema": (lambda value: value is None or _is_state(value), "a dict of tensors, or None"),
    "numbers": (_is_numbers, "a dict of numbers"),
    "optimizer": (
        lambda value: isinstance(value, dict) and {"state", "param_groups"} <= set(value),
        "a dict with state and param_groups",
    ),
    "scaler": (lambda value: isinstance(value, dict), "a dict"),
    "progress": (_is_plain, "a dict of plain values"),
    "rng": (lambda value: isinstance(value, dict | list), "a dict, or a list of them"),
    "processes": (lambda value: type(value) is int and value > 0, "a positive integer"),
    "record": (_is_plain, "a dict of plain values"),
    "results": (lambda value: isinstance(value, str), "a text"),
}


@dataclass(frozen=True)
class Classes:
    """What labels mean; travels in every checkpoint. Label l is `names[l - 1]`, original id `ids[l - 1]`."""

    names: tuple[str, ...]
    ids: tuple[int, ...]


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a dict of tensors and plain values (its "format", if not `FORMAT`, too); see `write_atomically`."""
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **content}, file))


def keep_previous(path: Path) -> None:
    """Let `previous.pt` be the checkpoint that is about to be replaced: a second name, no copy."""
    if not path.exists():
        return
    # File systems without hard links go without it.
    with contextlib.suppress(OSError):
        hard_link(path, path.with_name("previous.pt"))


def read_checkpoint(path: str | Path, expected: str = FORMAT) -> dict[str, Any]:
    """Read a checkpoint, or a .safetensors file of `detection.weights_file`, onto the CPU, without running anything in
    it; see `backbones.torch_files`.

    Returns:
        The sections, each of which is what `SECTIONS` says. Any may be missing, see `section`.

    Raises:
        UserError: absent, truncated, hostile, too large, not a checkpoint, not one of this toolkit, or one with a
            section that is not what it must be.
    """
    path = Path(path)
    if not os.path.lexists(path):
        raise UserError(f"checkpoint {shown(path)} does not exist")
    open_regular_file(path, "checkpoint").close()
    try:
        content: Any = read_weights_file(path) if path.suffix == ".safetensors" else read_torch_file(path)
    except (OSError, UnreadableFile) as error:
        previous, best = path.with_name("previous.pt"), path.with_name("best.pt")
        hint = f"; {best} is there too" if best != path and best.exists() else ""
        if path.name == "last.pt" and previous.exists():
            hint = f"; the one before it is there: mv {previous} {path}, and --resume goes on from that"
        raise UserError(f"{path} is not a readable checkpoint: {error}{hint}") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != expected:
        found = f"format {shown(found)!r}" if isinstance(found, str) else f"a {type(content).__name__} without a format"
        raise UserError(
            f"{path} is not a checkpoint of this toolkit (expected format {expected!r}, found {found}); "
            "backbone weights of other projects go into model.backbone.weights"
        )
    for name, (is_right, words) in SECTIONS.items():
        if name in content and not is_right(content[name]):
            raise UserError(f"{path} is not a whole checkpoint: its section {name!r} must be {words}")
    return content


def section(content: Mapping[str, Any], name: str, path: str | Path) -> Any:
    """A section of a checkpoint. Raises UserError where it is missing."""
    if name not in content:
        raise UserError(f"{path} is not a whole checkpoint: its section {name!r} is missing")
    return content[name]


def classes_of(content: Mapping[str, Any], path: str | Path) -> Classes:
    classes = section(content, "classes", path)
    return Classes(tuple(classes["names"]), tuple(classes["ids"]))


def config_of(content: Mapping[str, Any], path: str | Path) -> DetectionConfig:
    return parse_config(section(content, "config", path), f"config in {path}")


def weights_of(content: Mapping[str, Any], path: str | Path) -> dict[str, Tensor]:
    """What to detect with: the averaged weights where there are any."""
    return content.get("ema") or section(content, "model", path)


def load_model_state(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Strict load. Raises UserError for a checkpoint of another model, counting what does not fit, or with numbers
    that are not finite."""
    own = model.state_dict()
    missing = [k for k in own if k not in state]
    unexpected = [k for k in state if k not in own]
    mismatched = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or unexpected or mismatched:
        first = (mismatched + missing + unexpected)[0]
        raise UserError(
            f"{path} is of another model: {len(missing)} tensors missing, {len(unexpected)} unexpected, "
            f"{len(mismatched)} of another shape (first: {first}); use the config that it was trained with"
        )
    if bad := first_non_finite(state):
        raise UserError(
            f"{path} is of no use: its tensor {bad} has numbers that are not finite (NaN or infinite), as after a "
            "training that diverged; take an earlier checkpoint"
        )
    model.load_state_dict(state)


def rng_state() -> dict[str, Any]:
    """State of all random generators, as tensors and plain values (which `weights_only` reads)."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # type: ignore[misc]
    return {
        "python": (version, list(internal), gauss),
        "numpy": (str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
