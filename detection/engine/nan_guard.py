"""Losses on their way to the host, and what happens when one is not finite."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from detection.config import TrainConfig
from detection.core import distributed
from detection.core.errors import UserError

log = logging.getLogger("detection")


class _BatchLosses(NamedTuple):
    """The losses of one batch, perhaps still being copied from the GPU."""

    names: Sequence[str]
    values: Tensor
    ready: "torch.cuda.Event | None"
    targets: Any
    where: str


class NonFiniteGuard:
    """Keeps NaN and infinity out of the weights, and names the images that they came from.

    On the CPU it checks the losses of a batch before its backward pass. A GPU does not have to wait: its losses are
    checked one batch later, and until then the optimizer's own mask (`found_inf`, see `mask_update`) skips the update.

    train.non_finite=stop raises an error. train.non_finite=skip skips the whole optimizer step in all processes and
    restores the averages of batch norms; more than train.max_skipped_steps such steps raise an error, too.

    Args:
        objective: the module that computes the losses.
        lr: optim.lr, for the error message.
        name_images: names of the images of a batch's targets, for the error message.
        late: check one batch later, as on a GPU.
    """

    def __init__(
        self, objective: nn.Module, train: TrainConfig, lr: float, name_images: Callable[[Any], str], *, late: bool
    ) -> None:
        self.skip, self.max_skipped_steps = train.non_finite == "skip", train.max_skipped_steps
        self.lr, self.name_images, self.late = lr, name_images, late
        self.skip_step = False
        """Whether to skip the current optimizer step (on a GPU always False: `mask_update` skips it there)."""
        self.skipped = 0
        self._found_inf: Tensor | None = None
        self._previous: _BatchLosses | None = None
        self._buffers = [b for b in objective.buffers() if b.is_floating_point()] if self.skip else []
        self._saved = [buffer.clone() for buffer in self._buffers]

    def begin_step(self) -> None:
        """Call it before the first batch of each optimizer step."""
        self.skip_step, self._found_inf = False, None
        if self._buffers:
            torch._foreach_copy_(self._saved, self._buffers)

    def check(
        self, losses: Mapping[str, Tensor], stacked: Tensor, targets: Any, where: str, *, last: bool
    ) -> dict[str, float]:
        """Losses as numbers: of this batch, or (on a GPU) of the previous one, {} for the first.

        Args:
            stacked: the values of `losses`, float [n].
            where: epoch and step, for the error message.
            last: whether this is the last batch of its optimizer step. Only there do processes share what they found.

        Raises:
            UserError: a loss is not finite, and the config says stop, or it happened too often.
        """
        found = stacked.detach()
        if not self.late:
            batch = _BatchLosses(list(losses), found, None, targets, where)
            if self.skip:
                self.skip_step |= not all(math.isfinite(value) for value in found.tolist())
                if last:
                    self.skip_step = bool(distributed.reduce_max([float(self.skip_step)])[0])
            return self._report(batch)
        found_inf = (~torch.isfinite(found)).any().float()
        self._found_inf = found_inf if self._found_inf is None else torch.maximum(self._found_inf, found_inf)
        host, ready = _start_copy(found)
        previous, self._previous = self._previous, _BatchLosses(list(losses), host, ready, targets, where)
        return {} if previous is None else self._report(previous)

    def mask_update(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        """Call it before `optimizer.step()`: on a GPU it lets the optimizer skip the update after a non-finite loss."""
        if self._found_inf is None:
            return
        if self.skip:
            distributed.reduce_max_on_device(self._found_inf)
        # An enabled GradScaler skips the update by itself. Fused optimizers read `found_inf` on the device.
        if not scaler.is_enabled():
            optimizer.found_inf = self._found_inf  # type: ignore[attr-defined]
        for buffer, saved in zip(self._buffers, self._saved, strict=True):
            buffer.copy_(torch.where(self._found_inf > 0, saved, buffer))

    def discard_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop the gradients of a skipped step and restore the averages of batch norms (CPU)."""
        optimizer.zero_grad(set_to_none=True)
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._saved)

    def flush(self) -> dict[str, float]:
        """The losses that are not checked yet, at the end of an epoch; {} if there are none. Raises as `check`."""
        previous, self._previous = self._previous, None
        return {} if previous is None else self._report(previous)

    def _report(self, batch: _BatchLosses) -> dict[str, float]:
        if batch.ready is not None:
            batch.ready.synchronize()
        values = dict(zip(batch.names, batch.values.tolist(), strict=True))
        if all(math.isfinite(value) for value in values.values()):
            return values
        self.skipped += 1
        parts = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        what = f"the loss is not finite at {batch.where} ({parts}), on {self.name_images(batch.targets)}"
        if self.skip and self.skipped <= self.max_skipped_steps:
            log.warning("%s; the step is skipped (%d of %d)", what, self.skipped, self.max_skipped_steps)
            return {}
        too_often = f" It happened {self.skipped} times (train.max_skipped_steps)." if self.skip else ""
        raise UserError(
            f"{what}. The weights are as before this step.{too_often} Lower optim.lr ({self.lr:g}), set "
            "optim.clip_grad_norm=10, or use amp=off or bf16 instead of fp16; --detect-anomaly shows the operation"
        )


def _start_copy(values: Tensor) -> "tuple[Tensor, torch.cuda.Event | None]":
    if values.device.type != "cuda":
        return values.clone(), None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return host, ready
