"""torch.export: the whole graph in PyTorch's own operators, for torch.compile, AOTInductor and what else reads it."""

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torchvision
from torch import Tensor

from detection.export.metadata import KEY
from detection.files import write_atomically

if TYPE_CHECKING:
    from detection.export.export import Prepared


def export_torch_export(prepared: "Prepared", path: Path) -> list[str]:
    """Export the network and write it, the metadata as an extra file in the archive.

    Returns:
        Lines for the user.
    """
    if prepared.metadata.form == "end_to_end":
        prepared.network.keep = keep_at_once  # type: ignore[assignment]
    program = torch.export.export(
        prepared.network,
        prepared.example,
        dynamic_shapes=dynamic_shapes(prepared),
        # That maps of the pyramid are as large as each other's halves holds for multiples of 32; PyTorch cannot prove
        # it and checks it when the program runs.
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program, buffer, extra_files={KEY: prepared.metadata.to_json()})
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))
    note = f"needs     torch {torch.__version__.split('+')[0]} or near (the format changes with it)"
    if prepared.metadata.form == "end_to_end":
        note += ", and `import torchvision` before torch.export.load"
    return [f"file      {path}", note]


def dynamic_shapes(prepared: "Prepared") -> dict[str, Any]:
    """What `torch.export` is told of the inputs: which of their sides are any, and that frames are multiples of the
    stride."""
    metadata = prepared.metadata
    batch: Any = torch.export.Dim("batch", min=1) if metadata.batch is None else None
    height = width = None
    if metadata.size is None:
        height = metadata.stride * torch.export.Dim("height", min=1)
        width = metadata.stride * torch.export.Dim("width", min=1)
    return {"images": {0: batch, 1: height, 2: width}, "sizes": {0: batch}}


def keep_at_once(boxes: Tensor, scores: Tensor, nms_threshold: float, score_threshold: float, most: int) -> Tensor:
    """`detection.export.graph.keep_mask` without a loop, for which torch.export wants to know the number of rounds.

    One call suppresses in all pictures and groups: each is moved to a place of its own, as torchvision's `batched_nms`
    does with classes; in float64, so that the coordinates keep their digits however far they are moved.
    """
    picture, group, place = torch.where(scores > score_threshold)
    apart = (boxes.amax() + 1).double()
    moved = boxes[picture, place].double() + ((picture * scores.shape[1] + group) * apart)[:, None]
    kept = torchvision.ops.nms(moved, scores[picture, group, place].double(), nms_threshold)
    mask = torch.zeros_like(scores)
    mask[picture[kept], group[kept], place[kept]] = 1.0
    return mask
