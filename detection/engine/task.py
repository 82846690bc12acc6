"""What a `Trainer` needs to know of the thing it trains."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn
from torch.utils.data import DataLoader

from detection.checkpoint import FORMAT, Classes
from detection.engine.training_progress import TrainingProgress


class Task(Protocol):
    """Losses of a batch, and predictions on the validation set and their score.

    The trainer holds the model; a task holds the data to evaluate on. Subclasses inherit the methods with a body, which
    do nothing or are the usual choice.
    """

    format: str = FORMAT
    """Section "format" of the checkpoints."""
    metric: str
    """Key of the number that decides which weights are the best; higher is better."""
    background: bool = False
    """Whether evaluations are scored in the background (`start_scoring`)."""
    zero_score_advice: str = ""
    """Warning for a score that is still 0 after 30 % of the training; "" for none."""
    classes: Classes
    val_loader: DataLoader

    # ---- Training

    def losses(self, objective: nn.Module, images: Any, targets: Any) -> dict[str, Tensor]:
        """The parts of the loss, scalars, of one batch from the train loader.

        Args:
            objective: the trainer's, wrapped for several processes.
        """
        ...

    def compile(self, model: nn.Module) -> None:
        """Compile the model, or what is worth it, in place (train.compile)."""
        model.compile()

    def epoch_options(self, done: float) -> dict[str, Any]:
        """Options of `TrainBatchSampler.set_epoch`. `done`: finished part of the training in [0, 1] at that epoch."""
        return {}

    def draw_batch(self, images: Any, targets: Any) -> np.ndarray | None:
        """A training batch as an RGB image, uint8 [H, W, 3], for the log; None for no image."""
        return None

    def name_images(self, targets: Any) -> str:
        """Names of the images of a batch, for an error message."""
        ...

    # ---- Evaluation

    def val_batches(self) -> int:
        """Batches of an evaluation in this process."""
        return len(self.val_loader)

    def predict(self, model: nn.Module) -> Any:
        """Predictions on the whole validation set, the same in each process; each computes its part of them."""
        ...

    def score(self, predictions: Any) -> dict[str, Any]:
        """The numbers of predictions, for metrics.jsonl and best.pt. An undefined number is None."""
        ...

    def score_text(self, numbers: Mapping[str, Any]) -> str:
        """The most important numbers, for the log."""
        ...

    def resource_usage(self) -> dict[str, Any]:
        """More values for the line in metrics.jsonl, measured after `predict`."""
        return {}

    def save_predictions(self, predictions: Any, folder: Path, *, best: bool = False) -> None:
        """Write the predictions of the last evaluation, or of that of best.pt, into the run's folder."""
        return

    def draw_predictions(self, predictions: Any) -> np.ndarray | None:
        """Some predictions as an RGB image, uint8 [H, W, 3], for the log; None for no image."""
        return None

    def save_best_extras(self, model: nn.Module, folder: Path) -> None:
        """Write the files that go with best.pt; `model` and the saved predictions are those of best.pt."""
        return

    def start_scoring(self, predictions: Any) -> Callable[[], dict[str, Any]]:
        """Start `score` in the background, for a `background` task; returns a function that waits for the numbers."""
        numbers = self.score(predictions)
        return lambda: numbers

    def check_predictions(self, predictions: Any, source: str) -> None:
        """Raise UserError if the predictions of a `background` task, read from the file `source`, are damaged."""
        return

    # ---- Descriptions

    def describe(self, model: nn.Module) -> str:
        """One line on what is trained."""
        ...

    def summarize(self, progress: TrainingProgress, folder: Path) -> str:
        """The result of a finished training: the best score, and then a line for each important file."""
        ...

    def describe_batch(self, images: Any, targets: Any | None = None) -> str:
        """Shapes of a batch; with targets also their number."""
        ...

    def try_prediction(self, model: nn.Module, images: Any) -> str:
        """Predict on one batch of the validation set; returns what was found, "" for nothing to tell."""
        ...
