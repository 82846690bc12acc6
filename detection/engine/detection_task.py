"""A detector's training run, built from a config."""

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from detection.checkpoint import Classes
from detection.config import DetectionConfig
from detection.core import distributed
from detection.core.device import pick_device
from detection.core.files import second_name
from detection.data.annotations import Annotations
from detection.data.dataset import build_dataset
from detection.data.load_split import check_same_classes
from detection.data.loader import BadImages, build_loader
from detection.data.sampler import TrainBatchSampler
from detection.engine.deferred_evaluation import Pending, remove_pending
from detection.engine.image_grids import training_grid
from detection.engine.run_logger import Monitor
from detection.engine.trainer import TrainingRun, part_ways, seed_everything
from detection.evaluation.coco_evaluator import Evaluation
from detection.evaluation.detect_dataset import eval_loader
from detection.models.build import build_model

log = logging.getLogger("detection")


@dataclass(kw_only=True)
class Run(TrainingRun):
    """A detector's training in progress."""

    config: DetectionConfig
    val_index: Annotations
    pending: Pending | None = None
    """The last evaluation, while it is scored in the background."""

    def losses(self, images: list[Tensor], targets: list[dict[str, Any]]) -> dict[str, Tensor]:
        device = self.device
        images = [image.to(device, non_blocking=True) for image in images]
        on_device = [{k: t[k].to(device, non_blocking=True) for k in ("boxes", "labels")} for t in targets]
        return self.parallel(images, on_device)

    def compile(self) -> None:
        # Losses, box decoding and NMS depend on the data at every step: compiling them would be for nothing.
        model: Any = self.model
        model.backbone.compile()
        if hasattr(model, "head"):
            model.head.compile()

    def begin_epoch(self) -> None:
        super().begin_epoch()
        train, progress = self.config.train, self.progress
        # As it stood at the start of the epoch, also for a run that is resumed within it.
        done = self.share_done() if train.minutes is not None else progress.epoch / train.epochs
        self.batches.mix = done < 1 - self.config.data.augment.no_mixing_last
        self.batches.short_side = self.config.data.side_at(done)

    def show(self, monitor: Monitor, images: list[Tensor], targets: list[dict[str, Any]]) -> None:
        monitor.image("train_batch", training_grid(images[:16], targets[:16], self.classes.names), self.progress.step)

    def save_best(self, numbers: Mapping[str, Any]) -> None:
        """Write best.pt, and let best_predictions.json be predictions.json as it is now."""
        super().save_best(numbers)
        second_name(self.folder / "predictions.json", self.folder / "best_predictions.json")

    def settle(self, monitor: Monitor) -> None:
        super().settle(monitor)
        if distributed.is_main():
            remove_pending(self.folder)

    def take_score(self, monitor: Monitor) -> None:
        start, epoch = time.monotonic(), self.progress.evaluated
        pending = self.pending or Pending.resume(self.folder, epoch, self.val_index, self.config.eval.backend)
        if pending is None:
            # The user went back to previous.pt after a run's end: its score was taken in then.
            log.warning("the evaluation after epoch %d is not there any more: its line in metrics.jsonl counts", epoch)
            self.is_best(monitor.recorded(epoch, "AP"), epoch)
            return
        evaluation = pending.wait()
        self.pending = None
        self.conclude(monitor, evaluation, pending.record, pending.save_best, time.monotonic() - start)

    def conclude(
        self,
        monitor: Monitor,
        evaluation: Evaluation,
        record: Mapping[str, Any],
        save_best: Callable[[Mapping[str, Any]], None],
        seconds: float,
    ) -> None:
        """What follows from a score: the line in metrics.jsonl, and best.pt.

        Args:
            record: that line, without the numbers.
            save_best: writes best.pt with these numbers.
            seconds: that the training stood still for it.
        """
        numbers = evaluation.to_json()
        ap = evaluation.numbers["AP"]
        better = self.is_best(ap, record["epoch"])
        if math.isnan(ap):
            log.warning("val has no ground truth: AP is undefined; the latest weights are kept as best.pt")
        if better or math.isnan(ap):
            save_best(numbers)
        line = {"epoch": record["epoch"], "step": record["step"], **numbers, **record}
        line["per_class"] = line.pop("per_class")
        monitor.evaluation(line)
        log.info(
            "epoch %d  loss %.3f  AP %.3f  AP50 %.3f  AP75 %.3f%s  (%.0f s training, %.1f s evaluation)",
            record["epoch"], math.nan if record["loss"] is None else record["loss"], ap,
            evaluation.numbers["AP50"], evaluation.numbers["AP75"],
            "  best so far" if better else "", record["seconds"], seconds,
        )  # fmt: skip
        if ap == 0 and self.share_done() > 0.3:
            log.warning(
                "AP is still 0: are images and boxes of one piece? Look at them with their boxes, and see that "
                "ground truth scored as its own detections gives AP 1.0"
            )

    def name_images(self, targets: list[dict[str, Any]]) -> str:
        return f"images with ids {', '.join(str(target['image_id']) for target in targets)} (look at their boxes)"


def build_run(config: DetectionConfig, device: torch.device | None = None) -> Run:
    """Build data, model and optimizer; `device` is that of the config where it is not given.

    Raises:
        UserError: anything wrong with config or data.
    """
    device = device or pick_device(config.device)
    seed_everything(config.seed, config.train.deterministic)
    train_set, val_set = build_dataset(config, "train"), build_dataset(config, "val")
    log.info("train: %s", train_set.index.report())
    log.info("val:   %s", val_set.index.report())
    check_same_classes(train_set.index, val_set.index)
    classes = Classes(train_set.index.class_names, tuple(train_set.index.category_ids.tolist()))

    model = build_model(config, len(classes.names))
    _say_how_it_starts(config)
    batch_size = config.data.batch_size
    batches = TrainBatchSampler(
        train_set.index.sizes,
        batch_size,
        config.seed,
        config.data.group_by_aspect,
        short_sides=config.data.multi_scale,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    run = Run(
        config=config,
        device=device,
        classes=classes,
        model=model,
        objective=model,
        batches=batches,
        train_loader=build_loader(train_set, batches, workers=config.data.workers, device=device),
        val_loader=eval_loader(val_set, config.eval.batch_size or batch_size, config.data.workers, device),
        val_index=val_set.index,
        bad_images=BadImages(config.data.max_bad_images),
    )
    part_ways(config.seed)
    return run


def _say_how_it_starts(config: DetectionConfig) -> None:
    spec = config.model.backbone
    if spec.weights is not None:
        return
    ignored = [key for key in ("frozen_stages", "freeze_bn") if getattr(spec, key)]
    log.warning(
        "TRAINING FROM SCRATCH: the backbone has random weights%s. Detectors need far longer this way, and on "
        "few images end lower; give model.backbone.weights a file or 'timm' to start from ImageNet.",
        f" (so {' and '.join(ignored)} is ignored: nothing is frozen)" if ignored else "",
    )
