"""Images and targets of one annotation file, as torchvision's detectors want them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from detection.config import DetectionConfig
from detection.core.errors import UserError
from detection.data.annotations import Annotations
from detection.data.image_cache import ImageCache
from detection.data.image_io import read_image
from detection.data.load_split import read_split
from detection.data.mixing import copy_paste, mixup, mosaic
from detection.data.transforms import Augmentation, AugmentedSample, resize_to, resized_shape, to_tensor

MAX_WORKERS = 256
Sample = tuple[Tensor, dict[str, Any]]


class SampleKey(NamedTuple):
    """The key of a sample of `DetectionDataset`."""

    epoch: int
    image: int
    """Its row in the annotations."""
    short_side: int | None = None
    """Overrides the dataset's own (multi-scale and progressive training)."""
    mix: bool = True
    """False in the last part of a training, which has no mosaic, mixup and copy-paste."""
    repeat: int = 0
    """How often the epoch had this image before; its augmentation is another one each time."""


class DetectionDataset(Dataset):
    """Reads, resizes and (in training) augments one image at a time.

    Keys are `SampleKey`s: the augmentation of image i is seeded by (seed, epoch, i), so it depends neither on the
    number of workers and ranks nor on what was read before.

    A sample is (image uint8 [3, H, W], target) with
        boxes     float32 [n, 4] xyxy in pixels of the resized image; [0, 4] where there are none
        labels    int64 [n], 1…num_classes
        ignored_boxes   float32 [m, 4], regions that training ignores: what lies there is neither object nor background
        ignored_labels  int64 [m], the class for which that holds
        complete_classes  bool [num_classes], see `detection.models.background`; only where it is not True for all
        image_id  int, the original id
        scale     (x, y): resized = original x scale
        size      (height, width) of the original
        skipped   only where the image was bad and another one took its place: list of messages

    Args:
        augmentation: None for evaluation: the image is only resized, and a bad one is an error.
        largest_side: the largest `SampleKey.short_side` to come, for which images are decoded and cached.
        cache: "off", "ram" or "disk".
        resize: uint8 [H, W, 3] -> [H', W', 3], for evaluation with a detector that resizes images in its own way.
    """

    def __init__(
        self,
        annotations: Annotations,
        images: str | Path,
        *,
        short_side: int,
        long_side: int,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        largest_side: int | None = None,
        cache: str = "off",
        resize: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self.resize = resize
        self.annotations = annotations
        self.images = Path(images)
        self.short_side, self.long_side = short_side, long_side
        self.augmentation = augmentation
        self.seed = seed
        # Images of other sets may be annotated for other classes: only those of one set are mixed.
        of_image = np.zeros(len(annotations), np.int64) if annotations.sets is None else annotations.sets.of_image
        self.mixable = [np.flatnonzero(of_image == number) for number in range(of_image.max(initial=0) + 1)]
        self.largest_side = max(short_side, largest_side or 0)
        # Process id and current image of every worker, for the error message if one is killed.
        self.reading = torch.full((MAX_WORKERS, 2), -1, dtype=torch.int64).share_memory_()
        self.cache: ImageCache | None = None
        if cache != "off":
            self.cache = self._cached(cache)

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, key: SampleKey) -> Sample | UserError:
        """A bad image *returns* its error: an exception in a worker would reach the user as a traceback.

        In training another image takes its place, so that batches stay whole on every rank; who iterates
        counts them (`BadImages`).
        """
        skipped: list[str] = []
        for attempt in range(1 if self.augmentation is None else 10):
            try:
                # A step that is coprime to most sizes, so that the next try is likely in another folder.
                image, target = self.load(key._replace(image=(key.image + 7919 * attempt) % len(self)))
            except UserError as error:
                skipped.append(str(error))
                continue
            if skipped:
                target["skipped"] = skipped
            return image, target
        return UserError(skipped[0])

    def load(self, key: SampleKey) -> Sample:
        """The sample; raises UserError for an image that is absent, corrupt or of another size than annotated."""
        i = key.image
        width, height = self.annotations.sizes[i].tolist()
        if self.augmentation is None:
            image = self._image(i)
            fx, fy = image.shape[1] / width, image.shape[0] / height
            sample = self._with_boxes(image, i)
        else:
            sample = self._augmented(key, self.augmentation)
            fx = fy = 1.0
        boxes, labels = sample.boxes.astype(np.float32), sample.labels.astype(np.int64)
        target = {
            "boxes": torch.from_numpy(boxes[~sample.ignored]),
            "labels": torch.from_numpy(labels[~sample.ignored]),
            "ignored_boxes": torch.from_numpy(boxes[sample.ignored]),
            "ignored_labels": torch.from_numpy(labels[sample.ignored]),
            "image_id": int(self.annotations.image_ids[i]),
            "scale": (fx, fy),
            "size": (height, width),
        }
        sets = self.annotations.sets
        if sets is not None and not sets.complete.all():
            target["complete_classes"] = torch.from_numpy(sets.complete[sets.of_image[i]])
        return to_tensor(sample.image), target

    def _augmented(self, key: SampleKey, augmentation: Augmentation) -> AugmentedSample:
        entropy, repeat = [self.seed, key.epoch, key.image], [key.repeat] if key.repeat else []
        # A 32-bit hash of (seed, epoch, i).
        seed = int(np.random.SeedSequence([*entropy, *([0, key.repeat] if repeat else [])]).generate_state(1)[0])
        rng = np.random.default_rng([*entropy, 1, *repeat])
        side, config = key.short_side or self.short_side, augmentation.config
        mixable = self.mixable[0 if self.annotations.sets is None else self.annotations.sets.of_image[key.image]]

        def another() -> AugmentedSample:
            other = int(mixable[rng.integers(len(mixable))])
            return self._augment_one(other, side, augmentation, int(rng.integers(2**31)))

        sample = self._augment_one(key.image, side, augmentation, seed)
        if key.mix and rng.random() < config.mosaic:
            sample = mosaic([sample, another(), another(), another()], rng, config.min_visibility)
        if key.mix and rng.random() < config.copy_paste:
            sample = copy_paste(sample, another(), rng)
        sample = augmentation.after(sample, seed + 1)
        if key.mix and rng.random() < config.mixup:
            sample = mixup(sample, augmentation.after(another(), int(rng.integers(2**31))), rng, config.min_visibility)
        return sample

    def _augment_one(self, i: int, side: int, augmentation: Augmentation, seed: int) -> AugmentedSample:
        """Image i with what is done to it alone, before several are mixed; its short side is `side`."""
        long_side = round(self.long_side * side / self.short_side)
        return augmentation.first(self._with_boxes(self._image(i), i), side, long_side, seed)

    def _with_boxes(self, image: np.ndarray, i: int) -> AugmentedSample:
        """`image` [H, W, 3], which is image i in some size, with its boxes in that size."""
        (boxes, labels), (regions, of_class) = self.annotations.training_boxes(i), self.annotations.ignored_regions(i)
        fy, fx = np.array(image.shape[:2]) / self.annotations.sizes[i][::-1]
        ignored = np.arange(len(boxes) + len(regions)) >= len(boxes)
        boxes = np.concatenate([boxes, regions]) * np.array([fx, fy, fx, fy], np.float32)
        return AugmentedSample(image, boxes, np.concatenate([labels, of_class]), ignored)

    def _image(self, i: int) -> np.ndarray:
        """Image i in the size of `_stored_shape`."""
        self._note_reading(i)
        image = self._read(i) if self.cache is None else self.cache[i]
        self._note_reading(-1)
        return image

    def _note_reading(self, i: int) -> None:
        worker = get_worker_info()
        if worker is not None and worker.id < MAX_WORKERS:
            self.reading[worker.id, 0], self.reading[worker.id, 1] = os.getpid(), i

    def _stored_shape(self, i: int) -> tuple[int, int]:
        """(height, width) before chance has a part: the original's where parts are cut out, else the resized one's."""
        width, height = self.annotations.sizes[i].tolist()
        if self.augmentation is not None and self.augmentation.needs_original:
            return height, width
        long_side = round(self.long_side * self.largest_side / self.short_side)
        return resized_shape(height, width, self.largest_side, long_side)

    def _read(self, i: int) -> np.ndarray:
        shape = self._stored_shape(i)
        size = (int(self.annotations.sizes[i][0]), int(self.annotations.sizes[i][1]))
        # Only in training: evaluation and prediction decode images in full.
        at_least = shape if self.augmentation is not None else None
        image = read_image(self.images / str(self.annotations.file_names[i]), size, at_least)
        return resize_to(image, *shape) if self.resize is None else self.resize(image)

    def _cached(self, where: str) -> ImageCache:
        shapes = np.array([self._stored_shape(i) for i in range(len(self))])
        stamp = ""
        if where == "disk":
            files = [(self.images / str(name)).stat() for name in self.annotations.file_names]
            names = map(str, self.annotations.file_names)
            stamp = repr([(n, s.st_size, s.st_mtime_ns) for n, s in zip(names, files, strict=True)])
        key = f"{self.images.resolve()} {shapes.tolist()} {self.augmentation is not None} {stamp}"
        return ImageCache(shapes, self._read, where, key)


def build_dataset(config: DetectionConfig, split: str, number: int = 0) -> DetectionDataset:
    """Build the "train" (augmented) or "val" data set of a config, and check that its files exist.

    Args:
        number: which one of several sets of `data.val`.

    Raises:
        UserError: the annotation file, the image folder or a file named in it is missing or invalid.
    """
    annotations = read_split(config.data, split, number=number)
    augmentation = None
    if split == "train":
        if (annotations.labels[~annotations.crowd].size) == 0:
            raise UserError(f"{annotations.source} has no annotation at all: there is nothing to learn from")
        augmentation = Augmentation(config.data.augment, config.data.short_side, config.data.long_side)
    return DetectionDataset(
        annotations,
        annotations.images,
        short_side=config.data.short_side,
        long_side=config.data.long_side,
        augmentation=augmentation,
        seed=config.seed,
        largest_side=max(config.data.multi_scale, default=None) if split == "train" else None,
        cache=config.train.cache,
    )
