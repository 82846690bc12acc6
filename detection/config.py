"""The typed schema of a config file, read from YAML plus `key=value` overrides; unknown keys are refused."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from detection.config_check import check
from detection.config_overrides import apply_overrides
from detection.config_paths import PathText
from detection.core.limits import input_too_large

Positive = Annotated[int, Field(gt=0, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Probability = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of the config. A misspelt key is an error, never ignored."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)


class BackboneConfig(Section):
    name: str = "ghostnet"
    width: Annotated[float, Field(gt=0)] = 1.0
    weights: PathText | None = None
    """None (random), a file (.pth, .safetensors, PaddleClas's .pdparams, MindCV's .ckpt), "timm", or "torchvision"."""
    frozen_stages: Annotated[int, Field(ge=0, le=4)] = 0
    """Of pretrained layers only: 0 none, 1 up to c2, … 4 all. Ignored, and said so, without weights."""
    freeze_bn: bool = False


class GhostifyConfig(Section):
    """Which convolutions of the detector become ghost modules, see `backbones.ghostify`.

    The first one, squeeze-and-excite gates and what would not get cheaper are always kept.
    """

    parts: Annotated[list[Literal["backbone", "neck", "head"]], Field(min_length=1)] = ["backbone", "neck", "head"]
    ratio: Annotated[int, Field(ge=2, lt=2**31)] = 2
    """s in the paper: one map in so many is computed by convolution, the others by cheap filters."""
    kernel_size: Literal[1, 3, 5, 7] = 3
    """d in the paper, of the cheap depthwise filters."""
    min_channels: Positive = 16
    """Convolutions with fewer output channels are kept."""
    include: list[str] = ["*"]
    """Patterns of names in the detector, like "*layer3.*" or "head.*"."""
    exclude: list[str] = ["*cls_logits", "*bbox_reg", "*bbox_pred"]
    """By default the last layers of the head, whose outputs are answers and not feature maps."""


class ModelConfig(Section):
    detector: Literal["retinanet", "faster_rcnn", "ghostdet"] = "retinanet"
    backbone: BackboneConfig = Field(default_factory=BackboneConfig)
    fpn_channels: Positive = 256
    head_channels: Positive = 256
    """RetinaNet: width of the towers. Faster R-CNN: width of the two fully connected layers."""
    head_depth: Positive = 4
    head_norm: Literal["none", "group", "batch"] = "none"
    """RetinaNet's towers. batch: statistics of each level's own; learns fastest from scratch."""
    head_groups: Positive = 32
    """GroupNorm's groups, for head_norm: group. Few channels a group make it normalise each image by itself."""
    box_loss: Literal["l1", "giou"] = "l1"
    box_loss_weight: Annotated[float, Field(gt=0)] = 1.0
    """RetinaNet: of the box loss against the classification loss."""
    anchor_sizes: Annotated[list[Positive], Field(min_length=5, max_length=5)] = [32, 64, 128, 256, 512]
    """Anchor side in pixels of the resized image, one for each of the five levels."""
    ghostify: GhostifyConfig | None = None
    """Ghost modules in place of convolutions. With "backbone" in its parts, backbone.weights are those of the ghosted
    backbone, which tools/ghostify.py makes of the plain one's."""


def _names_of_classes(value: Any) -> Any:
    """One message in place of one for each kind that it could be."""
    lists = value.values() if isinstance(value, dict) else [value]
    if value is not None and not (
        value and all(isinstance(names, list) and names and all(isinstance(n, str) for n in names) for names in lists)
    ):
        raise ValueError(
            "expected are names, like [car, bus], or new names with theirs, like {vehicle: [car, bus]}; "
            'names that look like numbers need quotes: ["10"]'
        )
    return value


