"""What an exported file says about itself, so that one file is enough to detect with it."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detection.errors import UserError

KEY = "ghostnet_detection"
"""Where the string of `Metadata.to_json` lies in a file: ONNX's metadata_props, OpenVINO's rt_info, an extra file."""
VERSION = 1
OUTPUTS = {"end_to_end": ("boxes", "labels", "scores"), "raw": ("cls_logits", "bbox_regression")}
"""Form -> what a file of that form puts out, in this order."""


@dataclass(frozen=True)
class Metadata:
    """Everything that is needed to use an exported detector, and where it comes from.

    Attributes:
        form: "end_to_end" (boxes, labels, scores) or "raw" (the heads' outputs, see `detection.export.decode`).
        detector: as in a config, "retinanet", "faster_rcnn" or "ghostdet".
        names, ids: label l is `names[l - 1]`, its original id `ids[l - 1]`.
        mean, std: of RGB in [0, 1]. The file normalises by itself; they are here for other uses.
        short_side, long_side: how pictures are resized before they are put into the frame
            (`detection.data.transforms.resize`).
        stride: sides of a frame are multiples of it.
        batch, size: number of pictures and (height, width) of the frame; None is any.
        score_threshold: detections score more than this.
        nms_threshold, max_detections: of the file itself (end_to_end), or what decoding should use (raw).
        anchors: what `detection.export.decode` needs; empty for Faster R-CNN, which has no raw form.
        versions: of the programs that made the file.
        config: the whole resolved config of the training.
        quantized: what of a smaller file (tools/quantize.py) is not float32, and how that was made; None of others.
    """

    form: str
    detector: str
    names: tuple[str, ...]
    ids: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    short_side: int
    long_side: int
    stride: int
    batch: int | None
    size: tuple[int, int] | None
    score_threshold: float
    nms_threshold: float
    max_detections: int
    anchors: Mapping[str, Any]
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
    try:
        content = json.loads(text)
        version = content.pop("version")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"the metadata {KEY!r} of {path} are damaged; export the checkpoint again") from None
    if version != VERSION:
        raise UserError(
            f"{path} has metadata of version {version}, this toolkit reads version {VERSION}; export it again"
        )
    try:
        for name in ("names", "ids", "mean", "std", "size"):
            if content[name] is not None:
                content[name] = tuple(content[name])
        return Metadata(**content)
    except (KeyError, TypeError) as error:
        raise UserError(f"the metadata {KEY!r} of {path} are damaged ({error}); export the checkpoint again") from None
