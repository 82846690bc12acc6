"""Training of a classifier, whose backbone a detector then starts from; `run_pretraining` and the dry run."""

import logging
from collections.abc import Mapping
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
from detection.core.commands import command
from detection.core.device import autocast, pick_device
from detection.core.errors import UserError
from detection.core.files import write_atomically
from detection.core.limits import parameter_limit
from detection.core.progress import progress_bar
from detection.data.loader import iterate
from detection.engine import dry_run as dry_runs
from detection.engine.seeding import seed_everything, seed_rank
from detection.engine.session import run_session
from detection.engine.task import Task
from detection.engine.trainer import Trainer
from detection.engine.training_progress import TrainingProgress
from detection.pretraining.classification_config import ClassificationConfig
from detection.pretraining.distillation import DistillationObjective
from detection.pretraining.image_folders import batch_mixing, build_datasets, build_loaders, labels_of
from detection.pretraining.teacher import Teacher, build_teacher

log = logging.getLogger("detection")

FORMAT = "ghostnet-classification/1"


@dataclass
class ClassificationTask(Task):
    """Trains a classifier, scored by its top-1 accuracy. Its predictions are the numbers of `measure_accuracy`."""

    config: ClassificationConfig
    device: torch.device
    classes: Classes
    val_loader: DataLoader
    mixing: v2.Transform | None
    teacher: Teacher | None

    format = FORMAT
    metric = "top1"

    # ---- Training

    def losses(self, objective: nn.Module, images: Tensor, targets: list[dict[str, Any]]) -> dict[str, Tensor]:
        images = to_unit(images, self.device, self.config.train.channels_last)
        labels = labels_of(targets, self.device)
        if self.mixing is not None:
            images, labels = self.mixing(images, labels)
        # The teacher gets the same images, cropped and mixed (arXiv 2106.05237).
        teacher_output = None if self.teacher is None else self.teacher(images)
        if self.config.data.format == "unlabelled":
            assert teacher_output is not None
            labels = teacher_output.logits.argmax(1)
        return objective(images, labels, teacher_output)

    def name_images(self, targets: list[dict[str, Any]]) -> str:
        names = [target["name"] for target in targets]
        return f"images {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"

    # ---- Evaluation

    def predict(self, model: nn.Module) -> dict[str, float]:
        train = self.config.train
        teacher = self.teacher if self.config.data.format == "unlabelled" else None
        return measure_accuracy(
            model, self.val_loader, self.device, teacher, amp=train.amp, channels_last=train.channels_last
        )

    def score(self, predictions: dict[str, float]) -> dict[str, Any]:
        return predictions

    def score_text(self, numbers: Mapping[str, Any]) -> str:
        return (
            f"val loss {numbers['val_loss']:.3f}  top-1 {100 * numbers['top1']:.2f} %  "
            f"top-5 {100 * numbers['top5']:.2f} %"
        )

    def save_best_extras(self, model: nn.Module, folder: Path) -> None:
        """Write backbone.pth, for model.backbone.weights of a detector."""
        state = backbone_state(model)
        write_atomically(folder / "backbone.pth", lambda file: torch.save(state, file))

    # ---- Descriptions

    def describe(self, model: nn.Module) -> str:
        spec = self.config.model
        sizes = {parameter.data_ptr(): parameter.numel() for parameter in model.parameters()}
        whole = sum(sizes.values())
        kept = sum(sizes.get(tensor.data_ptr(), 0) for tensor in backbone_state(model).values())
        taught = f", taught by {self.config.teacher.name}" if self.config.teacher else ""
        return (
            f"classifier {spec.name} {spec.width:g}, {len(self.classes.names)} classes{taught}: {whole / 1e6:.2f} M "
            f"parameters, {kept / 1e6:.2f} M of them in the backbone"
        )

    def summarize(self, progress: TrainingProgress, folder: Path) -> str:
        best = "none" if progress.best is None else f"{100 * progress.best:.2f} % after epoch {progress.best_epoch}"
        return (
            f"best top-1 {best}\n"
            f"  backbone     {folder / 'backbone.pth'}\n"
            f"  classifier   {folder / 'best.pt'}\n"
            f"  all numbers  {folder / 'metrics.jsonl'}   (tensorboard --logdir {folder})\n"
            f"  next         {_next_command(self.config, folder)}"
        )

    def describe_batch(self, images: Tensor, targets: list[dict[str, Any]] | None = None) -> str:
        return f"{list(images.shape)}"

    def try_prediction(self, model: nn.Module, images: Tensor) -> str:
        with torch.inference_mode(), autocast(self.device, self.config.train.amp):
            inputs = to_unit(images, self.device, self.config.train.channels_last)
            model(normalize(inputs, model)).sum().item()
        return ""


