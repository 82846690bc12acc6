"""`run_training`: from a config to a finished detector in its folder; and the dry run."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from detection.checkpoint import read_checkpoint
from detection.config import DetectionConfig
from detection.core.device import autocast
from detection.core.memory import memory_advice
from detection.data.loader import iterate
from detection.engine.detection_task import Run, build_run
from detection.engine.evaluations import evaluate
from detection.engine.run_logger import start_logging
from detection.engine.session import describe_machine, dry_run_report, duration, launch, try_steps


def run_training(
    config: DetectionConfig, *, resume: bool = False, on_finished: Callable[[Path], None] | None = None
) -> bool:
    """Train; results are in `config.output_dir`. Returns False where a signal stopped it (resume goes on).

    An earlier run in the same folder is moved aside, never overwritten.

    Args:
        on_finished: called with the folder of a finished run, in the main process alone.

    Raises:
        UserError: anything the user can mend, see its message.
    """
    return launch(
        config,
        build=build_run,
        evaluate=evaluate,
        describe=describe,
        summarize=_summarize,
        resume=resume,
        on_finished=on_finished,
    )


def dry_run(config: DetectionConfig) -> str:
    """Build everything, run one batch of training and one of evaluation, write nothing; returns what was seen."""
    start_logging()
    with memory_advice(config):
        return _dry_run(config)


def _dry_run(config: DetectionConfig) -> str:
    run = build_run(config)
    images, targets, losses, seconds = try_steps(run)
    run.model.eval()
    val_images, _ = next(iterate(run.val_loader))
    start = time.perf_counter()
    with torch.inference_mode(), autocast(run.device, config.train.amp):
        detections = run.model([image.to(run.device) for image in val_images])
    val_seconds = time.perf_counter() - start
    boxes = sum(len(target["boxes"]) for target in targets)
    return dry_run_report(
        run,
        describe(run),
        train_batch=f"{len(images)} images of {_shapes(images)}, {boxes} boxes",
        seconds=seconds,
        losses=losses,
        val_batch=f"{len(val_images)} images of {_shapes(val_images)}",
        val_seconds=val_seconds,
        found=f", {sum(len(d['boxes']) for d in detections)} detections",
    )


def describe(run: Run) -> str:
    """What is about to be trained, in two lines."""
    spec = run.config.model
    parts = {"backbone": 0, "rest": 0}
    for name, parameter in run.model.named_parameters():
        parts["backbone" if name.startswith("backbone.body.") else "rest"] += parameter.numel()
    return (
        f"{spec.detector} on {spec.backbone.name} {spec.backbone.width:g}, {len(run.classes.names)} classes: "
        f"{parts['backbone'] / 1e6:.2f} M parameters in the backbone, {parts['rest'] / 1e6:.2f} M in neck and head\n"
        f"{describe_machine(run)}"
    )


def _summarize(run: Run) -> str:
    progress, folder = run.progress, run.folder
    best = "undefined" if progress.best is None else f"{progress.best:.3f} after epoch {progress.best_epoch}"
    numbers = read_checkpoint(folder / "best.pt").get("numbers", {}) if (folder / "best.pt").exists() else {}
    ap50 = "" if numbers.get("AP50") is None else f", AP50 {numbers['AP50']:.3f}"
    return (
        f"\ndone: {progress.epoch} epochs, {progress.step} steps in {duration(run.seconds())}; best AP {best}{ap50}\n"
        f"  weights      {folder / 'best.pt'}\n"
        f"  all numbers  {folder / 'metrics.jsonl'}   (tensorboard --logdir {folder})\n"
        f"  detections   {folder / 'predictions.json'}\n"
        f"  next         python tools/detect.py {folder / 'best.pt'} IMAGES --out {folder / 'detections'}"
    )


def _shapes(images: list[torch.Tensor]) -> str:
    shapes = sorted({f"{image.shape[2]}x{image.shape[1]}" for image in images})
    return ", ".join(shapes[:3]) + (", …" if len(shapes) > 3 else "")
