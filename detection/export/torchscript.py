"""TorchScript: for C++ programs with libtorch, and for Python that has nothing but PyTorch and torchvision.

PyTorch itself calls the format deprecated and wants torch.export in its place; it still is what libtorch loads.
"""

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torchvision
from torch import Tensor

from detection.core.outputs import write_output
from detection.runtime.metadata import KEY

if TYPE_CHECKING:
    from detection.export.spec import ExportSpec


def export_torchscript(prepared: "ExportSpec", path: Path) -> list[str]:
    """Trace the network and write it, the metadata as an extra file in the archive.

    Returns:
        A line that tells of the file.

    Raises:
        UserError: the path cannot be written to.
    """
    with warnings.catch_warnings():
        # Of the deprecation, and of Python numbers that a trace keeps: those are the number of classes and the like.
        warnings.simplefilter("ignore")
        if prepared.metadata.form == "end_to_end":
            prepared.network.keep = torch.jit.script(keep_by_image)  # type: ignore[assignment]
        with torch.inference_mode():
            traced = torch.jit.trace(prepared.network, prepared.example, check_trace=False)
            traced = torch.jit.freeze(traced.eval())
        buffer = io.BytesIO()
        torch.jit.save(traced, buffer, _extra_files={KEY: prepared.metadata.to_json().encode()})
    write_output(path, lambda file: file.write(buffer.getbuffer()))
    megabytes, version = buffer.getbuffer().nbytes / 1e6, torch.__version__.split("+")[0]
    needs = " with torchvision's operators" if prepared.metadata.form == "end_to_end" else ""
    return [
        f"{path}  {megabytes:.1f} MB, {prepared.metadata.form}, TorchScript of PyTorch {version}{needs}, for the CPU"
    ]


def keep_by_image(boxes: Tensor, scores: Tensor, nms_threshold: float, score_threshold: float, most: int) -> Tensor:
    """`detection.export.retinanet.keep_mask` in the part of Python that TorchScript compiles: a trace alone would keep
    the example's number of images."""
    mask = torch.zeros_like(scores)
    for image in range(boxes.shape[0]):
        found = torch.nonzero(scores[image] > score_threshold)
        group, place = found[:, 0], found[:, 1]
        kept = torchvision.ops.batched_nms(boxes[image][place], scores[image][group, place], group, nms_threshold)
        mask[image, group[kept], place[kept]] = 1.0
    return mask
