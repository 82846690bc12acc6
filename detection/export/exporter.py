"""tools/export.py: converts a checkpoint to another file format, runs the file, and compares it with PyTorch."""

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
from detection.export.detector_ops import STRIDE
from detection.export.faster_rcnn import FasterRCNNDetector
from detection.export.ghostdet import GhostDetDetector, GhostDetHeads, point_spec
from detection.export.onnx import export_onnx
from detection.export.openvino import export_openvino
from detection.export.parity import Parity, compare
from detection.export.retinanet import RetinaNetDetector, RetinaNetHeads
from detection.export.spec import ExportSpec
from detection.export.torch_export import export_torch_export
from detection.export.torchscript import export_torchscript
from detection.models.ghostdet import GhostDet
from detection.models.retinanet import GhostRetinaNet
from detection.runtime.exported import ExportedDetector, open_exported
from detection.runtime.metadata import MAX_SIDE, MIN_CANVAS_STRIDES, OUTPUTS, Metadata
from detection.runtime.pytorch import load_detector
from detection.zoo.names import output_folder

FORMATS = {"onnx": ".onnx", "openvino": ".xml", "torchscript": ".torchscript", "torch_export": ".pt2"}
"""Format -> suffix of its files."""
TOLERANCE = (0.05, 1e-3)
"""Largest difference from PyTorch in pixels and in score."""


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
    """Export a checkpoint, run the file, and compare its detections with PyTorch.

    Args:
        file_format: one of `FORMATS`.
        batch, size: see `build_export_spec`.
        out: default: beside the checkpoint, with the suffix of the format.
        force: overwrite files that this toolkit did not write.

    Returns:
        Lines that describe the file.

    Raises:
        UserError: the checkpoint cannot be read, the format or the detector does not support the options, an extra is
            missing, the path cannot be written to, or the file does not compute what PyTorch does.
    """
    require(f"--format {file_format}", *WRITERS.get(file_format, ()))
    out = _out_path(checkpoint, file_format, out)
    check_outputs(exported_files(out), [checkpoint], force=force)
    spec = build_export_spec(checkpoint, form=form, batch=batch, size=size, overrides=overrides)
    if file_format == "onnx":
        notes = export_onnx(spec, out)
    elif file_format == "openvino":
        notes = export_openvino(spec, out)
    elif file_format == "torchscript":
        notes = export_torchscript(spec, out)
    else:
        notes = export_torch_export(spec, out)
    parity = verify_export(out, spec)
    return [*notes, *describe_metadata(spec.metadata), f"parity    with PyTorch, {parity}"]


def build_export_spec(
    checkpoint: str | Path,
    *,
    form: str = "end_to_end",
    batch: int | None = None,
    size: tuple[int, int] | None = None,
    overrides: Sequence[str] = (),
) -> ExportSpec:
    """Load a checkpoint and prepare its detector for an exporter.

    Args:
        form: "end_to_end" or "raw".
        batch: number of images in a batch; None: any number.
        size: (height, width) of the canvas, multiples of 32; None: any. With a fixed size images are resized to fill
            the canvas, unless the size in the config already does.
        overrides: `key=value` for the config, e.g. eval.score_threshold=0.05.
    """
    if form not in OUTPUTS:
        raise UserError(f"unknown form {form!r}; expected: one of {', '.join(OUTPUTS)}")
    if size is not None and any(side < STRIDE or side % STRIDE for side in size):
        raise UserError(f"--size {size[0]}x{size[1]}: both sides must be multiples of {STRIDE}")
    model, config, classes = load_detector(checkpoint, torch.device("cpu"), overrides=overrides)
    if isinstance(model, ExportedDetector):
        raise UserError(f"{checkpoint} is an exported detector; export the checkpoint (best.pt) from which it was made")
    # Exporters do not support channels_last and would write transpositions for it.
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
            "Faster R-CNN has no raw form, because its second stage needs the proposals of the first; use --form "
            "end_to_end"
        )
    else:
        network = FasterRCNNDetector(model, size)  # type: ignore[arg-type]
    short, long = resize_sides(config, size)
    if short > MAX_SIDE:
        raise UserError(f"data.short_side={short} is too large for an exported file; the maximum is {MAX_SIDE} pixels")
    body: Any = model.backbone.body  # type: ignore[union-attr]
    postprocess: Any = model.postprocess_spec
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
        score_threshold=postprocess.score_threshold,
        nms_threshold=postprocess.nms_threshold,
        max_detections=postprocess.max_detections,
        anchors=anchors,
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
        config=config.model_dump(mode="json"),
    )
    # The sides differ so that exporters do not mix them up. Two images, because some exporters treat one as a special
    # case.
    height, width = size or (_round_up_to_stride(short), _round_up_to_stride(short) + STRIDE)
    count = batch or 2
    images = torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8)
    sizes = torch.tensor([[height - 7 * (i % 2), width - 9 * (i % 3)] for i in range(count)])
    return ExportSpec(model, network.eval(), metadata, (images, sizes))


