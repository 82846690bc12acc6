"""Measure a training step and the loading of images against torchvision's plain ways, in one run.

"Plain" is what torchvision's detection references do with the same network, data and batch: PIL decodes, the image
goes through torchvision's transforms as a float tensor, `GeneralizedRCNNTransform` resizes and normalises it inside
the model, NCHW, torchvision's own loss, an optimizer made with its defaults.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms import v2

from detection import build_model
from detection.cli.arguments import ToolParser, positive
from detection.cli.run_tool import run_tool
from detection.config import DetectionConfig
from detection.config_io import load_config
from detection.core.errors import UserError
from detection.data.annotations import Annotations
from detection.data.loader import iterate
from detection.engine.detection_task import build_trainer
from detection.engine.loop import optimizer_step, train_step
from detection.engine.trainer import Trainer

EXAMPLE = """\
example:
  python tools/dev/training_speed.py configs/retina_ghost_320.yaml data.batch_size=8 \\
      data.train.annotations=mine/train.json data.val.annotations=mine/val.json
"""
Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


@dataclass(frozen=True)
class Comparison:
    """Seconds, medians over the rounds."""

    step: float
    plain_step: float
    image: float
    """From the file to the normalised batch."""
    plain_image: float
    steps: int
    workers: int

    def __str__(self) -> str:
        return "\n".join(
            [
                f"training step     {self.step:.3f} s, plain torchvision {self.plain_step:.3f} s: "
                f"{self.plain_step / self.step:.2f} times as fast (medians of {self.steps})",
                f"loading           {1 / self.image:.0f} images a second, plain torchvision "
                f"{1 / self.plain_image:.0f}: {self.plain_image / self.image:.2f} times as fast "
                f"(file to normalised batch, {self.workers} workers)",
            ]
        )


def compare_training(config: DetectionConfig, steps: int = 20) -> Comparison:
    """Time `steps` training steps each way, by turns, and an epoch of loading each way.

    Raises:
        UserError: not a RetinaNet, or anything wrong with config or data.
    """
    if config.model.detector != "retinanet":
        raise UserError("compared is torchvision's RetinaNet; use a config with model.detector=retinanet")
    trainer = build_trainer(config)
    plain = PlainTraining(config, trainer)
    ours = itertools.cycle(list(itertools.islice(iterate(trainer.train_loader), 8)))
    theirs = itertools.cycle(list(itertools.islice(plain.loader, 8)))
    trainer.model.train()

    def our_step() -> None:
        images, targets = next(ours)
        train_step(trainer, images, targets, group=1)
        optimizer_step(trainer)

    ways: list[tuple[Callable[[], None], list[float]]] = [(our_step, []), (lambda: plain.step(*next(theirs)), [])]
    for number in range(steps + 3):
        for step, seconds in ways:
            start = time.perf_counter()
            step()
            if trainer.device.type == "cuda":
                torch.cuda.synchronize()
            if number >= 3:  # the first ones prepare kernels
                seconds.append(time.perf_counter() - start)

    our_loading, plain_loading = [], []
    for _ in range(3):
        our_loading.append(_seconds_an_image(iterate(trainer.train_loader), trainer.model.transform))
        plain_loading.append(_seconds_an_image(plain.loader, plain.model.transform))
    return Comparison(
        step=statistics.median(ways[0][1]),
        plain_step=statistics.median(ways[1][1]),
        image=statistics.median(our_loading),
        plain_image=statistics.median(plain_loading),
        steps=steps,
        workers=config.data.workers,
    )


class PlainTraining:
    """torchvision's reference loop with the network of `config`."""

    def __init__(self, config: DetectionConfig, trainer: Trainer) -> None:
        self.device = trainer.device
        model: Any = build_model(config, len(trainer.task.classes.names))
        mean, std = model.backbone.body.mean, model.backbone.body.std
        model.transform = GeneralizedRCNNTransform(config.data.short_side, config.data.long_side, mean, std)
        self.model: Any = model.to(trainer.device).train()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optim = config.optim
        self.optimizer: torch.optim.Optimizer
        if optim.name == "sgd":
            self.optimizer = torch.optim.SGD(parameters, trainer.lr, optim.momentum, weight_decay=optim.weight_decay)
        else:
            self.optimizer = torch.optim.AdamW(parameters, trainer.lr, weight_decay=optim.weight_decay)
        self.loader = DataLoader(
            PlainDataset(trainer.train_loader.dataset.annotations),  # type: ignore[attr-defined]
            batch_size=config.data.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=config.data.workers,
            collate_fn=lambda samples: tuple(zip(*samples, strict=True)),
        )

    def step(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> None:
        images = [image.to(self.device) for image in images]
        targets = [{name: value.to(self.device) for name, value in target.items()} for target in targets]
        batch, targets = self.model.transform(images, targets)
        features = list(self.model.backbone(batch.tensors).values())
        outputs = self.model.head(features)
        shifted = [{**target, "labels": target["labels"] - 1} for target in targets]
        losses = RetinaNet.compute_loss(self.model, shifted, outputs, self.model.anchor_generator(batch, features))
        total = sum(losses.values())
        assert isinstance(total, Tensor) and math.isfinite(total.item())
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()


class PlainDataset(Dataset):
    """As in torchvision's references: PIL, float tensors, a flip."""

    def __init__(self, annotations: Annotations) -> None:
        self.annotations, self.images = annotations, Path(annotations.images)
        self.transform = v2.Compose(
            [v2.RandomHorizontalFlip(0.5), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
        )

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        image = Image.open(self.images / str(self.annotations.file_names[i])).convert("RGB")
        boxes, labels = self.annotations.training_boxes(i)
        wrapped = tv_tensors.BoundingBoxes(
            torch.from_numpy(boxes).reshape(-1, 4), format="XYXY", canvas_size=(image.height, image.width)
        )  # type: ignore[call-overload]
        return self.transform(image, {"boxes": wrapped, "labels": torch.from_numpy(labels)})


def _seconds_an_image(batches: Iterable[Batch], normalise: Any) -> float:
    """Of an epoch, from its first batch on: starting the workers is paid once a training."""
    count, start = 0, 0.0
    for images, targets in batches:
        normalise(list(images), [dict(target) for target in targets])
        if start:
            count += len(images)
        else:
            start = time.perf_counter()
    if not count:
        raise UserError("at least two batches of images are needed; lower data.batch_size")
    return (time.perf_counter() - start) / count


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ToolParser("dev/training_speed", __doc__, EXAMPLE)
    parser.add_config("data.batch_size=8")
    parser.add_argument("--steps", type=positive, default=20, metavar="N", help="each way")
    args = parser.parse(arguments)
    print(compare_training(load_config(args.config, args.overrides), args.steps))
    return 0


if __name__ == "__main__":
    run_tool(main)
