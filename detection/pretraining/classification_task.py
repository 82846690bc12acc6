"""`run_pretraining`: from a config to a backbone's weights in its folder; and the dry run."""

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from backbones import WeightsError
from backbones.classifier import backbone_state, build_classifier, normalize
from detection.checkpoint import Classes
from detection.core import distributed
from detection.core.device import autocast, pick_device
from detection.core.errors import UserError
from detection.core.files import write_atomically
from detection.core.limits import parameter_limit
from detection.core.memory import memory_advice
from detection.core.progress import progress_bar
from detection.data.loader import iterate
from detection.engine.run_logger import Monitor, start_logging
from detection.engine.session import describe_machine, dry_run_report, duration, launch, try_steps
from detection.engine.signals import StopSignal
from detection.engine.trainer import TrainingRun, part_ways, seed_everything
from detection.pretraining.classification_config import ClassificationConfig
from detection.pretraining.distillation import Objective
from detection.pretraining.image_folders import batch_mixing, build_datasets, build_loaders, labels_of
from detection.pretraining.teacher import Teacher, build_teacher

log = logging.getLogger("detection")

FORMAT = "ghostnet-classification/1"


@dataclass(kw_only=True)
class ClassificationRun(TrainingRun):
    """A classifier's training in progress."""

    config: ClassificationConfig
    mixing: v2.Transform | None
    teacher: Teacher | None

    format = FORMAT

    def losses(self, images: Tensor, targets: list[dict[str, Any]]) -> dict[str, Tensor]:
        images = to_unit(images, self.device, self.config.train.channels_last)
        labels = labels_of(targets, self.device)
        if self.mixing is not None:
            images, labels = self.mixing(images, labels)
        # The teacher sees the very same image, mixed and cut as it is (arXiv 2106.05237).
        lesson = None if self.teacher is None else self.teacher(images)
        return self.parallel(images, labels, lesson)

    def name_images(self, targets: list[dict[str, Any]]) -> str:
        names = [target["name"] for target in targets]
        return f"images {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"

    def save_best(self, numbers: Any) -> None:
        """Write best.pt, and backbone.pth: what model.backbone.weights of a detector takes."""
        super().save_best(numbers)
        state = backbone_state(self.eval_model)
        write_atomically(self.folder / "backbone.pth", lambda file: torch.save(state, file))


def run_pretraining(config: ClassificationConfig, *, resume: bool = False) -> bool:
    """Train; results are in `config.output_dir`. Returns False where a signal stopped it (resume goes on).

    An earlier run in the same folder is moved aside, never overwritten.

    Raises:
        UserError: anything the user can mend, see its message.
    """
    return launch(config, build=build_run, evaluate=evaluate, describe=describe, summarize=_summarize, resume=resume)


def build_run(config: ClassificationConfig, device: torch.device | None = None) -> ClassificationRun:
    """Build data, network, teacher and optimizer; `device` is that of the config where it is not given.

    Raises:
        UserError: anything wrong with config or data.
    """
    device = device or pick_device(config.device)
    seed_everything(config.seed, config.train.deterministic)
    train_set, val_set = build_datasets(config)
    names = train_set.images.classes
    for split, data in (("train", train_set), ("val", val_set)):
        log.info("%-6s %s: %d images, %d classes", f"{split}:", data.images.root, len(data), len(names))
    model = _build_network(config, len(names))
    spec = config.teacher
    teacher = None if spec is None else build_teacher(spec, names, config.data.size, device)
    objective = Objective(model, config.train.label_smoothing, spec, teacher.taps if teacher else None)
    batches, train_loader, val_loader = build_loaders(config, train_set, val_set, device)
    run = ClassificationRun(
        config=config,
        device=device,
        classes=Classes(names, tuple(range(len(names)))),
        model=model,
        objective=objective,
        batches=batches,
        train_loader=train_loader,
        val_loader=val_loader,
        mixing=batch_mixing(config.data.augment, len(names)),
        teacher=teacher,
    )
    part_ways(config.seed)
    return run


def _build_network(config: ClassificationConfig, num_classes: int) -> nn.Module:
    spec, size = config.model, config.data.size
    try:
        with parameter_limit({"model.name": spec.name, "model.width": spec.width, "classes": num_classes}):
            model = build_classifier(spec.name, num_classes=num_classes, **spec.model_dump(exclude={"name"}))
    except WeightsError as error:
        raise UserError(f"model.weights: {error}") from error
    except ValueError as error:
        raise UserError(f"model: {error}") from error
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"data.size: {spec.name} cannot take images of {size} px: {reason}") from error
    return model.train()