class SourceConfig(Section):
    """One split of a data set, see docs/data.md.

    An override of `annotations` puts the other keys, which describe the same data, back to their defaults, unless they
    are overridden, too.
    """

    annotations: PathText
    """COCO: the JSON file. VOC: its folder, an image set, or a folder of XML files. YOLO: data.yaml."""
    images: PathText | None = None
    """The images' folder; null is where the format has it: images/ beside a JSON file, JPEGImages/, …"""
    format: Literal["auto", "coco", "voc", "yolo"] = "auto"
    split: str | None = None
    """Of a VOC folder or data.yaml: train, val or test; null is that of the key (data.train, data.val)."""


class AugmentConfig(Section):
    """Chances and ranges of the training augmentation; 0 and [1, 1] switch a part off."""

    horizontal_flip: Probability = 0.5
    vertical_flip: Probability = 0.0
    scale: Annotated[list[float], Field(min_length=2, max_length=2)] = [1.0, 1.0]
    """Zoom range; above 1 crops, below 1 pads."""
    crop: Probability = 0.0
    """Chance of cutting out a random part that keeps every box."""
    brightness: Probability = 0.0
    contrast: Probability = 0.0
    saturation: Probability = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    min_visibility: Probability = 0.25
    """A box of which less than this share is left in the image is dropped."""
    mosaic: Probability = 0.0
    """Four images in one."""
    mixup: Probability = 0.0
    """Two images shown through each other."""
    copy_paste: Probability = 0.0
    """Boxes of another image pasted in, as rectangles."""
    no_mixing_last: Probability = 0.1
    """The last share of the training, without mosaic, mixup and copy_paste."""

    @model_validator(mode="after")
    def _ordered(self) -> "AugmentConfig":
        low, high = self.scale
        if not 0 < low <= high:
            raise ValueError(f"scale must be [low, high] with 0 < low <= high, not {self.scale}")
        return self


class DataConfig(Section):
    train: SourceConfig
    val: SourceConfig
    classes: Annotated[list[str] | dict[str, list[str]] | None, BeforeValidator(_names_of_classes)] = None
    """Only these of the data's classes; or new ones made of several, like {vehicle: [car, bus]}; null is all."""
    batch_size: Positive = 16
    workers: Annotated[int, Field(ge=0, le=1024)] = 2
    short_side: Positive = 800
    """Images are scaled so that the short side has this many pixels …"""
    long_side: Positive = 1333
    """… unless the long side would exceed this many."""
    multi_scale: list[Positive] = []
    """Short sides from which each training batch draws one; the long side changes in proportion. [] is off."""
    progressive: list[tuple[Annotated[float, Field(gt=0, lt=1)], Positive]] = []
    """Pairs of a share of the training and the short side up to there: [[0.5, 192], [0.75, 256]] begins with small
    images, which take less time, and ends with whole ones. The long side changes in proportion. [] is off."""
    group_by_aspect: bool = True
    """Batches hold either landscape or portrait images, so that less is padded."""
    max_bad_images: Count = 10
    """Unreadable training images that are passed over before the training ends with an error."""
    augment: AugmentConfig = Field(default_factory=AugmentConfig)

    @model_validator(mode="after")
    def _ordered(self) -> "DataConfig":
        if self.long_side < self.short_side:
            raise ValueError(f"long_side ({self.long_side}) is below short_side ({self.short_side})")
        for short in (self.short_side, *self.multi_scale):
            if reason := input_too_large(round(self.long_side * short / self.short_side), short):
                key = "multi_scale" if short != self.short_side else "short_side and long_side"
                raise ValueError(f"{key}: {reason}")
        shares = [share for share, _ in self.progressive]
        if shares != sorted(set(shares)):
            raise ValueError(f"progressive must name ascending shares of the training, not {shares}")
        if any(side > self.short_side for _, side in self.progressive):
            raise ValueError(f"progressive sides must not be above short_side ({self.short_side})")
        if self.progressive and self.multi_scale:
            raise ValueError("progressive and multi_scale both say how large images are; leave one of them out")
        return self

    def side_at(self, done: float) -> int | None:
        """The short side of training images when this share of the training is done; None: the config's own."""
        return next((side for until, side in self.progressive if done < until), None)


