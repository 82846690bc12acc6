"""What tools/export.py does: a checkpoint becomes a file of another format, which is run at once and compared."""

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from detection.config import DetectionConfig
from detection.config_io import parse_config
from detection.core.errors import UserError
from detection.core.extras import WRITERS, require
from detection.core.outputs import check_outputs
from detection.data.image_io import read_image
from detection.data.load_split import read_split
from detection.data.transforms import resize, to_tensor
from detection.export.faster_rcnn import FasterRCNNDetector
from detection.export.ghostdet import GhostDetDetector, GhostDetHeads, point_spec
from detection.export.parity import Parity, compare
from detection.export.retinanet import STRIDE, RetinaNetDetector, RetinaNetHeads
from detection.export.spec import ExportSpec
from detection.export.torch_export import export_torch_export
from detection.models.ghostdet import GhostDet
from detection.models.retinanet import GhostRetinaNet
from detection.runtime.exported import ExportedDetector, open_exported
from detection.runtime.metadata import LARGEST_SIDE, OUTPUTS, SMALLEST, Metadata
from detection.runtime.pytorch import load_detector

FORMATS = {"onnx": ".onnx", "openvino": ".xml", "torchscript": ".torchscript", "torch_export": ".pt2"}
"""Format -> how its files' names end."""
EXACT = (0.05, 1e-3)
"""Pixels and score by which a file may differ from PyTorch."""


def export_checkpoint(
    checkpoint: str | Path,
    file_format: str,
    *,
    form: str = "end_to_end",
    batch: int | None = None,
    size: tuple[int, int] | None = None,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    force: bool = False,
) -> list[str]:
    """Export, run the file, compare it with PyTorch.

    Args:
        file_format: one of `FORMATS`.
        batch, size: see `prepare`.
        out: default: beside the checkpoint, with the format's ending.
        force: overwrite files that this toolkit did not write.

    Returns:
        Lines that tell what was made.

    Raises:
        UserError: unreadable checkpoint, what the format or the detector cannot do, a missing extra, a path
            that cannot be written to; or the file does not compute what PyTorch does.
    """
    require(f"--format {file_format}", *WRITERS.get(file_format, ()))
    out = _out_path(checkpoint, file_format, out)
    check_outputs(files_of(out), [checkpoint], force=force)
    prepared = prepare(checkpoint, form=form, batch=batch, size=size, overrides=overrides)
    if file_format == "onnx":
        from detection.export.onnx import export_onnx

        notes = export_onnx(prepared, out)
    elif file_format == "openvino":
        from detection.export.openvino import export_openvino

        notes = export_openvino(prepared, out)
    elif file_format == "torchscript":
        from detection.export.torchscript import export_torchscript

        notes = export_torchscript(prepared, out)
    else:
        notes = export_torch_export(prepared, out)
    parity = verify(out, prepared)
    return [*notes, *describe(prepared.metadata), f"parity    with PyTorch, {parity}"]


def prepare(
    checkpoint: str | Path,
    *,
    form: str = "end_to_end",
    batch: int | None = None,
    size: tuple[int, int] | None = None,
    overrides: Sequence[str] = (),
) -> ExportSpec:
    """A checkpoint's detector as an exporter wants it.

    Args:
        form: "end_to_end" or "raw".
        batch: images in a batch; None: any number.
        size: (height, width) of the frame, multiples of 32; None: any. Images are then resized to fill the
            frame, unless the config's own size does.
        overrides: `key=value` for the config, e.g. eval.score_threshold=0.05.
    """
    if form not in OUTPUTS:
        raise UserError(f"form {form!r} is not known; there are {', '.join(OUTPUTS)}")
    if size is not None and any(side < STRIDE or side % STRIDE for side in size):
        raise UserError(f"--size {size[0]}x{size[1]}: both sides must be multiples of {STRIDE}")
    model, config, classes = load_detector(checkpoint, torch.device("cpu"), overrides=overrides)
    if isinstance(model, ExportedDetector):
        raise UserError(
            f"{checkpoint} is an exported detector; export from the checkpoint (best.pt) that it was made of"
        )
    # Exporters do not know channels_last, and write transpositions for it.
    model = model.to(memory_format=torch.contiguous_format)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    anchors: dict[str, Any] = {}
    if isinstance(model, GhostRetinaNet):
        network: nn.Module = RetinaNetHeads(model) if form == "raw" else RetinaNetDetector(model, size)
        anchors = anchor_spec(model)
    elif isinstance(model, GhostDet):
        network = GhostDetHeads(model) if form == "raw" else GhostDetDetector(model, size)
        anchors = point_spec(model)
    elif form == "raw":
        raise UserError(
            "the two stages of Faster R-CNN have no raw form: its second stage looks at what the first one found; "
            "use --form end_to_end"
        )
    else:
        network = FasterRCNNDetector(model, size)  # type: ignore[arg-type]
    short, long = sides_for(config, size)
    if short > LARGEST_SIDE:
        raise UserError(f"data.short_side={short} is too large for a file: {LARGEST_SIDE} pixels are the most")
    body: Any = model.backbone.body  # type: ignore[union-attr]
    metadata = Metadata(
        form=form,
        detector=config.model.detector,
        names=classes.names,
        ids=classes.ids,
        mean=tuple(body.mean),
        std=tuple(body.std),
        short_side=short,
        long_side=long,
        stride=STRIDE,
        batch=batch,
        size=size,
        score_threshold=config.eval.score_threshold,
        nms_threshold=config.eval.nms_threshold,
        max_detections=config.eval.max_detections,
        anchors=anchors,
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
        config=config.model_dump(mode="json"),
    )
    # Sides that differ, so that exporters do not take one for the other; two images, as one is special to some.
    height, width = size or (_rounded_up(short), _rounded_up(short) + STRIDE)
    count = batch or 2
    images = torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8)
    sizes = torch.tensor([[height - 7 * (i % 2), width - 9 * (i % 3)] for i in range(count)])
    return ExportSpec(model, network.eval(), metadata, (images, sizes))


