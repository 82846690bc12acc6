"""Devices, mixed precision, and facts about the CPU and the memory of this process."""

import contextlib
import multiprocessing
import os
import platform
from pathlib import Path

import torch

from detection.core.errors import UserError

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """A device by its name; "auto" is CUDA if present, otherwise the CPU. Raises UserError for an absent device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r} is not known; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={name}: this machine or this PyTorch build has no CUDA; use device=auto or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return device


def autocast(device: torch.device, amp: str) -> contextlib.AbstractContextManager:
    """A context for mixed precision with `amp` "bf16" or "fp16"; it changes nothing for "off"."""
    if amp == "off":
        return contextlib.nullcontext()
    return torch.autocast(device.type, AMP_TYPES[amp])


def memory_in_use() -> float | None:
    """Memory of this process and its workers in MB (shared pages count in each process); None if it is unknown."""
    total = 0
    for pid in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        try:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except (OSError, IndexError, ValueError):
            return None
        total += pages * os.sysconf("SC_PAGE_SIZE")
    return total / 1e6


def processor_name() -> str:
    """The name of the CPU."""
    return cpu_fields().get("model name") or platform.processor() or platform.machine()


def cpu_fields() -> dict[str, str]:
    """Fields of /proc/cpuinfo for the last core, such as "model name" and "flags"; {} on other systems than Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines if ":" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}
