"""Adapters: how to run a detector's ONNX file of another project, in a few lines of YAML (docs/labelling.md)."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from detection.checkpoint import Classes
from detection.config import DetectionConfig, Positive, Probability, Section
from detection.config_check import check
from detection.config_io import parse_config
from detection.core.errors import UserError
from detection.core.files import shown
from detection.core.text import did_you_mean
from detection.core.yaml_reader import read_yaml
from detection.runtime.coco_classes import COCO_CLASSES
from detection.runtime.metadata import MAX_SIDE
from detection.runtime.onnx import has_onnx_metadata

FOLDER = Path(__file__).with_name("adapters")
NO_DATA = "-"
"""Annotations in the config of a file with an adapter: it names no data set."""
FIXED = ("model", "data.short_side", "data.long_side")
"""Config keys that the file and its adapter set."""

Three = Annotated[list[float], Field(min_length=3, max_length=3)]


def _check_classes(value: Any) -> Any:
    names = value if isinstance(value, list) else []
    if value != "coco" and not (names and all(isinstance(name, str) and name for name in names)):
        raise ValueError("expected: names, like [cat, dog], or coco; names that look like numbers need quotes")
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{', '.join(sorted(twice))}: there more than once")
    return value


class InputConfig(Section):
    """What the network gets: values are (pixel / 255 * range - mean) / std."""

    size: Annotated[list[Annotated[int, Field(ge=1, le=MAX_SIDE)]], Field(min_length=2, max_length=2)] | None = None
    """[height, width] in pixels; null: that of the file, which must be fixed there."""
    color: Literal["rgb", "bgr"] = "rgb"
    range: Literal[1, 255] = 1
    mean: Three = Field(default_factory=lambda: [0.0, 0.0, 0.0])
    """In the order of `color` and on the scale of `range`, as `std`."""
    std: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3, max_length=3)] = Field(
        default_factory=lambda: [1.0, 1.0, 1.0]
    )
    fit: Literal["pad_right_bottom", "pad_around", "stretch"] = "pad_around"
    """Keep the aspect ratio and pad at the right and bottom (sides are rounded down, as in YOLOX) or on all sides
    (rounded to the nearest, as in YOLOv5), or stretch to the size."""
    interpolation: Literal["linear", "area"] = "linear"
    pad_value: Annotated[int, Field(ge=0, le=255)] = 114
    layout: Literal["nchw", "nhwc"] = "nchw"


class OutputConfig(Section):
    """What the network returns, for A candidates and C classes.

    yolox    [N, A, 5 + C]: offsets of the center from the cell and log sizes, both in strides; objectness; class scores
    yolov5   [N, A, 5 + C]: center x, center y, width, height in pixels of the input; objectness; class scores
    yolov8   [N, 4 + C, A]: as yolov5 without objectness
    fastestdet  [N, 5 + C, rows, columns]: objectness; offsets and sizes before tanh and sigmoid; class scores
    boxes    three outputs, after NMS: boxes [N, n, 4] xyxy, labels [N, n], scores [N, n]; also without N, for one image
    """

    layout: Literal["yolox", "yolov5", "yolov8", "fastestdet", "boxes"]
    name: str | None = None
    """The output to read; null: the only one of the file. Not for layout boxes."""
    strides: Annotated[list[Positive], Field(min_length=1)] = Field(default_factory=lambda: [8, 16, 32])
    """yolox: of the levels, in the order of the candidates."""
    boxes: str = "boxes"
    """Layout boxes: the names of the three outputs …"""
    labels: str = "labels"
    scores: str = "scores"
    units: Literal["pixels", "fractions"] = "pixels"
    """… whether boxes are in pixels of the input or fractions of its sides …"""
    first_label: Literal[0, 1] = 0
    """… and the label of the first class."""


class Adapter(Section):
    """How to run a detector's ONNX file of another project."""

    classes: Annotated[Literal["coco"] | list[str], BeforeValidator(_check_classes)]
    input: InputConfig = Field(default_factory=InputConfig)
    output: OutputConfig
    score_threshold: Probability = 0.001
    nms_threshold: Probability = 0.65
    """Of layout boxes: 1, since the file contains NMS."""
    max_detections: Positive = 100
    pre_nms_top_k: Positive = 10_000

    @model_validator(mode="after")
    def _belong_together(self) -> "Adapter":
        given = self.output.model_fields_set
        own = {"boxes", "labels", "scores", "units", "first_label"}
        if self.output.layout == "boxes":
            if wrong := given & {"name", "strides"}:
                raise ValueError(f"output.{min(wrong)} is not for output.layout boxes")
        elif wrong := given & (own if self.output.layout == "yolox" else own | {"strides"}):
            raise ValueError(f"output.{min(wrong)} is not for output.layout {self.output.layout}")
        return self

    @property
    def class_list(self) -> Classes:
        """Names and category ids: COCO's official ids, or 1…C."""
        if self.classes == "coco":
            return Classes(tuple(COCO_CLASSES.values()), tuple(COCO_CLASSES))
        return Classes(tuple(self.classes), tuple(range(1, len(self.classes) + 1)))


