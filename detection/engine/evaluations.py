"""The evaluation between epochs: metrics, predictions, and the best weights so far."""

import logging
import math
import time

from detection.core import distributed
from detection.core.device import memory_in_use
from detection.data.dataset import DetectionDataset
from detection.engine.deferred_evaluation import Pending, remove_pending
from detection.engine.detection_task import Run
from detection.engine.image_grids import detections_grid
from detection.engine.run_logger import Monitor
from detection.engine.signals import StopSignal
from detection.evaluation.coco_evaluator import evaluate_results, write_results
from detection.evaluation.detect_dataset import detect_dataset

log = logging.getLogger("detection")


def evaluate(run: Run, monitor: Monitor, loss: float, stop: StopSignal) -> None:
    """Score the evaluated weights on val; write metrics, predictions and, when it is the best so far, best.pt.

    With eval.background the score, and what hangs on it, is written at the next evaluation or at the end.
    """
    config, progress = run.config, run.progress
    start = time.monotonic()
    with stop.interruptible():
        results = detect_dataset(run.eval_model, run.val_loader, run.classes.ids, run.device, amp=config.train.amp)
    # Images were shared out among the processes; the main one scores them all.
    results = [result for share in distributed.gather(results) for result in share]
    if not distributed.is_main():
        return
    if progress.scored < progress.evaluated:
        run.take_score(monitor)
    write_results(run.folder / "predictions.json", results)
    dataset = run.val_loader.dataset
    assert isinstance(dataset, DetectionDataset)
    found = detections_grid(dataset, results, run.classes.ids, run.classes.names)
    monitor.image("val_detections", found, progress.step)
    record = {
        "epoch": progress.epoch,
        "step": progress.step,
        "loss": None if math.isnan(loss) else loss,
        "seconds": run.seconds(),
        "memory_mb": memory_in_use(),
    }
    if config.eval.background:
        checkpoint = {**run.description(), "model": run.eval_model.state_dict()}
        # The one before is known by now, but not to last.pt.
        remove_pending(run.folder, but=progress.evaluated)
        run.pending = Pending.begin(run.folder, checkpoint, record, results, run.val_index, config.eval.backend)
        return
    evaluation = evaluate_results(run.val_index, results, config.eval.backend)
    record["seconds"] = run.seconds()
    run.conclude(monitor, evaluation, record, run.save_best, time.monotonic() - start)