class OptimConfig(Section):
    name: Literal["sgd", "adamw"] = "sgd"
    lr: Annotated[float, Field(gt=0)] = 0.01
    lr_reference_batch: Positive | None = 16
    """lr is meant for this many images per step and is scaled linearly to the real number; null: not scaled."""
    momentum: Probability = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    decay_norms: bool = True
    """Weight decay also on batch norms and biases; classification recipes often spare them."""
    backbone_lr: Annotated[float, Field(gt=0)] = 1.0
    """lr of the backbone in multiples of the rest's; below 1 spares pretrained layers."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Each backbone stage learns at this multiple of the next deeper one's lr (arXiv 2106.08254)."""
    schedule: Literal["step", "cosine", "onecycle"] = "step"
    """onecycle: up from 1/25 of lr in the first 30 %, then down to nothing; warmup_steps plays no part."""
    milestones: list[Probability] = [8 / 12, 11 / 12]
    """step: the shares of the training at which lr is divided by ten."""
    warmup_steps: Count = 500
    warmup_factor: Probability = 0.001
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = None


class TrainConfig(Section):
    epochs: Positive = 12
    minutes: Annotated[float, Field(gt=0, lt=1e8)] | None = None
    """A time budget in place of `epochs`, evaluations included; the schedule runs over it."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    channels_last: bool = True
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay per step of the averaged weights that are evaluated; 0 is off."""
    accumulate: Positive = 1
    eval_every: Positive = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    patience: Positive | None = None
    """End early after this many evaluations without a new best; null never does."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What to do about a loss that is NaN or infinite: end with an error, or leave the step out and go on."""
    max_skipped_steps: Positive = 10
    """non_finite=skip: more than this many are an error."""
    sync_bn: bool = False
    """Several GPUs: batch norms see the images of all of them."""
    compile: bool = False
    """torch.compile of the network: a minute or more at the start, faster steps afterwards."""
    deterministic: bool = False
    """Only algorithms that give the same bits each time, on CUDA too, where they are slower."""
    wandb: str | None = None
    """Weights & Biases project to log to as well (extra wandb)."""


class DetectorTrainConfig(TrainConfig):
    cache: Literal["off", "ram", "disk"] = "off"
    """Keep images decoded and resized: in memory, or in a file under ~/.cache."""
    report: bool = True
    """Write report.html and report.json when the training has ended, see docs/report.md."""


class EvalConfig(Section):
    batch_size: Positive | None = None
    """null: as in training."""
    score_threshold: Probability = 0.001
    nms_threshold: Probability = 0.5
    pre_nms_top_k: Positive = 1000
    """Boxes that enter NMS: of an image (GhostDet), of a level (RetinaNet; Faster R-CNN's proposals)."""
    max_detections: Positive = 100
    backend: Literal["pycocotools", "faster-coco-eval"] = "pycocotools"
    """What scores: faster-coco-eval (extra fast-eval) gives the same numbers several times as fast."""
    background: bool = False
    """In training: score in a process of its own while the training goes on; see docs/training.md."""


EVAL_BACKENDS: tuple[str, ...] = get_args(EvalConfig.model_fields["backend"].annotation)
"""The first one is the default, and the measure of the others."""


class BaseConfig(Section):
    """What every training is told, whatever it trains. The number of classes comes from the data, never from here."""

    output_dir: PathText
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    optim: OptimConfig = Field(default_factory=OptimConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)

    def with_overrides(self: "Schema", overrides: Sequence[str]) -> "Schema":
        """A checked copy with `key=value` overrides, see `apply_overrides`. Raises UserError."""
        raw = self.model_dump()
        given = apply_overrides(type(self), raw, overrides)
        return check(type(self), raw, "config", None, given)


class DetectionConfig(BaseConfig):
    """Everything about one detection experiment."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig
    train: DetectorTrainConfig = Field(default_factory=DetectorTrainConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)


Schema = TypeVar("Schema", bound=BaseConfig)


PUBLISHED = ("timm", "torchvision", "pretrained")
"""What weights may be besides a file."""
