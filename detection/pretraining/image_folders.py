"""Labelled images: an ImageFolder or CIFAR-10, augmented by torchvision, in batches."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from detection.core import distributed
from detection.core.errors import UserError
from detection.core.files import open_regular_file
from detection.data.dataset import SampleKey
from detection.data.image_headers import too_large
from detection.data.loader import build_loader
from detection.data.sampler import EvalBatchSampler, TrainBatchSampler
from detection.pretraining.classification_config import ClassificationAugmentConfig, ClassificationConfig

Sample = tuple[Tensor, dict[str, Any]]
Batch = tuple[Tensor, list[dict[str, Any]]]


@dataclass(frozen=True)
class FolderImages:
    """Contents of an ImageFolder. Paths are bytes in an array, as a million strings would be copied to each worker."""

    root: Path
    classes: tuple[str, ...]
    paths: np.ndarray
    labels: np.ndarray

    def name(self, i: int) -> str:
        return os.path.join(self.root, os.fsdecode(bytes(self.paths[i])))

    def read(self, i: int) -> Image.Image:
        try:
            with open_regular_file(self.name(i), "image") as file, Image.open(file) as image:
                if reason := too_large(image.size):
                    raise UserError(f"image {self.name(i)} has {reason}")
                return image.convert("RGB")
        # Pillow raises each of these for damaged files of one format or another.
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"image {self.name(i)} cannot be read: {reason}; mend or remove it") from error


@dataclass(frozen=True)
class CifarImages:
    """CIFAR-10's training or test set, in memory."""

    root: Path
    classes: tuple[str, ...]
    images: np.ndarray
    """uint8 [n, 32, 32, 3]"""
    labels: np.ndarray

    def name(self, i: int) -> str:
        return f"image {i} of {self.root}"

    def read(self, i: int) -> Image.Image:
        return Image.fromarray(self.images[i])


Images = FolderImages | CifarImages


class ClassificationDataset(Dataset):
    """Keys are `SampleKey`s: the augmentation of image i is seeded by (seed, epoch, i), as in detection.

    A sample is (image uint8 [3, size, size], {label: int, name: of the image}).
    """

    def __init__(self, images: Images, transform: v2.Transform, seed: int) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __len__(self) -> int:
        return len(self.images.labels)

    def __getitem__(self, key: SampleKey) -> Sample | UserError:
        """A bad image is *returned* as its error: raised in a worker, it would reach the user as a traceback."""
        try:
            return self.load(key.epoch, key.image)
        except UserError as error:
            return error

    def load(self, epoch: int, i: int) -> Sample:
        """The sample; raises UserError for an image that cannot be read."""
        image = self.images.read(i)
        seed = int(np.random.SeedSequence([self.seed, epoch, i]).generate_state(1)[0])
        # torchvision draws from torch's generator, which without workers is also that of the training.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            tensor = self.transform(image)
        return tensor, {"label": int(self.images.labels[i]), "name": self.images.name(i)}


def build_datasets(config: ClassificationConfig) -> tuple[ClassificationDataset, ClassificationDataset]:
    """Training and validation set.

    Raises:
        UserError: folders that are absent, empty, or not of the format; classes that differ or have no image.
    """
    spec = config.data
    train: Images
    val: Images
    if spec.format == "cifar10":
        train, val = (read_cifar10(getattr(spec, key), key) for key in ("train", "val"))
    elif spec.format == "unlabelled":
        train, val = (read_unlabelled(getattr(spec, key), key) for key in ("train", "val"))
    else:
        train, val = (read_folder(getattr(spec, key), key) for key in ("train", "val"))
        _check_same_classes(train, val)
    if len(train.classes) == 1:
        raise UserError(f"data.train: {spec.train} has one class alone ({train.classes[0]}): there is nothing to tell")
    size = (spec.size, spec.val_crop)
    return (
        ClassificationDataset(train, train_transform(spec.augment, *size), config.seed),
        ClassificationDataset(val, val_transform(*size), config.seed),
    )


def read_folder(root: str | Path, split: str) -> FolderImages:
    """List ROOT/class/…/image; classes are the folders' names in order. Raises UserError, see `build_datasets`."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"data.{split}: folder {root} does not exist")
    if not any(entry.is_dir() for entry in root.iterdir()):
        raise UserError(f"data.{split}: {root} has no class folders; expected is {root}/CLASS/IMAGE.jpg")
    folder = ImageFolder(str(root), allow_empty=True)
    labels = np.array([label for _, label in folder.samples], np.int64)
    counts = np.bincount(labels, minlength=len(folder.classes))
    empty = [name for name, count in zip(folder.classes, counts, strict=True) if not count]
    if len(empty) == len(folder.classes):
        raise UserError(f"data.{split}: no images in the {len(empty)} class folders of {root}")
    if empty:
        raise UserError(
            f"data.{split}: {len(empty)} of the {len(folder.classes)} class folders of {root} hold no image: "
            f"{_some(empty)}; fill or remove them"
        )
    paths = np.array([os.fsencode(os.path.relpath(path, root)) for path, _ in folder.samples])
    return FolderImages(root, tuple(folder.classes), paths, labels)


def read_unlabelled(root: str | Path, split: str) -> FolderImages:
    """List all images below ROOT, with no classes and labels of 0. Raises UserError, see `build_datasets`."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"data.{split}: folder {root} does not exist")
    found = sorted(
        os.path.relpath(os.path.join(folder, name), root)
        for folder, _, names in os.walk(root)
        for name in names
        if name.lower().endswith(IMG_EXTENSIONS)
    )
    if not found:
        raise UserError(f"data.{split}: no images below {root}; expected are files {', '.join(IMG_EXTENSIONS[:3])}, …")
    return FolderImages(root, (), np.array([os.fsencode(name) for name in found]), np.zeros(len(found), np.int64))


