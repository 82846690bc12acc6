"""`run_training`: from a config to a finished run in its folder; and the dry run."""

import logging
import os
import platform
import time
from pathlib import Path

import torch

from detection.checkpoint import read_checkpoint
from detection.config import Config, save_config
from detection.data.loader import iterate
from detection.device import autocast
from detection.errors import UserError
from detection.training.loop import optimizer_step, train, train_step
from detection.training.monitor import Monitor, start_logging
from detection.training.state import Run, build_run

log = logging.getLogger("detection")


def run_training(config: Config, *, resume: bool = False) -> bool:
    """Train; results are in `config.output_dir`. Returns False where a signal stopped it (resume goes on).

    An earlier run in the same folder is moved aside, never overwritten.

    Raises:
        UserError: anything the user can mend, see its message.
    """
    folder = Path(config.output_dir)
    if resume and not (folder / "last.pt").is_file():
        raise UserError(f"--resume: there is no {folder / 'last.pt'} to go on from")
    start_logging()
    run = build_run(config)
    moved = None if resume else _make_room(folder)
    _check_writable(folder)
    start_logging(folder / "train.log")
    if moved is not None:
        log.info("the earlier run in %s was moved to %s", folder, moved)
    if resume:
        run.load(folder / "last.pt")
        log.info("resumed after epoch %d, step %d", run.progress.epoch, run.progress.step)
    save_config(config, folder / "config.yaml")
    log.info("%s", describe(run))
    monitor = Monitor(folder, run.progress.step)
    try:
        finished = train(run, monitor)
    except KeyboardInterrupt:  # a second one, or one between steps: what was saved last is what there is
        finished = False
    finally:
        monitor.close()
    if not finished:
        if (folder / "last.pt").exists():
            log.info("stopped at step %d; go on with the same command and --resume", run.progress.step)
        else:
            log.info("stopped before the first checkpoint was written")
        return False
    log.info("%s", _summary(run))
    return True


def dry_run(config: Config) -> str:
    """Build everything, run one batch of training and one of evaluation, write nothing; returns what was seen."""
    start_logging()
    run = build_run(config)
    run.model.train()
    images, targets = next(iterate(run.train_loader))
    seconds = []
    # The first step prepares kernels; the second one is what a step costs.
    for _ in range(2):
        start = time.perf_counter()
        losses = train_step(run, images, targets, group=1)
        optimizer_step(run)
        seconds.append(time.perf_counter() - start)
    run.model.eval()
    val_images, _ = next(iterate(run.val_loader))
    start = time.perf_counter()
    with torch.inference_mode(), autocast(run.device, config.train.amp):
        detections = run.model([image.to(run.device) for image in val_images])
    val_seconds = time.perf_counter() - start
    if config.train.minutes is not None:
        expected = (
            f"{config.train.minutes:g} min by train.minutes, about {int(60 * config.train.minutes / seconds[1])} steps"
        )
    else:
        steps = len(run.batches) * config.train.epochs
        evaluations = config.train.epochs // config.train.eval_every * len(run.val_loader) * val_seconds
        expected = f"{_duration(steps * seconds[1] + evaluations)} ({steps} steps and the evaluations)"
    boxes = sum(len(target["boxes"]) for target in targets)
    return "\n".join(
        [
            describe(run),
            f"train batch    {len(images)} images of {_shapes(images)}, {boxes} boxes; "
            f"{seconds[1]:.2f} s a step (the first {seconds[0]:.2f} s)",
            "losses         " + ", ".join(f"{name} {value:.3f}" for name, value in losses.items()),
            f"val batch      {len(val_images)} images of {_shapes(val_images)}, {val_seconds:.2f} s, "
            f"{sum(len(d['boxes']) for d in detections)} detections",
            f"peak memory    {_peak_memory(run.device)}",
            f"expected time  {expected}",
            "dry run: nothing was written",
        ]
    )


def describe(run: Run) -> str:
    """What is about to be trained, in two lines."""
    spec = run.config.model
    parts = {"backbone": 0, "rest": 0}
    for name, parameter in run.model.named_parameters():
        parts["backbone" if name.startswith("backbone.body.") else "rest"] += parameter.numel()
    device = (
        torch.cuda.get_device_name(run.device)
        if run.device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    return (
        f"{spec.detector} on {spec.backbone.name} {spec.backbone.width:g}, {len(run.classes.names)} classes: "
        f"{parts['backbone'] / 1e6:.2f} M parameters in the backbone, {parts['rest'] / 1e6:.2f} M in neck and head\n"
        f"device {run.device} ({device}), torch {torch.__version__}, Python {platform.python_version()}, "
        f"batch {run.config.data.batch_size} x {run.config.train.accumulate}, lr {run.lr:g}"
    )


def _make_room(folder: Path) -> Path | None:
    """Move a folder that holds a run to the first free name beside it."""
    if not any((folder / name).exists() for name in ("last.pt", "best.pt", "metrics.jsonl")):
        return None
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old{number}")).exists():
        number += 1
    try:
        folder.rename(aside)
    except OSError as error:
        raise UserError(f"the earlier run in {folder} could not be moved to {aside}: {error.strerror}") from None
    return aside


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"output_dir {folder} cannot be written to: {error.strerror}") from None


def _summary(run: Run) -> str:
    progress, folder = run.progress, run.folder
    best = "undefined" if progress.best is None else f"{progress.best:.3f} after epoch {progress.best_epoch}"
    numbers = read_checkpoint(folder / "best.pt")["numbers"]
    ap50 = "" if numbers["AP50"] is None else f", AP50 {numbers['AP50']:.3f}"
    return (
        f"\ndone: {progress.epoch} epochs, {progress.step} steps in {_duration(run.seconds())}; best AP {best}{ap50}\n"
        f"  weights      {folder / 'best.pt'}\n"
        f"  all numbers  {folder / 'metrics.jsonl'}   (tensorboard --logdir {folder})\n"
        f"  detections   {folder / 'predictions.json'}\n"
        f"  next         python tools/detect.py {folder / 'best.pt'} PICTURES --out {folder / 'pictures'}"
    )


def _shapes(images: list[torch.Tensor]) -> str:
    shapes = sorted({f"{image.shape[2]}x{image.shape[1]}" for image in images})
    return ", ".join(shapes[:3]) + (", …" if len(shapes) > 3 else "")


def _peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on the GPU"
    try:
        import resource
    except ImportError:
        return "not known on this system"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return f"{peak / (2**30 if platform.system() == 'Darwin' else 2**20):.2f} GiB (this process)"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
