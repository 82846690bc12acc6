"""Describes the machine and the versions of packages, for reports and for the folders of runs."""

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import torch

from detection.core.device import pick_device, processor_name
from detection.core.errors import UserError
from detection.core.files import read_file, write_atomically

FILE = "environment.json"
"""A list in the folder of a run, with one entry for each start and each resume."""
PACKAGES = ("ghostnet-detection", "torch", "torchvision", "pycocotools", "numpy", "albumentations")


def describe_environment(device: str = "auto") -> dict[str, str]:
    """Name -> value: machine, versions, commit of this toolkit, and date. `device`: as in a config."""
    return {
        "machine": f"{hardware(pick_device(device))}; {platform.system()} {platform.release()}",
        "versions": versions(PACKAGES),
        "commit": commit() or "not known",
        "date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z"),
    }


def hardware(device: torch.device) -> str:
    """Name of the CPU, and of the GPU if `device` is one."""
    cpu = f"{processor_name()}, {os.cpu_count()} cores"
    return f"{torch.cuda.get_device_name(device)}; {cpu}" if device.type == "cuda" else cpu


def versions(packages: Sequence[str]) -> str:
    """Versions of Python and of the `packages` that are installed."""
    found = [f"Python {platform.python_version()}"]
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def commit() -> str | None:
    """Commit of the checkout that this toolkit runs from, with "-dirty" if files differ; None for an installed copy."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def note_environment(folder: Path, device: str) -> None:
    """Append a description of the environment to the environment.json of a run."""
    text = json.dumps([*read_environments(folder), describe_environment(device)], indent=1)
    write_atomically(folder / FILE, lambda file: file.write(text.encode()))


def read_environments(folder: Path) -> list[dict[str, str]]:
    """Descriptions of the environments that a run was trained in; [] if there are none."""
    try:
        content = json.loads(read_file(folder / FILE, largest=1 << 24))
    except (UserError, ValueError, RecursionError):
        return []
    return [entry for entry in content if isinstance(entry, dict)] if isinstance(content, list) else []
