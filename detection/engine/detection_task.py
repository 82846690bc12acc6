"""Training of a detector: its losses, its predictions on val and their score, and how to build its trainer."""

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from detection.checkpoint import Classes, read_checkpoint
from detection.config import DetectionConfig
from detection.core import distributed
from detection.core.commands import command
from detection.core.device import memory_in_use, pick_device
from detection.core.errors import UserError
from detection.core.files import link_or_copy
from detection.data.annotations import Annotations
from detection.data.combine import class_ids, set_names
from detection.data.dataset import DetectionDataset, build_dataset
from detection.data.load_split import check_known_classes, check_same_classes
from detection.data.loader import BadImages, build_loader
from detection.data.sampler import TrainBatchSampler
from detection.engine.detection_teacher import DetectionTeacher
from detection.engine.image_grids import detections_grid, training_grid
from detection.engine.seeding import seed_everything, seed_rank
from detection.engine.task import Task
from detection.engine.trainer import Trainer
from detection.engine.training_progress import TrainingProgress
from detection.evaluation.background_scoring import BackgroundScoring
from detection.evaluation.coco_evaluator import (
    METRICS,
    CocoEvaluator,
    Evaluation,
    Result,
    check_results,
    write_results,
)
from detection.evaluation.detect_dataset import detect_dataset, eval_loader
from detection.evaluation.score import category_ids_of
from detection.initial_weights import freeze_parts, load_initial_weights
from detection.models.build import build_model
from detection.runtime.pytorch import predict_batch
from detection.zoo.names import find_detector

log = logging.getLogger("detection")

TARGET_FIELDS = ("boxes", "labels", "scores", "ignored_boxes", "ignored_labels", "complete_classes")
"""What a detector gets of a target for its losses, see `detection.models.background`."""


@dataclass
class ValSet:
    """A data set to evaluate on."""

    name: str
    annotations: Annotations
    loader: DataLoader
    backend: str

    @cached_property
    def evaluator(self) -> CocoEvaluator:
        return CocoEvaluator(self.annotations, self.backend)


