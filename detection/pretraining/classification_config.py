"""The typed schema of a config in `configs/pretrain/`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from detection.config import BaseConfig, Positive, Probability, Section, TrainConfig
from detection.config_check import PathText
from detection.core.limits import input_too_large

NonNegative = Annotated[float, Field(ge=0)]


class ClassifierConfig(Section):
    name: str = "ghostnet"
    """Any backbone of a detector, or ghost_resnet56."""
    width: Annotated[float, Field(gt=0)] = 1.0
    weights: PathText | None = None
    """Initial weights: null (random), a file, or "timm"."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    ratio: Positive | None = None
    """ghost_*: s of the paper; null is 2."""
    kernel_size: Positive | None = None
    """ghost_*: d of the paper; null is 3."""


class ClassificationAugmentConfig(Section):
    """Augmentation of training images by torchvision.transforms.v2; 0 and null switch a part off."""

    random_resized_crop: tuple[Probability, Probability] | None = (0.08, 1.0)
    """Range of the area of the part that is cut out and resized; null: the whole image as in validation."""
    pad_crop: Annotated[int, Field(ge=0, le=4096)] = 0
    """Pixels added around the image before a crop of its size is taken (CIFAR-10's 4)."""
    horizontal_flip: Probability = 0.5
    vertical_flip: Probability = 0.0
    brightness: Probability = 0.0
    contrast: Probability = 0.0
    saturation: Probability = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    rand_augment: Annotated[int, Field(ge=0, le=100)] = 0
    """Operations per image (arXiv 1909.13719)."""
    rand_augment_magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    erasing: Probability = 0.0
    mixup: NonNegative = 0.0
    """alpha of mixup (arXiv 1710.09412). With cutmix, each batch gets one or the other."""
    cutmix: NonNegative = 0.0
    """alpha of CutMix (arXiv 1905.04899)."""

    @model_validator(mode="after")
    def _ordered(self) -> "ClassificationAugmentConfig":
        if self.random_resized_crop is not None:
            low, high = self.random_resized_crop
            if not 0 < low <= high:
                raise ValueError(f"random_resized_crop must be [low, high] with 0 < low <= high, not [{low}, {high}]")
        return self


class ImageFoldersConfig(Section):
    format: Literal["imagefolder", "cifar10", "unlabelled"] = "imagefolder"
    """imagefolder: FOLDER/class/image.jpg; cifar10: FOLDER/cifar-10-batches-py/ as published; unlabelled: images
    anywhere below FOLDER, each with the teacher's most likely class as its label."""
    train: PathText
    val: PathText
    """cifar10: the same folder, for its test batch."""
    size: Positive = 224
    """Side of the network's square input in pixels."""
    val_crop: Annotated[float, Field(gt=0, le=1)] = 0.875
    """Validation scales the short side to size / val_crop and crops the center."""
    batch_size: Positive = 256
    """Images per batch in each process."""
    workers: Annotated[int, Field(ge=0, le=1024)] = 8
    augment: ClassificationAugmentConfig = Field(default_factory=ClassificationAugmentConfig)

    @model_validator(mode="after")
    def _fits(self) -> "ImageFoldersConfig":
        # Validation scales whole images to this size before it crops the center.
        side = round(self.size / self.val_crop)
        if reason := input_too_large(side, side):
            raise ValueError(f"size: {reason}")
        return self


class ClassifierTrainConfig(TrainConfig):
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1


class TeacherConfig(Section):
    """A trained, frozen network to learn from, besides the labels (arXiv 1503.02531, 1412.6550)."""

    name: str
    """timm/NAME, torchvision/NAME, or a network of this toolkit."""
    width: Annotated[float, Field(gt=0)] = 1.0
    """Width of a network of this toolkit."""
    weights: PathText
    """A file (also the best.pt of a pre-training), or "pretrained" for published weights of timm or torchvision."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """Mixed precision of the teacher alone. On a CPU with AVX-512 BF16 or AMX, bf16 is several times as fast."""
    logits: NonNegative = 1.0
    """Weight of the loss against the teacher's softened logits; the teacher must have the same classes."""
    temperature: Annotated[float, Field(gt=0)] = 4.0
    features: NonNegative = 0.0
    """Weight of the error of 1x1 convolutions that predict the teacher's c3, c4, c5 from the network's."""

    @model_validator(mode="after")
    def _teaches(self) -> "TeacherConfig":
        if not self.logits and not self.features:
            raise ValueError("a teacher needs logits or features above 0; teacher=null is none")
        return self


class ClassificationConfig(BaseConfig):
    """Everything about one pre-training."""

    model: ClassifierConfig = Field(default_factory=ClassifierConfig)
    data: ImageFoldersConfig
    train: ClassifierTrainConfig = Field(default_factory=ClassifierTrainConfig)
    teacher: TeacherConfig | None = None

    @model_validator(mode="after")
    def _labelled(self) -> "ClassificationConfig":
        if self.data.format == "unlabelled" and self.teacher is None:
            raise ValueError("data.format=unlabelled needs a teacher, whose classes are the labels")
        return self
