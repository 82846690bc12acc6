"""How far a training is: the counters that last.pt keeps."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass
class TrainingProgress:
    """The section "progress" of last.pt."""

    epoch: int = 0
    """Finished epochs."""
    batch: int = 0
    """Finished batches of the current epoch."""
    step: int = 0
    """Optimizer steps."""
    seconds: float = 0.0
    """Training time at the last save, the time before earlier stops included."""
    evaluated: int = 0
    """Finished epochs at the last evaluation."""
    scored: int = 0
    """Finished epochs at the last evaluation with a known score; below `evaluated` while one is scored in the
    background."""
    best: float | None = None
    """Best score (AP, top-1); None before the first score that is a number."""
    best_epoch: int = 0
    loss_sum: float = 0.0
    """Sum of the losses of the batches of the current epoch or, between epochs, of the last one."""
    loss_count: int = 0

    @property
    def loss(self) -> float:
        """Mean training loss of that epoch; NaN before the first batch."""
        return self.loss_sum / self.loss_count if self.loss_count else math.nan

    def add_losses(self, losses: Mapping[str, float]) -> None:
        """Count the losses of one batch; {} counts as no batch."""
        if losses:
            self.loss_sum, self.loss_count = self.loss_sum + sum(losses.values()), self.loss_count + 1
