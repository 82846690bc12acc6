"""One file holds all state of a run. It is written atomically and read without running any code in it."""

import contextlib
import os
import pickle
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from detection.config import Config, parse_config
from detection.errors import UserError
from detection.files import UNFINISHED, write_atomically

FORMAT = "ghostnet-detection/1"


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
    link = path.with_name(f".previous.pt.{os.getpid()}{UNFINISHED}")
    # File systems without hard links go without it.
    with contextlib.suppress(OSError):
        link.unlink(missing_ok=True)
        os.link(path, link)
        os.replace(link, path.with_name("previous.pt"))
        # Where both are the same file already, as after a kill between this and the save, replacing does nothing.
        link.unlink(missing_ok=True)


def read_checkpoint(path: str | Path, expected: str = FORMAT) -> dict[str, Any]:
    """Read with `weights_only=True`, onto the CPU.

    Raises:
        UserError: absent, truncated, not a checkpoint, or not one of this toolkit.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        previous, best = path.with_name("previous.pt"), path.with_name("best.pt")
        hint = f"; {best} is there too" if best != path and best.exists() else ""
        if path.name == "last.pt" and previous.exists():
            hint = f"; the one before it is there: mv {previous} {path}, and --resume goes on from that"
        raise UserError(
            f"{path} is not a readable checkpoint (truncated, or no PyTorch file): {reason[:200]}{hint}"
        ) from error
    if not isinstance(content, dict) or content.get("format") != expected:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise UserError(
            f"{path} is not a checkpoint of this toolkit (expected format {expected!r}, found {found!r}); "
            "backbone weights of other projects go into model.backbone.weights"
        )
    return content


def classes_of(content: Mapping[str, Any]) -> Classes:
    return Classes(tuple(content["classes"]["names"]), tuple(content["classes"]["ids"]))


def config_of(content: Mapping[str, Any], path: str | Path) -> Config:
    return parse_config(content["config"], f"config in {path}")


def load_model_state(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Strict load. Raises UserError, counting what does not fit, for a checkpoint of another model."""
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