def run_pretraining(config: ClassificationConfig, *, resume: bool = False) -> bool:
    """Train a classifier; the results are in `config.output_dir`. Returns False if a signal stopped the training.

    An earlier run in the same folder is moved aside, never overwritten.

    Args:
        resume: continue from the folder's last.pt.

    Raises:
        UserError: anything that the user can correct; see its message.
    """
    return run_session(config, build_trainer, resume=resume)


def dry_run(config: ClassificationConfig) -> str:
    """Build everything, run one batch of training and one of evaluation; write nothing. Returns a report."""
    return dry_runs.dry_run(config, build_trainer)


def build_trainer(config: ClassificationConfig, device: torch.device | None = None) -> Trainer:
    """Build data, network, teacher and optimizer.

    Args:
        device: None takes that of the config.

    Raises:
        UserError: anything wrong with config or data.
    """
    device = device or pick_device(config.device)
    seed_everything(config.seed, config.train.deterministic)
    train_set, val_set = build_datasets(config)
    spec = config.teacher
    unlabelled = config.data.format == "unlabelled"
    known = None if unlabelled else train_set.images.classes
    teacher = None if spec is None else build_teacher(spec, known, config.data.size, device)
    names = teacher.class_names if unlabelled and teacher else train_set.images.classes
    for split, data in (("train", train_set), ("val", val_set)):
        of_teacher = " of the teacher" if unlabelled else ""
        log.info("%-6s %s: %d images, %d classes%s", f"{split}:", data.images.root, len(data), len(names), of_teacher)
    model = _build_network(config, len(names))
    objective = DistillationObjective(model, config.train.label_smoothing, spec, teacher.taps if teacher else None)
    sampler, train_loader, val_loader = build_loaders(config, train_set, val_set, device)
    classes = Classes(names, tuple(range(len(names))))
    mixing = batch_mixing(config.data.augment, len(names))
    trainer = Trainer(
        config=config,
        device=device,
        task=ClassificationTask(config, device, classes, val_loader, mixing, teacher),
        model=model,
        objective=objective,
        sampler=sampler,
        train_loader=train_loader,
    )
    seed_rank(config.seed)
    return trainer


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
    """uint8 [N, 3, H, W] -> float32 in [0, 1] on the device. It copies uint8 there, a quarter of the bytes."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return images.to(device, non_blocking=True).to(torch.float32, memory_format=layout) / 255


@torch.inference_mode()
def measure_accuracy(
    model: nn.Module,
    loader: DataLoader,
    device: torch.device,
    teacher: Teacher | None = None,
    *,
    amp: str = "off",
    channels_last: bool = False,
) -> dict[str, float]:
    """Accuracy and loss on all images, the same in each process; each measures its part of the images.

    Args:
        teacher: its most likely class is the label of each image; None takes the loader's labels.

    Returns:
        top1, top5: share of the images with the right class as the first, or among the first five, of the network.
        val_loss: mean cross-entropy.
    """
    training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    bar = progress_bar(iterate(loader), "evaluate", len(loader))
    for images, targets in bar:
        inputs = to_unit(images, device, channels_last)
        labels = labels_of(targets, device) if teacher is None else teacher(inputs).logits.argmax(1)
        with autocast(device, amp):
            logits = model(normalize(inputs, model)).float()
        guesses = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([guesses[:, 0].sum(), guesses.sum(), loss, loss.new_tensor(len(labels))]).cpu()
    model.train(training)
    top1, top5, loss_sum, count = distributed.reduce_sum(sums.tolist())
    return {"top1": top1 / count, "top5": top5 / count, "val_loss": loss_sum / count}


def _next_command(config: ClassificationConfig, folder: Path) -> str:
    if config.model.name == "ghost_resnet56":
        return "nothing: its maps have strides 1, 2 and 4, which no detector here reads"
    if config.model.ratio not in (None, 2) or config.model.kernel_size not in (None, 3):
        return f"a detector's {config.model.name} has ratio 2 and kernel_size 3: it cannot take these weights"
    width = "" if config.model.width == 1 else f" model.backbone.width={config.model.width:g}"
    return (
        f"{command('train')} retina_ghost_320 model.backbone.name={config.model.name}{width} "
        f"model.backbone.weights={folder / 'backbone.pth'} …"
    )
