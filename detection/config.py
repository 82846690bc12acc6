"""The typed schema of a config file, read from YAML plus `key=value` overrides; unknown keys are refused."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from detection.config_check import LIST, ONE, PathText, apply_overrides, check
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
    """None (random), a file (.pth, .safetensors, PaddleClas's .pdparams, MindCV's .ckpt), "zoo" (weights that come with
    the toolkit), "timm", or "torchvision"."""
    frozen_stages: Annotated[int, Field(ge=0, le=4)] = 0
    """Pretrained layers that are not trained: 0 none, 1 up to c2, … 4 all. Ignored, with a warning, without weights."""
    freeze_bn: bool = False


class GhostifyConfig(Section):
    """Which convolutions of the detector become ghost modules, see `backbones.ghostify`.

    The first convolution, squeeze-and-excite gates and layers that would not get cheaper are always kept.
    """

    parts: Annotated[list[Literal["backbone", "neck", "head"]], Field(min_length=1)] = ["backbone", "neck", "head"]
    ratio: Annotated[int, Field(ge=2, lt=2**31)] = 2
    """s in the paper: a convolution computes 1/s of the feature maps, cheap filters compute the others."""
    kernel_size: Literal[1, 3, 5, 7] = 3
    """d in the paper: the size of the cheap depthwise filters."""
    min_channels: Positive = 16
    """Convolutions with fewer output channels are kept."""
    include: list[str] = ["*"]
    """Patterns of names in the detector, like "*layer3.*" or "head.*"."""
    exclude: list[str] = ["*cls_logits", "*bbox_reg", "*bbox_pred"]
    """By default the last layers of the head, whose outputs are predictions and not feature maps."""


class ModelConfig(Section):
    detector: Literal["retinanet", "faster_rcnn", "ghostdet"] = "retinanet"
    weights: PathText | None = None
    """Detector to start from: a checkpoint, the name of a detector that comes with the toolkit (`ghostdet models` lists
    them), or hf:OWNER/NAME. Its classes are matched by name. It includes a backbone, so
    `backbone.weights` is not read."""
    freeze: list[Literal["backbone", "neck"]] = []
    """Pretrained parts that are not trained, batch-norm statistics included. Ignored, with a warning, without
    weights."""
    backbone: BackboneConfig = Field(default_factory=BackboneConfig)
    fpn_channels: Positive = 256
    head_channels: Positive = 256
    """RetinaNet: width of the towers. Faster R-CNN: width of the two fully connected layers."""
    head_depth: Positive = 4
    head_norm: Literal["none", "group", "batch"] = "none"
    """RetinaNet's towers. batch: separate statistics for each level; learns fastest from scratch."""
    head_groups: Positive = 32
    """Groups of GroupNorm, for head_norm: group."""
    box_loss: Literal["l1", "giou"] = "l1"
    box_loss_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the box loss relative to the classification loss (RetinaNet, GhostDet)."""
    anchor_sizes: Annotated[list[Positive], Field(min_length=5, max_length=5)] = [32, 64, 128, 256, 512]
    """Anchor side in pixels of the resized image, one for each of the five levels."""
    ghostify: GhostifyConfig | None = None
    """Replace convolutions by ghost modules. If `parts` has "backbone", backbone.weights must be weights of the
    ghosted backbone, which tools/ghostify.py computes from those of the plain one."""


def _names_of_classes(value: Any) -> Any:
    """Checked here, so that there is one error message instead of one for each type of the union."""
    lists = value.values() if isinstance(value, dict) else [value]
    if value is not None and not (
        value and all(isinstance(names, list) and names and all(isinstance(n, str) for n in names) for names in lists)
    ):
        raise ValueError(
            "expected: names, like [car, bus], or groups of names, like {vehicle: [car, bus]}; "
            'names that look like numbers need quotes: ["10"]'
        )
    return value


class SourceConfig(Section):
    """One split of a dataset, see docs/data.md.

    An override of `annotations` resets the other keys, which describe the same data, to their defaults, unless they
    are overridden too.
    """

    annotations: PathText
    """COCO: the JSON file. VOC: its folder, an image set, or a folder of XML files. YOLO: data.yaml."""
    images: PathText | None = None
    """The folder of the images; null: the format's usual place (images/ beside a JSON file, JPEGImages/, …)."""
    format: Literal["auto", "coco", "voc", "yolo"] = "auto"
    split: str | None = None
    """For a VOC folder or data.yaml: train, val or test; null: as the key says (data.train, data.val)."""


