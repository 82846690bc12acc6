"""Communication between the processes of torchrun. In a single process each function returns its own value."""

import contextlib
import functools
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

TIMEOUT = timedelta(minutes=30)
"""Time after which processes notice a dead one; the first batches of a large data set take minutes."""


@contextlib.contextmanager
def session(device: str) -> Iterator[torch.device]:
    """Join the process group if torchrun started several processes, and leave it at the end. Yields the device.

    Args:
        device: as in a config: auto, cpu, cuda, or cuda:N (for a single process only). Process r of a machine uses
            GPU r. The backend is gloo on CPUs, nccl on GPUs.

    Raises:
        UserError: the device is absent, or a machine has more processes than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield pick_device(device)
        return
    place = _device_of_rank(device, int(os.environ.get("LOCAL_RANK", "0")))
    if place.type == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield place
    finally:
        _cpu_group_of.cache_clear()
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
    """Whether this is the process that writes files and shows progress."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process has called this."""
    if world_size() > 1:
        dist.barrier()


def _cpu_group() -> Any:
    """A group for tensors on the CPU: a gloo one if GPUs communicate over nccl; None is the default group."""
    return _cpu_group_of(dist.group.WORLD)


@functools.lru_cache(maxsize=1)
def _cpu_group_of(default_group: Any) -> Any:
    # One for each default group: a program that calls this toolkit may destroy its group and create another one.
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=TIMEOUT)


def reduce_sum(values: Sequence[float]) -> list[float]:
    """Sum of each number over all processes, the same in each."""
    return _reduce(values, dist.ReduceOp.SUM)


def reduce_max(values: Sequence[float]) -> list[float]:
    """Maximum of each number over all processes, the same in each."""
    return _reduce(values, dist.ReduceOp.MAX)


def _reduce(values: Sequence[float], operation: Any) -> list[float]:
    if world_size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total, operation, group=_cpu_group())
    return total.tolist()


class DelayedMax:
    """Maximum of each number over all processes, available one call later: no process waits for another or its GPU."""

    def __init__(self) -> None:
        self._started: tuple[Any, torch.Tensor] | None = None

    def start(self, values: Sequence[float]) -> list[float] | None:
        """Start to reduce `values`; returns the result of the previous call, None if there is none."""
        result = self.finish()
        total = torch.tensor(values, dtype=torch.float64)
        work = dist.all_reduce(total, dist.ReduceOp.MAX, group=_cpu_group(), async_op=True)
        self._started = work, total
        return result

    def finish(self) -> list[float] | None:
        """Wait for the result of the last `start`; None if it was returned already."""
        if self._started is None:
            return None
        work, total = self._started
        self._started = None
        work.wait()
        return total.tolist()


def reduce_max_on_device(value: torch.Tensor) -> None:
    """Maximum of a tensor over all processes, in place and without waiting for the GPU that it is on."""
    if world_size() > 1:
        dist.all_reduce(value, dist.ReduceOp.MAX)


def broadcast_buffers(module: nn.Module) -> None:
    """Copy the buffers of the main process: the batch norms of each process average over different images."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def gather(value: Any) -> list[Any]:
    """The values (any picklable objects) of all processes, ordered by rank, in each process."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_cpu_group())
    return values


def parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` in DistributedDataParallel, which averages gradients over all processes; itself in a single process."""
    if world_size() == 1:
        return module
    return DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None)