def sides_for(config: DetectionConfig, size: tuple[int, int] | None) -> tuple[int, int]:
    """(short_side, long_side) to which images are resized for a frame of `size` (None: any)."""
    own = config.data.short_side, config.data.long_side
    if size is None or (_rounded_up(own[1]) == max(size) and _rounded_up(own[0]) <= min(size)):
        return own
    return min(size), max(size)


def anchor_spec(model: GhostRetinaNet) -> dict[str, Any]:
    """What `detection.runtime.decode` needs."""
    cells = [cell.tolist() for cell in model.anchor_generator.cell_anchors]
    coder = model.head.regression_head.box_coder
    return {
        "strides": [8 * 2**level for level in range(len(cells))],
        "cells": cells,
        "weights": list(coder.weights),
        "limit": coder.bbox_xform_clip,
        "candidates": model.topk_candidates,
    }


def verify(path: Path, prepared: ExportSpec, limits: tuple[float, float] = EXACT) -> Parity:
    """Run a file on images and compare what it finds with PyTorch.

    Args:
        limits: pixels and score by which they may differ.

    Raises:
        UserError: they differ by more.
    """
    metadata = prepared.metadata
    run, written = open_exported(path, torch.device("cpu"), torch.get_num_threads())
    detector = ExportedDetector(run, written, path)
    prepared.model.transform.frame = metadata.size
    parity = Parity()
    images = sample_images(metadata)
    # As many at a time as the file takes: how much is padded changes results a little.
    count = metadata.batch or len(images)
    least = SMALLEST * STRIDE if path.suffix == FORMATS["torch_export"] else 0
    with torch.inference_mode():
        for start in range(0, len(images), count):
            some = images[start : start + count]
            if least and metadata.size is None:
                # PyTorch gets the frame that the file gets: gates look at all of it.
                sides = [max(image.shape[side] for image in some) for side in (1, 2)]
                prepared.model.transform.frame = tuple(max(least, _rounded_up(side)) for side in sides)
            parity = parity + compare(
                detector(some),
                prepared.model(some),
                score_threshold=metadata.score_threshold,
                max_detections=metadata.max_detections,
                tolerance=limits[1],
            )
    prepared.model.transform.frame = None
    if not parity.within(*limits):
        raise UserError(
            f"{path} does not compute what PyTorch does ({parity}; allowed are {limits[0]:g} px and {limits[1]:g}): "
            "do not use it. Another --form, a fixed --size or other versions of the libraries may help"
        )
    return parity


def sample_images(metadata: Metadata, count: int = 3) -> list[Tensor]:
    """Images as the file takes them: of the config's val set where it can be read, and one of random blocks."""
    size = (metadata.short_side, metadata.long_side)
    images = []
    try:
        data = parse_config(dict(metadata.config), "the config in the checkpoint").data
        index = read_split(data, "val", alone=True, images=False)
        names = [index.file_names[i] for i in range(0, len(index.file_names), max(1, len(index.file_names) // count))]
        images = [read_image(Path(index.images) / name) for name in names[:count]]
    except UserError:
        pass
    blocks = np.random.default_rng(0).integers(0, 256, (11, 15, 3), dtype=np.uint8)
    images.append(np.kron(blocks, np.ones((16, 16, 1), np.uint8)))
    resized = [resize(image, *size)[0] for image in images]
    if metadata.size is not None:
        # Portrait does not fit into a landscape frame.
        resized = [image[: metadata.size[0], : metadata.size[1]] for image in resized]
    return [to_tensor(image) for image in resized]


def describe(metadata: Metadata) -> list[str]:
    """What goes in and what comes out, for the user."""
    batch = metadata.batch or "batch"
    height, width = metadata.size or ("height", "width")
    most, classes = metadata.max_detections, len(metadata.names)
    outputs = (
        f"boxes float32 [{batch}, {most}, 4], labels int64 [{batch}, {most}], scores float32 [{batch}, {most}]"
        if metadata.form == "end_to_end"
        else f"cls_logits float32 [{batch}, anchors, {classes}], bbox_regression float32 [{batch}, anchors, 4]"
    )
    names = ", ".join(metadata.names[:5]) + (", …" if classes > 5 else "")
    return [
        f"inputs    images uint8 [{batch}, {height}, {width}, 3] (RGB), sizes int64 [{batch}, 2] (height, width)",
        f"outputs   {outputs}",
        f"images  resized to a short side of {metadata.short_side}, at most {metadata.long_side}; in frames of "
        f"multiples of {metadata.stride}",
        f"classes   {classes}: {names}; scores above {metadata.score_threshold:g}",
    ]


def _out_path(checkpoint: str | Path, file_format: str, out: str | Path | None) -> Path:
    suffix = FORMATS[file_format]
    path = Path(checkpoint).with_suffix(suffix) if out is None else Path(out)
    if path.suffix.lower() != suffix:
        raise UserError(f"--out {path}: a file of format {file_format} must end in {suffix}, by which it is known")
    return path


def files_of(path: Path) -> list[Path]:
    """The files of an exported detector: OpenVINO's numbers are in a second one."""
    return [path, path.with_suffix(".bin")] if path.suffix.lower() == FORMATS["openvino"] else [path]


def _rounded_up(side: int) -> int:
    return -(-side // STRIDE) * STRIDE
