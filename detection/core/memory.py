"""Detects errors that mean "out of memory" and advises which keys of the config to change."""

import contextlib
import errno
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from detection.core.errors import UserError

SIGNS = (
    "allocate memory",  # DefaultCPUAllocator, and strerror of ENOMEM
    "out of memory",
    "not enough memory",
    "bad_alloc",
    "bad allocation",
    "could not create a primitive",  # oneDNN
    "can't start new thread",
    "failed to map segment",  # the dynamic linker, inside `import torch`
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that RAM, the memory of a GPU, or a limit on the process is exhausted. An error that was
    raised in a worker and quoted in the main process counts, too."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError | OSError | ImportError) and any(sign in str(error) for sign in SIGNS)


@contextlib.contextmanager
def memory_advice(config: Any, *, training: bool = True, checkpoint: Path | None = None) -> Iterator[None]:
    """Turn an error about exhausted memory into a UserError that names the keys of `config` to lower.

    Args:
        config: config of a detector or a classifier.
        training: whether the block trains, or only evaluates.
        checkpoint: the last.pt that --resume continues from; the message names it if it exists.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(_advice(config, training, checkpoint)) from error


def _advice(config: Any, training: bool, checkpoint: Path | None) -> str:
    from detection.core.device import pick_device

    device, data, train = pick_device(config.device), config.data, config.train
    batch = data.batch_size if training else (config.eval.batch_size or data.batch_size)
    half = batch // 2
    ways = []
    if half and training:
        ways.append(f"data.batch_size={half} train.accumulate={train.accumulate * 2} (the same batch in two halves)")
    elif half:
        ways.append(f"eval.batch_size={half}")
    if hasattr(data, "short_side"):
        ways.append(
            f"smaller images: data.short_side={data.short_side * 3 // 4} data.long_side={data.long_side * 3 // 4}"
        )
    if data.workers:
        ways.append(f"data.workers={data.workers // 2} (each is a process with memory of its own)")
    if train.amp == "off" and device.type == "cuda":
        ways.append("train.amp=bf16, which takes about half")
    saved = (
        f" The run can go on from {checkpoint} (--resume)." if checkpoint is not None and checkpoint.exists() else ""
    )
    return (
        f"out of memory on {device} with {batch} images a batch ({peak_memory(device)}). Try "
        f"{'; or '.join(ways)}.{saved}"
    )


def peak_memory(device: Any) -> str:
    """Peak memory of this process on a torch.device, in words."""
    if device.type == "cuda":
        import torch

        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on the GPU"
    try:
        import resource
    except ImportError:
        return "not known on this system"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return f"{peak / (2**30 if platform.system() == 'Darwin' else 2**20):.2f} GiB (this process)"


def available_memory() -> int | None:
    """Bytes that this process can still allocate: free RAM, or less if its cgroup or its address space has a limit.

    None if that is unknown (not on Linux).
    """
    try:
        text = Path("/proc/meminfo").read_text()
        rooms = [int(text.split("MemAvailable:")[1].split()[0]) * 1024]
    except (OSError, IndexError, ValueError):
        return None
    return min([*rooms, *_address_space(), *_cgroups()])


def _address_space() -> Iterator[int]:
    """Bytes below the limit of `ulimit -v`, if there is one."""
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        yield max(0, limit - pages * resource.getpagesize())


def _cgroups(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """Free bytes of each control group above this process that has a limit, for both versions of the interface.

    A container sees its own group at the root, whatever `membership` says.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            top, files = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top, files = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = top / name.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                with contextlib.suppress(OSError, ValueError, KeyError):
                    # "max" means no limit.
                    limit, used = (int((folder / file).read_text()) for file in files[:2])
                    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                    # Pages of files in the cache are freed when memory is needed.
                    yield max(0, limit - used + int(stat[files[2]]))
