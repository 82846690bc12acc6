"""Images and targets of one annotation file, as torchvision's detectors want them."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from detection.config import Config, SourceConfig
from detection.data.index import AnnotationIndex, read_coco
from detection.data.transforms import Augmentation, read_image, resize, to_tensor
from detection.errors import UserError

Sample = tuple[Tensor, dict[str, Any]]


class DetectionDataset(Dataset):
    """Reads, resizes and (in training) augments one image at a time.

    Keys are (epoch, i): the augmentation of image i is seeded by (seed, epoch, i), so it depends neither on the
    number of workers nor on what was read before.

    A sample is (image uint8 [3, H, W], target) with
        boxes     float32 [n, 4] xyxy in pixels of the resized image; [0, 4] where there are none
        labels    int64 [n], 1…num_classes
        image_id  int, the original id
        scale     (x, y): resized = original x scale
        size      (height, width) of the original
    """

    def __init__(
        self,
        index: AnnotationIndex,
        images: str | Path,
        *,
        short_side: int,
        long_side: int,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        self.index = index
        self.images = Path(images)
        self.short_side, self.long_side = short_side, long_side
        self.augmentation = augmentation
        self.seed = seed

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: tuple[int, int]) -> Sample | UserError:
        """A bad image is *returned* as its error: raised in a worker, it would reach the user as a traceback."""
        try:
            return self.load(*key)
        except UserError as error:
            return error

    def load(self, epoch: int, i: int) -> Sample:
        """The sample; raises UserError for an image that is absent, corrupt or of another size than annotated."""
        width, height = self.index.sizes[i].tolist()
        image = read_image(self.images / str(self.index.file_names[i]), (width, height))
        boxes, labels = self.index.training_boxes(i)
        if self.augmentation is None:
            image, (fx, fy) = resize(image, self.short_side, self.long_side)
            boxes = boxes * np.array([fx, fy, fx, fy], np.float32)
        else:
            # 32 bits out of (seed, epoch, i), well mixed.
            seed = int(np.random.SeedSequence([self.seed, epoch, i]).generate_state(1)[0])
            image, boxes, labels = self.augmentation(image, boxes, labels, seed)
            fx = fy = 1.0
        target = {
            "boxes": torch.from_numpy(boxes.astype(np.float32).reshape(-1, 4)),
            "labels": torch.from_numpy(labels.astype(np.int64)),
            "image_id": int(self.index.image_ids[i]),
            "scale": (fx, fy),
            "size": (height, width),
        }
        return to_tensor(image), target


def build_dataset(config: Config, split: str) -> DetectionDataset:
    """The "train" (augmented) or "val" data set of a config, its files checked to be there.

    Raises:
        UserError: anything amiss with the annotation file, the images folder, or the files named in it.
    """
    source: SourceConfig = getattr(config.data, split)
    index = read_source(source, f"data.{split}")
    augmentation = None
    if split == "train":
        if (index.labels[~index.crowd].size) == 0:
            raise UserError(f"{source.annotations} has no annotation at all: there is nothing to learn from")
        augmentation = Augmentation(config.data.augment, config.data.short_side, config.data.long_side)
    return DetectionDataset(
        index,
        source.images,
        short_side=config.data.short_side,
        long_side=config.data.long_side,
        augmentation=augmentation,
        seed=config.seed,
    )


def read_source(source: SourceConfig, key: str) -> AnnotationIndex:
    """Read the annotations and check that each image they name is in the folder."""
    index = read_coco(source.annotations)
    check_images(index, source.images, key)
    return index


def check_images(index: AnnotationIndex, images: str | Path, key: str = "images") -> None:
    """Raises UserError, naming the first few, where images are absent; better now than in hour three."""
    folder = Path(images)
    if not folder.is_dir():
        raise UserError(f"{key}.images: folder {folder} does not exist")
    present = set(os.listdir(folder))
    absent = [
        str(name)
        for name in index.file_names
        if str(name) not in present and not ("/" in str(name) and (folder / str(name)).is_file())
    ]
    if absent:
        shown = ", ".join(absent[:5]) + (", …" if len(absent) > 5 else "")
        raise UserError(f"{len(absent)} of {len(index)} images named in {index.source} are not in {folder}: {shown}")


def check_same_classes(train: AnnotationIndex, val: AnnotationIndex) -> None:
    """Labels must mean the same in both. Raises UserError naming the first difference."""
    pairs = [dict(zip(index.category_ids.tolist(), index.class_names, strict=True)) for index in (train, val)]
    for category_id in sorted(set(pairs[0]) | set(pairs[1])):
        names = [pair.get(category_id, "nothing") for pair in pairs]
        if names[0] != names[1]:
            raise UserError(
                f"{train.source} and {val.source} have different categories: id {category_id} is "
                f"{names[0]!r} in the first, {names[1]!r} in the second"
            )