@dataclass
class DetectionTask(Task):
    """Trains a detector, scored by COCO's AP, of several val sets by the mean of theirs.

    Its predictions are COCO results (`Result`), those of each val set in one list: [[…], […]], or […] for a single set.
    """

    config: DetectionConfig
    device: torch.device
    classes: Classes
    val_sets: list[ValSet]
    teacher: DetectionTeacher | None = None

    metric = "AP"
    zero_score_advice = (
        "AP is still 0: do images and boxes belong together? Look at train_batch.jpg, and check that ground truth, "
        "scored as detections, has AP 1.0"
    )

    def __post_init__(self) -> None:
        self.background = self.config.eval.background
        # What draws and tries a batch uses the first set.
        self.val_loader, self.val_annotations = self.val_sets[0].loader, self.val_sets[0].annotations

    # ---- Training

    def losses(self, objective: nn.Module, images: list[Tensor], targets: list[dict[str, Any]]) -> dict[str, Tensor]:
        device = self.device
        if self.teacher is not None:
            targets = self.teacher(images, targets)
        images = [image.to(device, non_blocking=True) for image in images]
        on_device = [{k: t[k].to(device, non_blocking=True) for k in TARGET_FIELDS if k in t} for t in targets]
        return objective(images, on_device)

    def compile(self, model: Any) -> None:
        # Losses, box decoding and NMS depend on the data at every step: compiled code would be of no use.
        model.backbone.compile()
        if hasattr(model, "head"):
            model.head.compile()

    def epoch_options(self, done: float) -> dict[str, Any]:
        data = self.config.data
        return {"mix": done < 1 - data.augment.no_mixing_last, "short_side": data.side_at(done)}

    def draw_batch(self, images: list[Tensor], targets: list[dict[str, Any]]) -> np.ndarray:
        return training_grid(images[:16], targets[:16], self.classes.names)

    def name_images(self, targets: list[dict[str, Any]]) -> str:
        return f"images with ids {', '.join(str(target['image_id']) for target in targets)} (look at their boxes)"

    # ---- Evaluation

    def val_batches(self) -> int:
        return sum(len(val.loader) for val in self.val_sets)

    def predict(self, model: nn.Module) -> list[Any]:
        found = []
        for val in self.val_sets:
            category_ids = category_ids_of(self.classes, val.annotations)
            own = detect_dataset(model, val.loader, category_ids, self.device, amp=self.config.train.amp)
            found.append([result for results in distributed.gather(own) for result in results])
        return found if self._several else found[0]

    @property
    def _several(self) -> bool:
        return isinstance(self.config.data.val, list)

    def _by_set(self, predictions: list[Any]) -> list[tuple[ValSet, list[Result]]]:
        return list(zip(self.val_sets, predictions if self._several else [predictions], strict=True))

    def score(self, predictions: list[Any]) -> dict[str, Any]:
        evaluations = []
        for val, results in self._by_set(predictions):
            val.evaluator.reset()
            val.evaluator.update(results)
            evaluations.append(val.evaluator.compute())
        return self._numbers(evaluations)

    def start_scoring(self, predictions: list[Any]) -> Callable[[], dict[str, Any]]:
        started = [BackgroundScoring(val.annotations, found, val.backend) for val, found in self._by_set(predictions)]
        return lambda: self._numbers([scoring.wait() for scoring in started])

    def _numbers(self, evaluations: Sequence[Evaluation]) -> dict[str, Any]:
        """Of several sets: the mean of each metric over the sets where it is defined, and all numbers of each set."""
        numbers = [evaluation.to_json() for evaluation in evaluations]
        if not self._several:
            return numbers[0]
        mean: dict[str, Any] = {}
        for metric in METRICS:
            defined = [of_set[metric] for of_set in numbers if of_set[metric] is not None]
            mean[metric] = sum(defined) / len(defined) if defined else None
        return {**mean, "sets": {val.name: of_set for val, of_set in zip(self.val_sets, numbers, strict=True)}}

    def check_predictions(self, predictions: Any, source: str) -> None:
        if self._several and (not isinstance(predictions, list) or len(predictions) != len(self.val_sets)):
            raise UserError(f"{source}: expected are detections of {len(self.val_sets)} val sets")
        for val, results in self._by_set(predictions):
            check_results(val.annotations, results, source)

    def score_text(self, numbers: Mapping[str, Any]) -> str:
        values = {key: math.nan if numbers[key] is None else numbers[key] for key in ("AP", "AP50", "AP75")}
        text = "  ".join(f"{key} {value:.3f}" for key, value in values.items())
        aps = {name: of_set["AP"] for name, of_set in numbers.get("sets", {}).items()}
        parts = [f"{name} {math.nan if ap is None else ap:.3f}" for name, ap in aps.items()]
        return f"{text}  (AP of {', '.join(parts)})" if parts else text

    def resource_usage(self) -> dict[str, Any]:
        return {"memory_mb": memory_in_use()}

    def save_predictions(self, predictions: list[Any], folder: Path, *, best: bool = False) -> None:
        """predictions.json, or best_predictions.json; of a further val set predictions_NAME.json."""
        for name, (_, results) in zip(self._prediction_files(), self._by_set(predictions), strict=True):
            write_results(folder / f"{'best_' if best else ''}{name}", results)

    def _prediction_files(self) -> list[str]:
        names = [re.sub(r"[^\w.-]+", "_", val.name) for val in self.val_sets[1:]]
        return ["predictions.json", *(f"predictions_{name}.json" for name in names)]

    def draw_predictions(self, predictions: list[Any]) -> np.ndarray:
        dataset = self.val_loader.dataset
        assert isinstance(dataset, DetectionDataset)
        _, results = self._by_set(predictions)[0]
        return detections_grid(dataset, results, self.classes.ids, self.classes.names)

    def save_best_extras(self, model: nn.Module, folder: Path) -> None:
        """Let best_predictions.json be a second name of predictions.json."""
        for name in self._prediction_files():
            link_or_copy(folder / name, folder / f"best_{name}")

    # ---- Descriptions

    def describe(self, model: nn.Module) -> str:
        spec = self.config.model
        sizes = {"backbone": 0, "rest": 0}
        for name, parameter in model.named_parameters():
            sizes["backbone" if name.startswith("backbone.body.") else "rest"] += parameter.numel()
        return (
            f"{spec.detector} on {spec.backbone.name} {spec.backbone.width:g}, {len(self.classes.names)} classes: "
            f"{sizes['backbone'] / 1e6:.2f} M parameters in the backbone, {sizes['rest'] / 1e6:.2f} M in neck and head"
        )

    def summarize(self, progress: TrainingProgress, folder: Path) -> str:
        best = "undefined" if progress.best is None else f"{progress.best:.3f} after epoch {progress.best_epoch}"
        numbers = read_checkpoint(folder / "best.pt").get("numbers", {}) if (folder / "best.pt").exists() else {}
        ap50 = "" if numbers.get("AP50") is None else f", AP50 {numbers['AP50']:.3f}"
        return (
            f"best AP {best}{ap50}\n"
            f"  weights      {folder / 'best.pt'}\n"
            f"  all numbers  {folder / 'metrics.jsonl'}   (tensorboard --logdir {folder})\n"
            f"  detections   {folder / 'predictions.json'}\n"
            f"  next         {command('detect')} {folder / 'best.pt'} IMAGES --out {folder / 'detections'}"
        )

    def describe_batch(self, images: list[Tensor], targets: list[dict[str, Any]] | None = None) -> str:
        shapes = sorted({f"{image.shape[2]}x{image.shape[1]}" for image in images})
        boxes = "" if targets is None else f", {sum(len(target['boxes']) for target in targets)} boxes"
        return f"{len(images)} images of {', '.join(shapes[:3])}{', …' if len(shapes) > 3 else ''}{boxes}"

    def try_prediction(self, model: nn.Module, images: list[Tensor]) -> str:
        detections = predict_batch(model, images, self.device, self.config.train.amp)
        return f"{sum(len(d['boxes']) for d in detections)} detections"


