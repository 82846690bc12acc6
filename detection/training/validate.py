"""The evaluation between epochs: metrics, predictions, and the best weights so far."""

import logging
import math
import time

from detection import distributed
from detection.data.dataset import DetectionDataset
from detection.device import memory_in_use
from detection.evaluation.coco import evaluate_results, write_results
from detection.evaluation.evaluate import detect_dataset
from detection.training.monitor import Monitor
from detection.training.pictures import detections_grid
from detection.training.state import Run
from detection.training.stop import StopSignal

log = logging.getLogger("detection")


def evaluate(run: Run, monitor: Monitor, loss: float, stop: StopSignal) -> None:
    """Score the evaluated weights on val; write metrics, predictions and, when it is the best so far, best.pt."""
    config, progress = run.config, run.progress
    start = time.monotonic()
    with stop.interruptible():
        results = detect_dataset(run.eval_model, run.val_loader, run.classes.ids, run.device, amp=config.train.amp)
    # Pictures were shared out among the processes; the main one scores them all.
    results = [result for share in distributed.gather(results) for result in share]
    if not distributed.is_main():
        return
    evaluation = evaluate_results(run.val_index, results)
    write_results(run.folder / "predictions.json", results)
    dataset = run.val_loader.dataset
    assert isinstance(dataset, DetectionDataset)
    found = detections_grid(dataset, results, run.classes.ids, run.classes.names)
    monitor.picture("val_detections", found, progress.step)
    numbers = evaluation.to_json()
    ap = evaluation.numbers["AP"]
    better = run.keep_if_best(ap, numbers)
    if math.isnan(ap):
        log.warning("val has no ground truth: AP is undefined; the latest weights are kept as best.pt")
        run.save_best(numbers)
    per_class = numbers.pop("per_class")
    record = {"epoch": progress.epoch, "step": progress.step, **numbers}
    record |= {"loss": None if math.isnan(loss) else loss, "seconds": run.seconds(), "memory_mb": memory_in_use()}
    record["per_class"] = per_class
    monitor.evaluation(record)
    log.info(
        "epoch %d  loss %.3f  AP %.3f  AP50 %.3f  AP75 %.3f%s  (%.0f s training, %.1f s evaluation)",
        progress.epoch, loss, ap, evaluation.numbers["AP50"], evaluation.numbers["AP75"],
        "  best so far" if better else "", run.seconds(), time.monotonic() - start,
    )  # fmt: skip
    if ap == 0 and run.share_done() > 0.3:
        log.warning(
            "AP is still 0: are images and boxes of one piece? Look at them with their boxes, and see that "
            "ground truth scored as its own detections gives AP 1.0"
        )
