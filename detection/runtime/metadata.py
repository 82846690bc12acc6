"""The metadata in an exported file: everything needed to run the detector without other files."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from detection.core.commands import command
from detection.core.errors import UserError
from detection.core.files import shown
from detection.models.postprocess_spec import PostprocessSpec

METADATA_KEY = "ghostnet_detection"
"""Key of the string of `Metadata.to_json` in a file: in ONNX's metadata_props, in OpenVINO's rt_info, or the name of an
extra file in PyTorch's archives."""
METADATA_VERSION = 1
MAX_SIDE = 8192
"""Largest side of a canvas and of its images, in pixels."""
MAX_BATCH = 1024
MIN_CANVAS_STRIDES = 5
"""Smallest side of a canvas, in strides of 32 pixels, of a torch.export program with dynamic sizes. On a smaller canvas
the coarsest feature map (stride 128) has a single row or column and therefore another memory layout, which needs
another program. `detection.runtime.torch_archives` pads smaller batches to this size."""
OUTPUTS = {"end_to_end": ("boxes", "labels", "scores"), "raw": ("cls_logits", "bbox_regression")}
"""Form -> names of the outputs, in order."""


STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Anchors(BaseModel):
    """What `detection.runtime.decode` needs; points have no cells, weights and limit."""

    model_config = STRICT
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


Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
Fraction = Annotated[float, Field(ge=0, le=1)]
RGB = Annotated[tuple[float, ...], Field(min_length=3, max_length=3)]


@dataclass(frozen=True)
class Metadata:
    """Everything that is needed to run an exported detector, and its origin.

    Attributes:
        form: "end_to_end" (boxes, labels, scores) or "raw" (the heads' outputs, see `detection.runtime.decode`).
        detector: as in a config, "retinanet", "faster_rcnn" or "ghostdet".
        names, ids: the class of label l is `names[l - 1]`; its category id in the annotations is `ids[l - 1]`.
        mean, std: of RGB in [0, 1]. The file normalizes images itself; these values are for information.
        short_side, long_side: sizes to which images are resized before they are padded to the canvas
            (`detection.data.transforms.resize`).
        stride: the sides of the canvas are multiples of it.
        batch, size: number of images and (height, width) of the canvas; None means any.
        score_threshold: detections have a score above it.
        nms_threshold, max_detections: fixed in the file (end_to_end), or the defaults of decoding (raw).
        anchors: what `detection.runtime.decode` needs; empty for Faster R-CNN, which has no raw form.
        versions: of the libraries that wrote the file.
        config: the resolved config of the training run.
        quantized: for quantized files, what is not float32 and how it was calibrated; otherwise None.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    form: Annotated[str, Field(pattern="^(end_to_end|raw)$")]
    detector: Annotated[str, Field(pattern="^(retinanet|faster_rcnn|ghostdet)$")]
    names: Annotated[tuple[str, ...], Field(min_length=1)]
    ids: tuple[int, ...]
    mean: RGB
    std: RGB
    short_side: Side
    long_side: Annotated[int, Field(ge=1, le=1 << 20)]
    stride: Side
    batch: Annotated[int, Field(ge=1, le=MAX_BATCH)] | None
    size: tuple[Side, Side] | None
    score_threshold: Fraction
    nms_threshold: Fraction
    max_detections: Annotated[int, Field(ge=1)]
    anchors: Annotated[Mapping[str, Any], AfterValidator(_checked)]
    versions: Mapping[str, str]
    config: Mapping[str, Any]
    quantized: Mapping[str, Any] | None = None

    @property
    def postprocess_spec(self) -> PostprocessSpec:
        """What the file (end_to_end) or its decoding (raw) does; `pre_nms_top_k` only where `anchors` hold it."""
        own = {"pre_nms_top_k": self.anchors["candidates"]} if self.anchors else {}
        return PostprocessSpec(self.score_threshold, self.nms_threshold, self.max_detections, **own)

    def to_json(self) -> str:
        return json.dumps({"version": METADATA_VERSION, **dataclasses.asdict(self)}, ensure_ascii=False)


def parse_metadata(text: str | None, path: str | Path) -> Metadata:
    """Parse the string that a file holds under `METADATA_KEY`.

    Raises:
        UserError: there is none, or this version of the toolkit cannot read it.
    """
    if text is None:
        raise UserError(
            f"{path} is not a detector exported by this toolkit: it has no metadata {METADATA_KEY!r} (class names, "
            f"sizes, thresholds); create one with {command('export')}"
        )
    advice = "export the checkpoint again"
    try:
        content = json.loads(text)
        version = content.pop("version")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"the metadata {METADATA_KEY!r} of {path} are damaged; {advice}") from None
    if version != METADATA_VERSION:
        raise UserError(
            f"{path} has metadata of version {shown(version)}, this toolkit reads version {METADATA_VERSION}; export "
            "the checkpoint again"
        )
    try:
        metadata = _ADAPTER.validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        reason = shown(f"{where}: {first['msg']}")
        raise UserError(f"the metadata {METADATA_KEY!r} of {path} are damaged ({reason}); {advice}") from None
    if contradiction := _find_contradiction(metadata):
        raise UserError(f"the metadata {METADATA_KEY!r} of {path} are damaged ({contradiction}); {advice}")
    return metadata


_ADAPTER = TypeAdapter(Metadata)


def _find_contradiction(metadata: Metadata) -> str | None:
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


def non_finite_error(path: str | Path, tensor: str, kind: str = "NaN") -> UserError:
    """The error for an exported file whose `tensor` has values of this kind."""
    return UserError(
        f"{path} cannot be used: its tensor {tensor} has numbers that are not finite ({kind}); export an earlier "
        "checkpoint"
    )


Shape = Sequence[Any]
"""Sizes of the dimensions of an array; anything but an integer means any size."""


def check_signature(
    metadata: Metadata,
    inputs: Mapping[str, tuple[str, Shape]],
    outputs: Mapping[str, Shape],
    path: str | Path,
) -> None:
    """Compare the metadata with the inputs and outputs of a file.

    Args:
        inputs: name -> (NumPy's name of the dtype, shape).
        outputs: name -> shape.

    Raises:
        UserError: they do not match.
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
            f"{path} does not have the form {metadata.form} of its metadata: its inputs are {', '.join(inputs)}, its "
            f"outputs {', '.join(outputs)}; export the checkpoint again"
        )
    for name, (dtype, shape) in expected.items():
        differs = any(type(a) is int and type(b) is int and a != b for a, b in zip(shape, found[name][1], strict=False))
        if found[name][0] != dtype or len(found[name][1]) != len(shape) or differs:
            raise UserError(
                f"{path} contradicts its metadata ({classes} classes): expected: {name} {_describe((dtype, shape))}, "
                f"got: {_describe(found[name])}; export the checkpoint again"
            )


def _describe(array: tuple[str, Shape]) -> str:
    sides = ", ".join(str(side) if type(side) is int else "any" for side in array[1])
    return f"{array[0]} [{sides}]".strip()