class TrainSourceConfig(SourceConfig):
    """Images to train on."""

    complete_classes: list[str] | None = None
    """Classes of which every object has a box; null: all classes that the set has. Images of the set teach nothing
    about the background of any other class, see docs/data.md."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How often an epoch has each image: 1 once, 2 twice, 0.5 half of the images."""


def _one_or_list(value: Any) -> str:
    return LIST if isinstance(value, list) else ONE


TrainSources = Annotated[
    Annotated[TrainSourceConfig, Tag(ONE)] | Annotated[list[TrainSourceConfig], Field(min_length=1), Tag(LIST)],
    Discriminator(_one_or_list),
]
ValSources = Annotated[
    Annotated[SourceConfig, Tag(ONE)] | Annotated[list[SourceConfig], Field(min_length=1), Tag(LIST)],
    Discriminator(_one_or_list),
]


class AugmentConfig(Section):
    """Probabilities and ranges of the training augmentation; 0 and [1, 1] switch a part off."""

    horizontal_flip: Probability = 0.5
    vertical_flip: Probability = 0.0
    scale: Annotated[list[float], Field(min_length=2, max_length=2)] = [1.0, 1.0]
    """Range of the zoom factor; above 1 crops, below 1 pads."""
    crop: Probability = 0.0
    """Probability of a random crop that keeps every box."""
    brightness: Probability = 0.0
    contrast: Probability = 0.0
    saturation: Probability = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    min_visibility: Probability = 0.25
    """A box is dropped if less than this share of its area is left in the image."""
    mosaic: Probability = 0.0
    """Probability of a mosaic of four images."""
    mixup: Probability = 0.0
    """Probability of blending with another image."""
    copy_paste: Probability = 0.0
    """Probability of pasting boxes of another image, as rectangles."""
    no_mixing_last: Probability = 0.1
    """The last share of the training, without mosaic, mixup and copy_paste."""

    @model_validator(mode="after")
    def _ordered(self) -> "AugmentConfig":
        low, high = self.scale
        if not 0 < low <= high:
            raise ValueError(f"scale must be [low, high] with 0 < low <= high, not {self.scale}")
        return self


class DataConfig(Section):
    train: TrainSources
    """One set or a list of sets."""
    val: ValSources
    """One set or a list of sets, each of which is evaluated."""
    classes: Annotated[list[str] | dict[str, list[str]] | None, BeforeValidator(_names_of_classes)] = None
    """Use only these classes of the data, or merge classes, like {vehicle: [car, bus]}; null: all classes."""
    batch_size: Positive = 16
    workers: Annotated[int, Field(ge=0, le=1024)] = 2
    short_side: Positive = 800
    """Images are scaled so that the short side has this many pixels …"""
    long_side: Positive = 1333
    """… unless the long side would exceed this many."""
    multi_scale: list[Positive] = []
    """Each training batch draws one of these short sides; the long side changes in proportion. [] is off."""
    progressive: list[tuple[Annotated[float, Field(gt=0, lt=1)], Positive]] = []
    """Pairs of (share of the training, short side until then): [[0.5, 192], [0.75, 256]] begins with small images,
    which take less time, and ends with the full size. The long side changes in proportion. [] is off."""
    group_by_aspect: bool = True
    """Batches hold either landscape or portrait images, which need less padding."""
    max_bad_images: Count = 10
    """Unreadable training images that are skipped; the training ends with an error when there are more."""
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
            raise ValueError("progressive and multi_scale both set the size of images; leave one of them out")
        return self

    @property
    def has_lists(self) -> bool:
        """Whether `train` or `val` is a list, so that classes are matched by name."""
        return isinstance(self.train, list) or isinstance(self.val, list)

    def train_sources(self) -> list[TrainSourceConfig]:
        """The sets of `train`, also if it is one."""
        return self.train if isinstance(self.train, list) else [self.train]

    def val_sources(self) -> list[SourceConfig]:
        """The sets of `val`, also if it is one."""
        return self.val if isinstance(self.val, list) else [self.val]

    def sources(self, split: str) -> dict[str, SourceConfig]:
        """The sets of "train" or "val" by their keys: {"data.train": …}, or {"data.train.0": …, …} of a list."""
        value = getattr(self, split)
        if not isinstance(value, list):
            return {f"data.{split}": value}
        return {f"data.{split}.{number}": source for number, source in enumerate(value)}

    def side_at(self, done: float) -> int | None:
        """The short side of training images after the share `done` of the training; None: `short_side`."""
        return next((side for until, side in self.progressive if done < until), None)