def read_cifar10(root: str | Path, split: str) -> CifarImages:
    """CIFAR-10's training or test set as published, its files checked by torchvision. Raises UserError."""
    root = Path(root)
    try:
        data = CIFAR10(str(root), train=split == "train", download=False)
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"data.{split}: {root} holds no whole CIFAR-10: expected is {root}/cifar-10-batches-py, unpacked from "
            "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
        ) from error
    return CifarImages(root, tuple(data.classes), data.data, np.array(data.targets, np.int64))


def _check_same_classes(train: Images, val: Images) -> None:
    """Raise UserError for different classes: labels are positions in the sorted list of folders."""
    only = [sorted(set(a.classes) - set(b.classes)) for a, b in ((train, val), (val, train))]
    if any(only):
        parts = [
            f"{_some(names)} only in {images.root}" for names, images in zip(only, (train, val), strict=True) if names
        ]
        raise UserError(f"data.train and data.val have different class folders: {'; '.join(parts)}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f", … ({len(names)})" if len(names) > 5 else "")


def val_transform(size: int, crop: float) -> v2.Transform:
    """PIL -> uint8 [3, size, size], the middle of the image."""
    return v2.Compose([v2.Resize(round(size / crop)), v2.CenterCrop(size), v2.PILToTensor()])


def train_transform(spec: ClassificationAugmentConfig, size: int, crop: float) -> v2.Transform:
    """PIL -> uint8 [3, size, size], augmented."""
    steps: list[v2.Transform] = []
    if spec.random_resized_crop is not None:
        steps.append(v2.RandomResizedCrop(size, scale=tuple(spec.random_resized_crop)))
    else:
        steps += [v2.Resize(round(size / crop)), v2.CenterCrop(size)]
    if spec.pad_crop:
        steps.append(v2.RandomCrop(size, padding=spec.pad_crop))
    if spec.horizontal_flip:
        steps.append(v2.RandomHorizontalFlip(spec.horizontal_flip))
    if spec.vertical_flip:
        steps.append(v2.RandomVerticalFlip(spec.vertical_flip))
    if spec.brightness or spec.contrast or spec.saturation or spec.hue:
        steps.append(v2.ColorJitter(spec.brightness, spec.contrast, spec.saturation, spec.hue))
    if spec.rand_augment:
        steps.append(v2.RandAugment(spec.rand_augment, spec.rand_augment_magnitude))
    steps.append(v2.PILToTensor())
    if spec.erasing:
        steps.append(v2.RandomErasing(spec.erasing))
    return v2.Compose(steps)


def batch_mixing(spec: ClassificationAugmentConfig, num_classes: int) -> v2.Transform | None:
    """(images float [N, 3, H, W], labels int64 [N]) -> (mixed, labels float [N, num_classes]); None for no mixing."""
    choices: list[v2.Transform] = []
    if spec.mixup:
        choices.append(v2.MixUp(alpha=spec.mixup, num_classes=num_classes))
    if spec.cutmix:
        choices.append(v2.CutMix(alpha=spec.cutmix, num_classes=num_classes))
    return v2.RandomChoice(choices) if choices else None


def build_loaders(
    config: ClassificationConfig, train: ClassificationDataset, val: ClassificationDataset, device: torch.device
) -> tuple[TrainBatchSampler, DataLoader, DataLoader]:
    """Sampler and loaders of (images uint8 [N, 3, H, W], list of {label, name}); each process loads its part."""
    spec = config.data
    rank, processes = distributed.rank(), distributed.world_size()
    # All images have one size.
    train_sizes, val_sizes = (np.full((len(data), 2), spec.size) for data in (train, val))
    batches = TrainBatchSampler(train_sizes, spec.batch_size, config.seed, rank=rank, world_size=processes)
    val_batches = EvalBatchSampler(val_sizes, spec.batch_size, rank=rank, world_size=processes)
    train_loader = build_loader(train, batches, workers=spec.workers, device=device, join=torch.stack)
    return batches, train_loader, build_loader(val, val_batches, workers=spec.workers, device=device, join=torch.stack)


def labels_of(targets: list[dict[str, Any]], device: torch.device) -> Tensor:
    """Labels of a batch, int64 [N]."""
    return torch.tensor([target["label"] for target in targets], device=device)
