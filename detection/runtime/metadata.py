"""What an exported file says about itself, so that one file is enough to detect with it."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from detection.core.errors import UserError
from detection.core.files import shown

KEY = "ghostnet_detection"
"""Where the string of `Metadata.to_json` lies in a file: ONNX's metadata_props, OpenVINO's rt_info, an extra file."""
VERSION = 1
LARGEST_SIDE = 8192
"""Of a frame and of its images, in pixels."""
LARGEST_BATCH = 1024
SMALLEST = 5
"""Sides of a frame, in strides of 32 pixels, below which a program of any size does not run: the coarsest map, of
stride 128, would have a single row or column, and memory laid out in another way, for which PyTorch would have to write
another program. `detection.runtime.torch_archives` puts smaller images into frames of this size."""
OUTPUTS = {"end_to_end": ("boxes", "labels", "scores"), "raw": ("cls_logits", "bbox_regression")}
"""Form -> what a file of that form puts out, in this order."""


Strict = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Anchors(BaseModel):
    """What `detection.runtime.decode` needs; points have no cells, weights and limit."""

    model_config = Strict
    strides: Annotated[list[Annotated[int, Field(ge=1, le=4096)]], Field(min_length=1, max_length=16)]
    candidates: Annotated[int, Field(ge=1)]
    cells: list[Annotated[list[Annotated[list[float], Field(min_length=4, max_length=4)]], Field(min_length=1)]] = []
    weights: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=4, max_length=4)] = []
    limit: float = 0

    @model_validator(mode="after")
    def _belong_together(self) -> "Anchors":
        if self.cells and not (self.weights and self.limit and len(self.cells) == len(self.strides)):
            raise ValueError("cells without weights or limit, or not as many as the strides")
        return self


def _checked(anchors: Mapping[str, Any]) -> Mapping[str, Any]:
    return anchors and Anchors(**anchors).model_dump(exclude_unset=True)


Side = Annotated[int, Field(ge=1, le=LARGEST_SIDE)]
Share = Annotated[float, Field(ge=0, le=1)]
Colour = Annotated[tuple[float, ...], Field(min_length=3, max_length=3)]


@dataclass(frozen=True)
class Metadata:
    """Everything that is needed to use an exported detector, and where it comes from.

    Attributes:
        form: "end_to_end" (boxes, labels, scores) or "raw" (the heads' outputs, see `detection.runtime.decode`).
        detector: as in a config, "retinanet", "faster_rcnn" or "ghostdet".
        names, ids: label l is `names[l - 1]`, its original id `ids[l - 1]`.
        mean, std: of RGB in [0, 1]. The file normalises by itself; they are here for other uses.
        short_side, long_side: how images are resized before they are put into the frame
            (`detection.data.transforms.resize`).
        stride: sides of a frame are multiples of it.
        batch, size: number of images and (height, width) of the frame; None is any.
        score_threshold: detections score more than this.
        nms_threshold, max_detections: of the file itself (end_to_end), or what decoding should use (raw).
        anchors: what `detection.runtime.decode` needs; empty for Faster R-CNN, which has no raw form.
        versions: of the programs that made the file.
        config: the whole resolved config of the training.
        quantized: what of a smaller file (tools/quantize.py) is not float32, and how that was made; None of others.
    """

    __pydantic_config__: ClassVar[ConfigDict] = Strict

    form: Annotated[str, Field(pattern="^(end_to_end|raw)$")]
    detector: Annotated[str, Field(pattern="^(retinanet|faster_rcnn|ghostdet)$")]
    names: Annotated[tuple[str, ...], Field(min_length=1)]
    ids: tuple[int, ...]
    mean: Colour
    std: Colour
    short_side: Side
    long_side: Annotated[int, Field(ge=1, le=1 << 20)]
    stride: Side
    batch: Annotated[int, Field(ge=1, le=LARGEST_BATCH)] | None
    size: tuple[Side, Side] | None
    score_threshold: Share
    nms_threshold: Share
    max_detections: Annotated[int, Field(ge=1)]
    anchors: Annotated[Mapping[str, Any], AfterValidator(_checked)]
    versions: Mapping[str, str]
    config: Mapping[str, Any]
    quantized: Mapping[str, Any] | None = None

    def to_json(self) -> str:
        return json.dumps({"version": VERSION, **dataclasses.asdict(self)}, ensure_ascii=False)


def parse_metadata(text: str | None, path: str | Path) -> Metadata:
    """The metadata that a file holds under `KEY`.

    Raises:
        UserError: none, or not what this version of the toolkit can read.
    """
    if text is None:
        raise UserError(
            f"{path} is not a detector exported by this toolkit: it has no metadata {KEY!r} (class names, sizes, "
            "thresholds); make one with tools/export.py"
        )
    again = "export the checkpoint again"
    try:
        content = json.loads(text)
        version = content.pop("version")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"the metadata {KEY!r} of {path} are damaged; {again}") from None
    if version != VERSION:
        raise UserError(
            f"{path} has metadata of version {shown(version)}, this toolkit reads version {VERSION}; export it again"
        )
    try:
        metadata = METADATA.validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        reason = shown(f"{where}: {first['msg']}")
        raise UserError(f"the metadata {KEY!r} of {path} are damaged ({reason}); {again}") from None
    if wrong := _contradiction(metadata):
        raise UserError(f"the metadata {KEY!r} of {path} are damaged ({wrong}); {again}")
    return metadata


METADATA = TypeAdapter(Metadata)


def _contradiction(metadata: Metadata) -> str | None:
    if not len(metadata.names) == len(metadata.ids) == len(set(metadata.names)):
        return f"{len(set(metadata.names))} different names, {len(metadata.ids)} ids"
    if metadata.long_side < metadata.short_side:
        return f"long_side {metadata.long_side} is below short_side {metadata.short_side}"
    if metadata.size is not None and any(side % metadata.stride for side in metadata.size):
        return f"size {metadata.size} is not of multiples of stride {metadata.stride}"
    if min(metadata.std) <= 0:
        return "std is not positive"
    if metadata.form == "raw" and ("cells" in metadata.anchors) != (metadata.detector == "retinanet"):
        return f"a raw {metadata.detector} with anchors of another kind"
    if metadata.form == "raw" and not metadata.anchors:
        return "the raw form without anchors"
    return None


def not_finite(path: str | Path, tensor: str, what: str = "NaN") -> UserError:
    """The error of an exported file with such numbers in `tensor`."""
    return UserError(
        f"{path} is of no use: its tensor {tensor} has numbers that are not finite ({what}); export an earlier "
        "checkpoint"
    )


Shape = Sequence[Any]
"""Sides of an array; what is no integer is any."""


def check_graph(
    metadata: Metadata,
    inputs: Mapping[str, tuple[str, Shape]],
    outputs: Mapping[str, Shape],
    path: str | Path,
) -> None:
    """Compare the metadata with what a file computes.

    Args:
        inputs: name -> (type, shape), the type as NumPy calls it.
        outputs: name -> shape.

    Raises:
        UserError: they contradict each other.
    """
    height, width = metadata.size or (None, None)
    count, classes = metadata.batch, len(metadata.names)
    expected: dict[str, tuple[str, Shape]] = {
        "images": ("uint8", (count, height, width, 3)),
        "sizes": ("int64", (count, 2)),
    }
    last = {"cls_logits": classes, "bbox_regression": 4, "boxes": 4}
    for name in OUTPUTS[metadata.form]:
        expected[name] = ("", (count, None, last[name]) if name in last else (count, None))
    found = {**inputs, **{name: ("", shape) for name, shape in outputs.items()}}
    if set(found) != set(expected):
        raise UserError(
            f"{path} is not of the form {metadata.form}, as its metadata say: it takes {', '.join(inputs)} and gives "
            f"{', '.join(outputs)}; export the checkpoint again"
        )
    for name, (kind, shape) in expected.items():
        differs = any(type(a) is int and type(b) is int and a != b for a, b in zip(shape, found[name][1], strict=False))
        if found[name][0] != kind or len(found[name][1]) != len(shape) or differs:
            raise UserError(
                f"{path} contradicts its metadata ({classes} classes): {name} is {_words(found[name])}, where "
                f"{_words((kind, shape))} is expected; export the checkpoint again"
            )


def _words(array: tuple[str, Shape]) -> str:
    sides = ", ".join(str(side) if type(side) is int else "any" for side in array[1])
    return f"{array[0]} [{sides}]".strip()