class OptimConfig(Section):
    name: Literal["sgd", "adamw"] = "sgd"
    lr: Annotated[float, Field(gt=0)] = 0.01
    lr_reference_batch: Positive | None = 16
    """lr is meant for this many images per step and is scaled linearly to the real number; null: not scaled."""
    momentum: Probability = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    decay_norms: bool = True
    """Apply weight decay to batch norms and biases too; classification recipes often do not."""
    backbone_lr: Annotated[float, Field(gt=0)] = 1.0
    """Factor on the lr of the backbone; below 1 changes pretrained layers less."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The lr of each backbone stage is that of the next deeper stage times this factor (arXiv 2106.08254)."""
    schedule: Literal["step", "cosine", "onecycle"] = "step"
    """onecycle: up from 1/25 of lr in the first 30 %, then down to zero; warmup_steps is ignored."""
    milestones: list[Probability] = [8 / 12, 11 / 12]
    """step: shares of the training after which lr is divided by ten."""
    warmup_steps: Count = 500
    warmup_factor: Probability = 0.001
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = None


class TrainConfig(Section):
    epochs: Positive = 12
    minutes: Annotated[float, Field(gt=0, lt=1e8)] | None = None
    """A time budget that replaces `epochs`; it includes evaluations, and the schedule follows it."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    channels_last: bool = True
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay per step of the exponential moving average of the weights, which is evaluated; 0 is off."""
    accumulate: Positive = 1
    eval_every: Positive = 1
    """Evaluate every so many epochs, and after the last one."""
    patience: Positive | None = None
    """Stop early after this many evaluations without a new best; null: never."""
    non_finite: Literal["stop", "skip"] = "stop"
    """If the loss is NaN or infinite: stop with an error, or skip the step."""
    max_skipped_steps: Positive = 10
    """non_finite=skip: the training ends with an error when more steps are skipped."""
    sync_bn: bool = False
    """With several GPUs: compute the statistics of batch norms over all of them."""
    compile: bool = False
    """Use torch.compile: the start takes a minute or more, the steps are faster."""
    deterministic: bool = False
    """Use only deterministic algorithms; on CUDA they are slower."""
    wandb: str | None = None
    """Weights & Biases project to log to as well (extra wandb)."""


class DetectionTeacherConfig(Section):
    """A trained detector to learn from, besides the annotations (GhostDet)."""

    detector: PathText
    """A checkpoint, an exported file, the name of a detector that comes with the toolkit, or hf:OWNER/NAME."""
    adapter: PathText | None = None
    """For an ONNX file of another project: yolox, yolov5, yolov8, fastestdet, or a YAML file."""
    score_threshold: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Lowest score of a box to learn from."""


class DetectorTrainConfig(TrainConfig):
    teacher: DetectionTeacherConfig | None = None
    """Finds the objects of classes for which a set of data.train has no complete annotations, in each augmented image;
    its scores are the targets of the scores. See docs/training.md."""
    cache: Literal["off", "ram", "disk"] = "off"
    """Keep decoded and resized images in memory, or in a file under ~/.cache."""
    report: bool = True
    """Write report.html and report.json after the training, see docs/report.md."""


class EvalConfig(Section):
    batch_size: Positive | None = None
    """null: as in training."""
    score_threshold: Probability = 0.001
    nms_threshold: Probability = 0.5
    pre_nms_top_k: Positive = 1000
    """Boxes that enter NMS: of an image (GhostDet), of a level (RetinaNet; Faster R-CNN's proposals)."""
    max_detections: Positive = 100
    backend: Literal["pycocotools", "faster-coco-eval"] = "pycocotools"
    """faster-coco-eval (extra fast-eval) computes the same metrics several times as fast."""
    background: bool = False
    """During training: compute the metrics in a separate process while the training continues, see docs/training.md."""


EVAL_BACKENDS: tuple[str, ...] = get_args(EvalConfig.model_fields["backend"].annotation)
"""The first one is the default and the reference."""


class BaseConfig(Section):
    """Keys that detection and classification share. The number of classes comes from the data, not from a config."""

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


PUBLISHED = ("timm", "torchvision", "pretrained", "zoo")
"""Values of `weights` that are not files."""