def resize_sides(config: DetectionConfig, size: tuple[int, int] | None) -> tuple[int, int]:
    """(short_side, long_side) to which images are resized for a canvas of `size` (None: any)."""
    short, long = config.data.short_side, config.data.long_side
    if size is None or (_round_up_to_stride(long) == max(size) and _round_up_to_stride(short) <= min(size)):
        return short, long
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
        "candidates": model.postprocess_spec.pre_nms_top_k,
    }


def verify_export(path: Path, spec: ExportSpec, tolerance: tuple[float, float] = TOLERANCE) -> Parity:
    """Run a file on images and compare its detections with those of PyTorch.

    Args:
        tolerance: largest difference in pixels and in score.

    Raises:
        UserError: they differ by more.
    """
    metadata = spec.metadata
    run, file_metadata = open_exported(path, torch.device("cpu"), torch.get_num_threads())
    detector = ExportedDetector(run, file_metadata, path)
    spec.model.transform.canvas_size = metadata.size
    parity = Parity()
    images = sample_images(metadata)
    # The same batches as the file: the amount of padding changes results a little.
    count = metadata.batch or len(images)
    min_side = MIN_CANVAS_STRIDES * STRIDE if path.suffix == FORMATS["torch_export"] else 0
    with torch.inference_mode():
        for start in range(0, len(images), count):
            batch = images[start : start + count]
            if min_side and metadata.size is None:
                # PyTorch gets the canvas of the file, because squeeze-and-excite gates average over all of it.
                sides = [max(image.shape[side] for image in batch) for side in (1, 2)]
                spec.model.transform.canvas_size = tuple(max(min_side, _round_up_to_stride(side)) for side in sides)
            parity = parity + compare(
                detector(batch),
                spec.model(batch),
                score_threshold=metadata.score_threshold,
                max_detections=metadata.max_detections,
                tolerance=tolerance[1],
            )
    spec.model.transform.canvas_size = None
    if not parity.within(*tolerance):
        raise UserError(
            f"{path} does not compute what PyTorch does ({parity}; the tolerance is {tolerance[0]:g} px and "
            f"{tolerance[1]:g}). Do not use it. Another --form, a fixed --size or other versions of the libraries may "
            "help"
        )
    return parity


def sample_images(metadata: Metadata, count: int = 3) -> list[Tensor]:
    """Resized images for a comparison: some of `data.val`, if it can be read, and one of random blocks."""
    size = (metadata.short_side, metadata.long_side)
    images = []
    try:
        data = parse_config(dict(metadata.config), "the config in the checkpoint").data
        annotations = read_split(data, "val", alone=True, images=False)
        names = [
            annotations.file_names[i]
            for i in range(0, len(annotations.file_names), max(1, len(annotations.file_names) // count))
        ]
        images = [read_image(Path(annotations.images) / name) for name in names[:count]]
    except UserError:
        pass
    blocks = np.random.default_rng(0).integers(0, 256, (11, 15, 3), dtype=np.uint8)
    images.append(np.kron(blocks, np.ones((16, 16, 1), np.uint8)))
    resized = [resize(image, *size)[0] for image in images]
    if metadata.size is not None:
        # A portrait image does not fit into a landscape canvas.
        resized = [image[: metadata.size[0], : metadata.size[1]] for image in resized]
    return [to_tensor(image) for image in resized]


def describe_metadata(metadata: Metadata) -> list[str]:
    """Lines that describe the inputs and outputs of a file."""
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
        f"images    resized to a short side of {metadata.short_side}, at most {metadata.long_side}; on a canvas whose "
        f"sides are multiples of {metadata.stride}",
        f"classes   {classes}: {names}; scores above {metadata.score_threshold:g}",
    ]


def _out_path(checkpoint: str | Path, file_format: str, out: str | Path | None) -> Path:
    suffix = FORMATS[file_format]
    path = output_folder(checkpoint) / Path(checkpoint).with_suffix(suffix).name if out is None else Path(out)
    if path.suffix.lower() != suffix:
        raise UserError(f"--out {path}: a file of format {file_format} must end in {suffix}")
    return path


def exported_files(path: Path) -> list[Path]:
    """The files of an exported detector: OpenVINO stores the weights in a second file."""
    return [path, path.with_suffix(".bin")] if path.suffix.lower() == FORMATS["openvino"] else [path]


def _round_up_to_stride(side: int) -> int:
    return -(-side // STRIDE) * STRIDE
