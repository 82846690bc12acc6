"""Several processes that train one network, as torchrun starts them. All of it is trivial in a process of its own."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detection.core.device import pick_device
from detection.core.errors import UserError


@contextlib.contextmanager
def session(device: str) -> Iterator[torch.device]:
    """Join the other processes, where torchrun has started some, and leave them at the end; gives this one's device.

    Args:
        device: of the config: auto, cpu, cuda, or cuda:N (for a single process alone). Process r of a machine takes
            the GPU number r; gloo carries what CPUs say to each other, nccl what GPUs do.

    Raises:
        UserError: a device that is not there, or more processes on a machine than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield pick_device(device)
        return
    place = _device_of_rank(device, int(os.environ.get("LOCAL_RANK", "0")))
    if place.type == "cuda":
        torch.cuda.set_device(place)
    # A process that has died shows as a time-out of the others; the first batches of a large set take their time.
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
    try:
        yield place
    finally:
        dist.destroy_process_group()


def _device_of_rank(name: str, local_rank: int) -> torch.device:
    device = pick_device(name)
    if device.type != "cuda":
        return device
    if device.index is not None:
        raise UserError(
            f"device={name} is for one process; under torchrun say device=cuda: each takes a GPU of its own"
        )
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"torchrun started more processes here than the {torch.cuda.device_count()} CUDA devices of this machine; "
            "lower --nproc-per-node"
        )
    return torch.device("cuda", local_rank)


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """0 … world_size() - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Of the one process that writes files, and shows progress."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier()


def reduce_sum(values: Sequence[float]) -> list[float]:
    """Sum of each number over all processes, the same in each."""
    return _reduce(values, dist.ReduceOp.SUM)


def reduce_max(values: Sequence[float]) -> list[float]:
    """Largest of each number over all processes, the same in each."""
    return _reduce(values, dist.ReduceOp.MAX)


def _reduce(values: Sequence[float], operation: Any) -> list[float]:
    if world_size() == 1:
        return list(values)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total, operation)
    return total.tolist()


def broadcast_buffers(module: nn.Module) -> None:
    """Take over the main process's buffers: each has seen other images, so that batch norms have other averages."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def gather(value: Any) -> list[Any]:
    """The values (anything that pickles) of all processes, by rank, in each of them."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """`module`, wrapped so that gradients are means over all processes; itself where there is only one."""
    if world_size() == 1:
        return module
    return DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None)