def to_unit(images: Tensor, device: torch.device, channels_last: bool) -> Tensor:
    """uint8 [N, 3, H, W] -> float32 in [0, 1] on the device; a quarter of the bytes travels."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return images.to(device, non_blocking=True).to(torch.float32, memory_format=layout) / 255


@torch.inference_mode()
def measure_accuracy(
    model: nn.Module, loader: DataLoader, device: torch.device, *, amp: str = "off", channels_last: bool = False
) -> dict[str, float]:
    """Share of the images whose class is the network's first guess (top1), one of its first five (top5), and the
    mean cross-entropy (val_loss); of several processes, over the shares of all. The model stays in its mode."""
    training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    bar = progress_bar(iterate(loader), "evaluate", len(loader), disable=not distributed.is_main())
    for images, targets in bar:
        labels = labels_of(targets, device)
        with autocast(device, amp):
            logits = model(normalize(to_unit(images, device, channels_last), model)).float()
        guesses = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([guesses[:, 0].sum(), guesses.sum(), loss, loss.new_tensor(len(labels))]).cpu()
    model.train(training)
    top1, top5, loss_sum, count = distributed.reduce_sum(sums.tolist())
    return {"top1": top1 / count, "top5": top5 / count, "val_loss": loss_sum / count}


def evaluate(run: ClassificationRun, monitor: Monitor, loss: float, stop: StopSignal) -> None:
    """Measure the evaluated weights on val; write metrics and, when they are the best so far, best.pt."""
    progress, train = run.progress, run.config.train
    start = time.monotonic()
    with stop.interruptible():
        numbers = measure_accuracy(
            run.eval_model, run.val_loader, run.device, amp=train.amp, channels_last=train.channels_last
        )
    if not distributed.is_main():
        return
    better = run.keep_if_best(numbers["top1"], numbers)
    record: dict[str, Any] = {"epoch": progress.epoch, "step": progress.step, **numbers}
    record |= {"loss": None if math.isnan(loss) else loss, "seconds": run.seconds()}
    monitor.evaluation(record)
    log.info(
        "epoch %d  loss %.3f  val loss %.3f  top-1 %.2f %%  top-5 %.2f %%%s  (%.0f s training, %.1f s evaluation)",
        progress.epoch, loss, numbers["val_loss"], 100 * numbers["top1"], 100 * numbers["top5"],
        "  best so far" if better else "", run.seconds(), time.monotonic() - start,
    )  # fmt: skip


def dry_run(config: ClassificationConfig) -> str:
    """Build everything, run one batch of training and one of evaluation, write nothing; returns what was seen."""
    start_logging()
    with memory_advice(config):
        return _dry_run(config)


def _dry_run(config: ClassificationConfig) -> str:
    run = build_run(config)
    images, _, losses, seconds = try_steps(run)
    val_images, _ = next(iterate(run.val_loader))
    run.model.eval()
    start = time.perf_counter()
    with torch.inference_mode(), autocast(run.device, config.train.amp):
        inputs = to_unit(val_images, run.device, config.train.channels_last)
        run.model(normalize(inputs, run.model)).sum().item()
    val_seconds = time.perf_counter() - start
    return dry_run_report(
        run,
        describe(run),
        train_batch=f"{list(images.shape)}",
        seconds=seconds,
        losses=losses,
        val_batch=f"{list(val_images.shape)}",
        val_seconds=val_seconds,
    )


def describe(run: ClassificationRun) -> str:
    """What is about to be trained, in two lines."""
    spec = run.config.model
    sizes = {parameter.data_ptr(): parameter.numel() for parameter in run.model.parameters()}
    whole = sum(sizes.values())
    kept = sum(sizes.get(tensor.data_ptr(), 0) for tensor in backbone_state(run.model).values())
    taught = f", taught by {run.config.teacher.name}" if run.config.teacher else ""
    return (
        f"classifier {spec.name} {spec.width:g}, {len(run.classes.names)} classes{taught}: {whole / 1e6:.2f} M "
        f"parameters, {kept / 1e6:.2f} M of them in the backbone\n{describe_machine(run)}"
    )


def _summarize(run: ClassificationRun) -> str:
    progress, folder = run.progress, run.folder
    best = "none" if progress.best is None else f"{100 * progress.best:.2f} % after epoch {progress.best_epoch}"
    return (
        f"\ndone: {progress.epoch} epochs, {progress.step} steps in {duration(run.seconds())}; best top-1 {best}\n"
        f"  backbone     {folder / 'backbone.pth'}\n"
        f"  classifier   {folder / 'best.pt'}\n"
        f"  all numbers  {folder / 'metrics.jsonl'}   (tensorboard --logdir {folder})\n"
        f"  next         {_next_command(run.config, folder)}"
    )


def _next_command(config: ClassificationConfig, folder: Path) -> str:
    if config.model.name == "ghost_resnet56":
        return "nothing: its maps have strides 1, 2 and 4, which no detector here reads"
    if config.model.ratio not in (None, 2) or config.model.kernel_size not in (None, 3):
        return f"a detector's {config.model.name} has ratio 2 and kernel_size 3: it cannot take these weights"
    width = "" if config.model.width == 1 else f" model.backbone.width={config.model.width:g}"
    return (
        f"python tools/train.py configs/retina_ghost_320.yaml model.backbone.name={config.model.name}{width} "
        f"model.backbone.weights={folder / 'backbone.pth'} …"
    )