def build_trainer(config: DetectionConfig, device: torch.device | None = None) -> Trainer:
    """Build data, model and optimizer.

    Args:
        device: None takes that of the config.

    Raises:
        UserError: anything wrong with config or data.
    """
    device = device or pick_device(config.device)
    seed_everything(config.seed, config.train.deterministic)
    data = config.data
    train_set = build_dataset(config, "train")
    log.info("train: %s", train_set.annotations.report())
    val_sets = []
    for number, name in enumerate(set_names(data.val_sources())):
        dataset = build_dataset(config, "val", number)
        loader = eval_loader(dataset, config.eval.batch_size or data.batch_size, data.workers, device)
        val_sets.append(ValSet(name, dataset.annotations, loader, config.eval.backend))
        log.info("val:   %s", dataset.annotations.report())
    classes = _common_classes(config, train_set.annotations, [val.annotations for val in val_sets])
    teacher = None if config.train.teacher is None else DetectionTeacher(config, classes.names, device)
    _check_background(train_set.annotations, teacher)

    model = build_model(config, len(classes.names))
    if config.model.weights is not None:
        load_initial_weights(model, config, classes.names, find_detector(config.model.weights))
    freeze_parts(model, config.model)
    _warn_of_random_weights(config)
    sampler = TrainBatchSampler(
        train_set.annotations.sizes,
        data.batch_size,
        config.seed,
        data.group_by_aspect,
        short_sides=data.multi_scale,
        sets=train_set.annotations.sets,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    trainer = Trainer(
        config=config,
        device=device,
        task=DetectionTask(config, device, classes, val_sets, teacher),
        model=model,
        objective=model,
        sampler=sampler,
        train_loader=build_loader(train_set, sampler, workers=data.workers, device=device),
        bad_images=BadImages(data.max_bad_images),
    )
    seed_rank(config.seed)
    return trainer


def _check_background(train: Annotations, teacher: DetectionTeacher | None) -> None:
    """Raise UserError for classes that neither a set nor the teacher is complete for."""
    if train.sets is None:
        return
    complete = train.sets.complete.any(axis=0) | (False if teacher is None else teacher.known.numpy())
    if nowhere := [train.class_names[k] for k in np.flatnonzero(~complete)]:
        raise UserError(
            f"no set of data.train is complete for {', '.join(nowhere[:5])}{', …' if len(nowhere) > 5 else ''}: "
            "without background no detector learns a class. Name these classes in complete_classes of the sets in "
            "which every object of theirs has a box, leave them out with data.classes, or name a train.teacher that "
            "knows them"
        )


def _common_classes(config: DetectionConfig, train: Annotations, vals: Sequence[Annotations]) -> Classes:
    """The classes to train, with ids of the first set of val with the class, in which results are scored.

    Raises:
        UserError: val has other classes, or the detector cannot be trained on incomplete annotations.
    """
    complete = np.ones((1, len(train.class_names)), bool) if train.sets is None else train.sets.complete
    if not complete.all() and config.model.detector == "faster_rcnn":
        raise UserError(
            "model.detector faster_rcnn needs annotations of all classes in every set of data.train: the scores of a "
            "proposal are one softmax over all classes and the background. Use ghostdet or retinanet, or select "
            f"classes that all sets have with data.classes ({'; '.join(train.notes)})"
        )
    if not config.data.has_lists:
        check_same_classes(train, vals[0])
        return Classes(train.class_names, tuple(train.category_ids.tolist()))
    for val in vals:
        check_known_classes(train, val)
    return Classes(train.class_names, class_ids(train.class_names, [*vals, train]))


def _warn_of_random_weights(config: DetectionConfig) -> None:
    spec = config.model.backbone
    if spec.weights is not None or config.model.weights is not None:
        return
    ignored = [key for key in ("frozen_stages", "freeze_bn") if getattr(spec, key)]
    log.warning(
        "TRAINING FROM SCRATCH: the backbone has random weights%s. Detectors need far longer this way, and on "
        "few images end lower; give model.weights a trained detector, or model.backbone.weights a file or 'timm'.",
        f" (so {' and '.join(ignored)} is ignored: nothing is frozen)" if ignored else "",
    )