def shipped_adapters() -> list[str]:
    """Names of the adapters that come with the toolkit."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_adapter(name: str | Path) -> Adapter:
    """Read an adapter: a YAML file, or the name of one that comes with the toolkit.

    Raises:
        UserError: it is neither, a key is unknown or missing, or a value is wrong; the message names file and key.
    """
    path = Path(name)
    if not os.path.exists(path):
        if str(name) not in shipped_adapters():
            hint = did_you_mean(str(name), shipped_adapters())
            raise UserError(
                f"adapter {shown(name)} does not exist{hint}; expected: a YAML file, or one of "
                f"{', '.join(shipped_adapters())}"
            )
        path = FOLDER / f"{name}.yaml"
    raw, lines = read_yaml(path, "adapter")
    if not isinstance(raw, dict):
        raise UserError(f"adapter {path} must hold keys and values, like 'classes: coco'")
    return check(Adapter, raw, str(path), lines)


def find_adapter(path: str | Path, adapter: str | Path | None = None) -> Adapter | None:
    """The adapter of a detector's file: `adapter`, or else for an ONNX file without metadata of this toolkit the YAML
    file beside it with the same name. None: the file needs none.

    Raises:
        UserError: see `read_adapter`; or `adapter` is given for a file that is not ONNX.
    """
    path = Path(path)
    is_onnx = path.suffix.lower() == ".onnx"
    if adapter is not None:
        if not is_onnx:
            raise UserError(f"{shown(path)} cannot be opened with an adapter, which is for ONNX files (.onnx)")
        return read_adapter(adapter)
    beside = path.with_suffix(".yaml")
    if is_onnx and beside.is_file() and not has_onnx_metadata(path):
        return read_adapter(beside)
    return None


def adapter_config(
    adapter: Adapter, size: tuple[int, int], path: str | Path, overrides: Sequence[str] = ()
) -> DetectionConfig:
    """A config for a file with an adapter: the size of images and the thresholds; then `overrides`.

    Args:
        size: (height, width) of the network's input.

    Raises:
        UserError: an override changes what the file or its adapter sets.
    """
    # For information: `AdaptedDetector.resize` is what resizes images.
    side = max(size)
    thresholds = ("score_threshold", "nms_threshold", "max_detections", "pre_nms_top_k")
    raw = {
        "output_dir": str(Path(path).parent),
        "data": {
            "train": {"annotations": NO_DATA},
            "val": {"annotations": NO_DATA},
            "short_side": side,
            "long_side": side,
        },
        "eval": {name: getattr(adapter, name) for name in thresholds},
    }
    original = parse_config(raw, f"adapter of {path}")
    config = original.with_overrides(overrides)
    changed = [key for key in FIXED if _value(config, key) != _value(original, key)]
    if changed:
        raise UserError(f"{', '.join(changed)} cannot be changed in {path}: it is a file of another project")
    return config


def _value(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config
