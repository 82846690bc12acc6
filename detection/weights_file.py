"""A checkpoint's weights, config and classes as one .safetensors file, for distribution; no optimizer state."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from backbones.weights import read_safetensors
from detection.core.errors import UserError
from detection.core.files import write_atomically

SECTIONS = ("format", "config", "classes", "numbers")
"""Sections of a checkpoint that are kept as JSON, in the metadata of the file."""
KEPT_IN_FLOAT32 = ("running_mean", "running_var")
"""Statistics of batch norms: small variances are not representable in float16."""


def write_weights_file(path: Path, content: Mapping[str, Any], *, dtype: torch.dtype = torch.float16) -> None:
    """Write the weights of a checkpoint, its averaged ones if it has them.

    Args:
        content: of a checkpoint; `SECTIONS` are written as they are.
        dtype: of the floating-point tensors, except `KEPT_IN_FLOAT32`.

    Raises:
        UserError: a weight is too large for `dtype`.
    """
    state = content.get("ema") or content["model"]
    tensors = {}
    for name, value in state.items():
        if name.endswith("num_batches_tracked"):
            continue
        keep = not value.is_floating_point() or name.endswith(KEPT_IN_FLOAT32)
        tensors[name] = (value if keep else value.to(dtype)).contiguous()
        if not bool(tensors[name].isfinite().all()) and bool(value.isfinite().all()):
            raise UserError(f"{path}: {name} has values that {dtype} cannot represent")
    data = save(tensors, {key: json.dumps(content[key]) for key in SECTIONS if key in content})
    write_atomically(path, lambda file: file.write(data))


def read_weights_file(path: Path) -> dict[str, Any]:
    """The sections of a checkpoint, with float32 weights as "model".

    Raises:
        backbones.file_limits.UnreadableFile, OSError: it is not such a file, or it is too large.
    """
    state, metadata = read_safetensors(path)
    content: dict[str, Any] = {key: _parsed(path, key, metadata[key]) for key in SECTIONS if key in metadata}
    weights: dict[str, Tensor] = {}
    for name, value in state.items():
        weights[name] = value.float() if value.is_floating_point() else value
        if name.endswith("running_var"):
            weights[f"{name.removesuffix('running_var')}num_batches_tracked"] = torch.tensor(0)
    return {**content, "model": weights}


def read_metadata(path: Path) -> dict[str, Any]:
    """The sections of such a file without its weights. Raises UserError if it is not one."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {key: _parsed(path, key, text) for key, text in (file.metadata() or {}).items() if key in SECTIONS}
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} is not a readable weights file: {error}") from error


def _parsed(path: Path, key: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not a whole checkpoint: its section {key!r} is not JSON") from None
