"""Reads config files with key=value overrides, and writes them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from detection.config import BaseConfig, DetectionConfig, Schema
from detection.config_check import apply_overrides, check, migrate
from detection.core.errors import UserError
from detection.core.files import shown, write_atomically
from detection.core.text import closest_match
from detection.core.yaml_reader import read_yaml

RUN_FILES = ("last.pt", "best.pt", "metrics.jsonl")
"""A config.yaml beside one of them was written by a training, perhaps of an earlier version."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> DetectionConfig:
    """Read a detection config; see `read_config`."""
    return read_config(DetectionConfig, path, overrides)


def read_config(schema: type[Schema], path: str | Path, overrides: Sequence[str] = ()) -> Schema:
    """Read a YAML file, apply `key.sub=value` overrides (see `apply_overrides`) and check the result.

    Raises:
        UserError: the file is missing or not YAML (see `read_yaml`), a key is unknown, or a value is wrong; the message
            names file, line and key.
    """
    path = Path(path)
    if not os.path.exists(path):
        raise UserError(f"config {shown(path)} does not exist{_nearest_file(path)}")
    raw, lines = read_yaml(path, "config")
    if not isinstance(raw, dict):
        raise UserError(f"config {path} must hold keys and values, like 'output_dir: runs/mine'")
    if path.name == "config.yaml" and any((path.parent / name).exists() for name in RUN_FILES):
        raw = migrate(raw, str(path))
    given = apply_overrides(schema, raw, overrides)
    return check(schema, raw, str(path), lines, given)


def parse_config(raw: dict[str, Any], source: str) -> DetectionConfig:
    """Check the plain dict of a detection config that this toolkit wrote (into a checkpoint, say), keys of earlier
    versions included. Raises UserError, see `read_config`."""
    return check(DetectionConfig, migrate(raw, source), source)


def save_config(config: BaseConfig, path: Path) -> None:
    """Write the resolved config as YAML that `read_config` reads back to an equal one."""
    text = yaml.safe_dump(config.model_dump(), sort_keys=False)
    write_atomically(path, lambda file: file.write(text.encode()))


def _nearest_file(path: Path) -> str:
    if not os.path.isdir(path.parent):
        return ""
    names = [p.name for p in path.parent.glob("*.y*ml")]
    match = closest_match(path.name, names)
    return f" (did you mean {path.parent / match}?)" if match else ""
