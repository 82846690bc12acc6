"""Losses on their way to the host, and what is done about one that is not finite."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from detection.core import distributed
from detection.core.errors import UserError

log = logging.getLogger("detection")


class _Seen(NamedTuple):
    """The losses of one batch, perhaps still being copied from the GPU."""

    names: Sequence[str]
    values: Tensor
    ready: "torch.cuda.Event | None"
    targets: Any
    where: str


class NonFiniteGuard:
    """Keeps a NaN from the weights, and names the images that it came from.

    On the CPU a batch is looked at before its backward pass. A GPU is not made to wait: its losses are looked at one
    batch later, and until then the optimizer's own guard (`found_inf`, see `guard`) leaves the update out.

    With train.non_finite=stop it is an error. With skip the whole step is left out, in all processes, and the batch
    norms' averages are set back; beyond train.max_skipped_steps it is an error, too.
    """

    def __init__(self, run: Any, late: bool | None = None) -> None:
        self.run = run
        self.skip = run.config.train.non_finite == "skip"
        self.late = run.device.type == "cuda" if late is None else late
        self.spoiled = False
        """The step under way is to be left out (known at once on the CPU only)."""
        self.skipped = 0
        self._bad: Tensor | None = None
        self._pending: _Seen | None = None
        self._buffers = _float_buffers(run.objective) if self.skip else []
        self._saved = [buffer.clone() for buffer in self._buffers]

    def begin_step(self) -> None:
        """To be called before the first batch of each optimizer step."""
        self.spoiled, self._bad = False, None
        if self._buffers:
            torch._foreach_copy_(self._saved, self._buffers)

    def look(self, losses: Mapping[str, Tensor], stacked: Tensor, targets: Any) -> dict[str, float]:
        """Losses as numbers: of this batch, or (on a GPU) of the one before it, {} where there is none yet.

        Args:
            stacked: the values of `losses`, float [n].

        Raises:
            UserError: not finite, and the config says stop, or it has happened too often.
        """
        progress = self.run.progress
        where = f"epoch {progress.epoch + 1}, step {progress.step}"
        found = stacked.detach()
        if not self.late:
            seen = _Seen(list(losses), found, None, targets, where)
            finite = all(math.isfinite(value) for value in seen.values.tolist())
            if self.skip and distributed.reduce_max([float(not finite)])[0]:
                self.spoiled = True
            return self._report(seen)
        bad = (~torch.isfinite(found)).any().float()
        if self.skip and distributed.world_size() > 1:
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        self._bad = bad if self._bad is None else torch.maximum(self._bad, bad)
        host, ready = _start_copy(found)
        before, self._pending = self._pending, _Seen(list(losses), host, ready, targets, where)
        return {} if before is None else self._report(before)

    def guard(self, optimizer: torch.optim.Optimizer) -> None:
        """To be called before `optimizer.step()`: let it leave out the update where a loss was not finite.

        GradScaler, where it is on, does the same by itself.
        """
        if self._bad is None:
            return
        if not self.run.scaler.is_enabled():
            # Fused optimizers read this on the device, as GradScaler uses it.
            optimizer.found_inf = self._bad  # type: ignore[attr-defined]
        if self._buffers:
            for buffer, saved in zip(self._buffers, self._saved, strict=True):
                buffer.copy_(torch.where(self._bad > 0, saved, buffer))

    def leave_out(self) -> None:
        """Undo what the batches of a spoiled step have left behind (CPU)."""
        self.run.optimizer.zero_grad(set_to_none=True)
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._saved)

    def flush(self) -> dict[str, float]:
        """The losses that have not been looked at yet, at the end of an epoch."""
        before, self._pending = self._pending, None
        return {} if before is None else self._report(before)

    def _report(self, seen: _Seen) -> dict[str, float]:
        if seen.ready is not None:
            seen.ready.synchronize()
        values = dict(zip(seen.names, seen.values.tolist(), strict=True))
        if all(math.isfinite(value) for value in values.values()):
            return values
        self.skipped += 1
        config = self.run.config
        parts = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        what = f"the loss is not finite at {seen.where} ({parts}), on {self.run.name_images(seen.targets)}"
        if self.skip and self.skipped <= config.train.max_skipped_steps:
            log.warning("%s; the step is left out (%d of %d)", what, self.skipped, config.train.max_skipped_steps)
            return {}
        too_often = f" It was so {self.skipped} times (train.max_skipped_steps)." if self.skip else ""
        raise UserError(
            f"{what}. The weights are as before this step.{too_often} Lower optim.lr ({config.optim.lr:g}), set "
            "optim.clip_grad_norm=10, or use amp=off or bf16 in place of fp16; --detect-anomaly shows the operation"
        )


def _float_buffers(module: nn.Module) -> list[Tensor]:
    return [buffer for buffer in module.buffers() if buffer.is_floating_point()]


def _start_copy(values: Tensor) -> "tuple[Tensor, torch.cuda.Event | None]":
    if values.device.type != "cuda":
        return values.clone(), None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return host, ready
