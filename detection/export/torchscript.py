"""TorchScript: for C++ programs with libtorch, and for Python programs with only PyTorch and torchvision.

PyTorch has deprecated the format in favor of torch.export, but libtorch still loads it.
"""

import io
import warnings
from pathlib import Path

import torch
import torchvision
from torch import Tensor

from detection.core.outputs import write_output
from detection.export.spec import ExportSpec
from detection.runtime.metadata import METADATA_KEY


def export_torchscript(spec: ExportSpec, path: Path) -> list[str]:
    """Trace the network and write it; the metadata are an extra file in the archive.

    Returns:
        One line that describes the file.

    Raises:
        UserError: the path cannot be written to.
    """
    with warnings.catch_warnings():
        # About the deprecation, and about Python numbers that become constants of the trace (number of classes, …).
        warnings.simplefilter("ignore")
        if spec.metadata.form == "end_to_end":
            spec.network.nms = torch.jit.script(nms_mask_scripted)  # type: ignore[assignment]
        with torch.inference_mode():
            traced = torch.jit.trace(spec.network, spec.example, check_trace=False)
            traced = torch.jit.freeze(traced.eval())
        buffer = io.BytesIO()
        torch.jit.save(traced, buffer, _extra_files={METADATA_KEY: spec.metadata.to_json().encode()})
    write_output(path, lambda file: file.write(buffer.getbuffer()))
    megabytes, version = buffer.getbuffer().nbytes / 1e6, torch.__version__.split("+")[0]
    needs = " with torchvision's operators" if spec.metadata.form == "end_to_end" else ""
    return [f"{path}  {megabytes:.1f} MB, {spec.metadata.form}, TorchScript of PyTorch {version}{needs}, for the CPU"]


def nms_mask_scripted(
    boxes: Tensor, scores: Tensor, nms_threshold: float, score_threshold: float, max_output: int
) -> Tensor:
    """`detection.export.detector_ops.nms_mask` for torch.jit.script. It is scripted because a trace would fix the
    number of images."""
    mask = torch.zeros_like(scores)
    for image in range(boxes.shape[0]):
        candidates = torch.nonzero(scores[image] > score_threshold)
        group, index = candidates[:, 0], candidates[:, 1]
        kept = torchvision.ops.batched_nms(boxes[image][index], scores[image][group, index], group, nms_threshold)
        mask[image, group[kept], index[kept]] = 1.0
    return mask
