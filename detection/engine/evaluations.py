"""Evaluations between epochs, and all that follows from a score: metrics.jsonl, best.pt, the end by patience."""

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from detection.checkpoint import save_checkpoint
from detection.core import distributed
from detection.engine.deferred_evaluation import DeferredEvaluation, remove_deferred_evaluations
from detection.engine.run_folder import append_metrics, read_metrics
from detection.engine.run_logger import RunLogger
from detection.engine.signals import StopSignal
from detection.engine.trainer import Trainer

log = logging.getLogger("detection")


class Evaluations:
    """The evaluations of one training. Nothing else decides which weights are the best, or writes best.pt.

    If the task scores in the background (eval.background), an evaluation only predicts. Its score, and what follows
    from it, come at the next evaluation or at the end of the training.
    """

    def __init__(self, trainer: Trainer, logger: RunLogger) -> None:
        self.trainer, self.logger = trainer, logger
        self.deferred: DeferredEvaluation | None = None
        """The last evaluation, while it is scored in the background."""

    def due(self) -> bool:
        """Whether to evaluate now: every train.eval_every epochs, and at the end of the training."""
        progress = self.trainer.progress
        regular = progress.epoch % self.trainer.config.train.eval_every == 0
        return progress.evaluated < progress.epoch and progress.batch == 0 and (regular or self.training_over())

    def training_over(self) -> bool:
        """Whether the budget is spent, or train.patience evaluations brought no new best score."""
        train, progress = self.trainer.config.train, self.trainer.progress
        if train.patience is not None and progress.scored - progress.best_epoch >= train.patience * train.eval_every:
            return True
        return self.trainer.budget_spent()

    def evaluate(self, stop: StopSignal) -> None:
        """Predict in every process; score and write in the main one.

        Raises:
            KeyboardInterrupt: a signal asks to stop; nothing is written then.
        """
        trainer, task, progress = self.trainer, self.trainer.task, self.trainer.progress
        trainer.broadcast_buffers()
        start = time.monotonic()
        with stop.interruptible():
            predictions = task.predict(trainer.eval_model)
        if distributed.is_main():
            if progress.scored < progress.evaluated:
                self._finish_deferred()
            task.save_predictions(predictions, trainer.folder)
            self.logger.image("val_detections", task.draw_predictions(predictions), progress.step)
            loss = None if math.isnan(progress.loss) else progress.loss
            record = {"epoch": progress.epoch, "step": progress.step, "loss": loss, "seconds": trainer.seconds()}
            record |= task.resource_usage()
            if task.background:
                self._defer(record, predictions)
            else:
                numbers = task.score(predictions)
                record["seconds"] = trainer.seconds()
                self._conclude(record, numbers, self._save_best, time.monotonic() - start)
        progress.evaluated = progress.epoch
        self.broadcast_best()

    def finish(self) -> None:
        """At the end of the training: wait for an evaluation that is still scored in the background."""
        progress = self.trainer.progress
        if progress.scored < progress.evaluated:
            if distributed.is_main():
                self._finish_deferred()
            self.broadcast_best()
            self.trainer.save()
        if distributed.is_main():
            remove_deferred_evaluations(self.trainer.folder)

    def update_best(self, score: float, epoch: int) -> bool:
        """Take in the score of the evaluation after `epoch`; returns whether it is the best so far."""
        progress = self.trainer.progress
        # NaN, the score without ground truth, compares false and so never becomes the best.
        improved = score > (-1.0 if progress.best is None else progress.best)
        if improved:
            progress.best, progress.best_epoch = score, epoch
        progress.scored = epoch
        return improved

    def broadcast_best(self) -> None:
        """Tell all processes what only the main one knows, as it alone scores."""
        progress = self.trainer.progress
        progress.best, progress.best_epoch, progress.scored = distributed.gather(
            (progress.best, progress.best_epoch, progress.scored)
        )[0]

    def _defer(self, record: dict[str, Any], predictions: Any) -> None:
        trainer = self.trainer
        checkpoint = {**trainer.metadata(), "model": trainer.eval_model.state_dict()}
        # The score of the evaluation before is known by now, but last.pt does not have it yet: its file stays.
        remove_deferred_evaluations(trainer.folder, keep=trainer.progress.evaluated)
        self.deferred = DeferredEvaluation.start(trainer.folder, trainer.task, checkpoint, record, predictions)

    def _finish_deferred(self) -> None:
        start, epoch, task = time.monotonic(), self.trainer.progress.evaluated, self.trainer.task
        deferred = self.deferred or DeferredEvaluation.resume(self.trainer.folder, epoch, task)
        if deferred is None:
            # The user went back to previous.pt after the end of a training, which had taken the score in.
            log.warning("the evaluation after epoch %d is no longer there: its line in metrics.jsonl counts", epoch)
            scores = {line["epoch"]: line.get(task.metric) for line in read_metrics(self.trainer.folder)}
            self.update_best(_as_score(scores.get(epoch)), epoch)
            return
        numbers = deferred.wait()
        self.deferred = None
        self._conclude(deferred.record, numbers, deferred.save_best, time.monotonic() - start)

    def _conclude(
        self,
        record: Mapping[str, Any],
        numbers: Mapping[str, Any],
        save_best: Callable[[Mapping[str, Any]], None],
        seconds: float,
    ) -> None:
        """Write best.pt if the score (`numbers`) is the best so far, and the line in metrics.jsonl.

        Args:
            record: the part of that line that does not come from the score.
            seconds: how long the training waited for the evaluation.
        """
        task, score = self.trainer.task, _as_score(numbers[self.trainer.task.metric])
        improved = self.update_best(score, record["epoch"])
        if math.isnan(score):
            log.warning("val has no ground truth: %s is undefined; best.pt has the latest weights", task.metric)
        if improved or math.isnan(score):
            save_best(numbers)
        line = {"epoch": record["epoch"], "step": record["step"], **numbers, **record}
        # Nested values last: people read the line from its start.
        append_metrics(self.trainer.folder, dict(sorted(line.items(), key=lambda item: isinstance(item[1], dict))))
        self.logger.scalars({f"val/{k}": v for k, v in line.items() if isinstance(v, float)}, record["step"])
        self.logger.flush()
        log.info(
            "epoch %d  loss %.3f  %s%s  (%.0f s training, %.1f s evaluation)",
            record["epoch"], _as_score(record["loss"]), task.score_text(numbers),
            "  best so far" if improved else "", record["seconds"], seconds,
        )  # fmt: skip
        if score == 0 and task.zero_score_advice and self.trainer.progress_fraction() > 0.3:
            log.warning(task.zero_score_advice)

    def _save_best(self, numbers: Mapping[str, Any]) -> None:
        trainer = self.trainer
        content = {**trainer.metadata(), "model": trainer.eval_model.state_dict(), "numbers": dict(numbers)}
        save_checkpoint(trainer.folder / "best.pt", content)
        trainer.task.save_best_extras(trainer.eval_model, trainer.folder)


def _as_score(value: Any) -> float:
    """A number of a record; NaN where it is undefined."""
    return float(value) if isinstance(value, int | float) else math.nan
