"""torch.export: the graph in PyTorch's own operators, for torch.compile, AOTInductor and other readers."""

import copy
import io
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from backbones.hooks import forward_hooks
from detection.core.errors import UserError
from detection.core.outputs import write_output
from detection.export.spec import ExportSpec
from detection.runtime.metadata import METADATA_KEY, MIN_CANVAS_STRIDES


def export_torch_export(spec: ExportSpec, path: Path) -> list[str]:
    """Export the network and write it; the metadata are an extra file in the archive.

    Returns:
        One line that describes the file.

    Raises:
        UserError: torch.export does not support the network, or the path cannot be written to.
    """
    example = large_enough_example(spec)
    network = fold_batch_norms(spec.network, example)
    if spec.metadata.form == "end_to_end":
        network.nms = nms_mask_single_call  # type: ignore[assignment]
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(
                network,
                example,
                dynamic_shapes=dynamic_shapes(spec),
                # Each map of the pyramid is half as large as the next finer one if the sides are multiples of 32.
                # PyTorch cannot prove that and checks it when the program runs.
                prefer_deferred_runtime_asserts_over_guards=True,
            )
        except Exception as error:
            raise UserError(
                f"torch.export does not support this network ({str(error).splitlines()[0][:200]}); use --format onnx"
            ) from error
        torch.export.save(program, buffer, extra_files={METADATA_KEY: spec.metadata.to_json()})
    write_output(path, lambda file: file.write(buffer.getbuffer()))
    megabytes, version = buffer.getbuffer().nbytes / 1e6, torch.__version__.split("+")[0]
    return [
        f"{path}  {megabytes:.1f} MB, {spec.metadata.form}, torch.export of PyTorch {version}, "
        f"{len(program.graph.nodes)} nodes"
    ]


def large_enough_example(spec: ExportSpec) -> tuple[Tensor, Tensor]:
    """The example inputs, if the canvas has any size enlarged to `MIN_CANVAS_STRIDES`; height and width differ."""
    images, sizes = spec.example
    stride = spec.metadata.stride
    min_side = MIN_CANVAS_STRIDES * stride
    if spec.metadata.size is None and min(images.shape[1:3]) < min_side:
        images = images.new_zeros(len(images), min_side, min_side + stride, 3)
    return images, sizes


def dynamic_shapes(spec: ExportSpec) -> dict[str, dict[int, Any]]:
    """The `dynamic_shapes` of torch.export: the dimensions of any size, and that canvas sides are multiples of the
    stride."""
    metadata, dim = spec.metadata, torch.export.Dim
    batch: dict[int, Any] = {0: dim("batch", min=1)} if metadata.batch is None else {}
    sides: dict[int, Any] = {}
    if metadata.size is None:
        stride = metadata.stride
        sides = {axis: stride * dim(name, min=MIN_CANVAS_STRIDES) for axis, name in ((1, "height"), (2, "width"))}
    return {"images": {**batch, **sides}, "sizes": dict(batch)}


def nms_mask_single_call(
    boxes: Tensor, scores: Tensor, nms_threshold: float, score_threshold: float, max_output: int
) -> Tensor:
    """`detection.export.detector_ops.nms_mask` without a loop, because torch.export needs a fixed number of iterations.

    One call handles all groups of all images: the boxes of each group are shifted to a region of their own, as
    torchvision's `batched_nms` does with classes. float64 keeps the precision of the shifted coordinates.
    """
    groups = scores.shape[1]
    image, group, index = torch.where(scores > score_threshold)
    offset = (boxes.amax() + 1).double()
    shifted = boxes[image, index].double() + ((image * groups + group) * offset)[:, None]
    # Two dummy boxes that are always kept. The exported program asserts that there are at least two boxes (fewer have
    # another memory layout), so images with one detection or none would fail. Their group is removed at the end.
    shifted = torch.cat([shifted, shifted.new_tensor([[-2, -2, -1, -1], [-4, -4, -3, -3]])])
    candidate_scores = torch.cat([scores[image, group, index].double(), shifted.new_ones(2)])
    image, index = (torch.cat([x, x.new_zeros(2)]) for x in (image, index))
    group = torch.cat([group, group.new_full((2,), groups)])
    kept = torchvision.ops.nms(shifted, candidate_scores, nms_threshold)
    mask = F.pad(torch.zeros_like(scores), (0, 0, 0, 1))
    mask[image[kept], group[kept], index[kept]] = 1.0
    return mask[:, :groups]


def fold_batch_norms(network: nn.Module, example: tuple[Tensor, ...]) -> nn.Module:
    """A copy whose convolutions include the batch norms that follow them, which saves a third of the graph's nodes.

    Forward hooks find the pairs of a convolution and the batch norm that reads its output. A convolution that is used
    more than once, as in `PerLevelTower`, keeps its norms. If the outputs of the folded network differ (something else
    reads the output of a convolution), an unchanged copy is returned.
    """
    original = copy.deepcopy(network)
    modules = {name: m for name, m in original.named_modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)}
    calls: Counter[str] = Counter()
    pairs: list[tuple[str, str]] = []
    last: list[tuple[str, Tensor]] = []

    def record(name: str, arguments: tuple, output: Any) -> None:
        calls[name] += 1
        if isinstance(modules[name], nn.Conv2d):
            last[:] = [(name, output)]
        elif last and arguments[0] is last[0][1]:
            pairs.append((last[0][0], name))

    with torch.no_grad(), forward_hooks(modules, record):
        expected = original(*example)
    folded = copy.deepcopy(original)
    for conv, norm in pairs:
        if calls[conv] == calls[norm] == 1:
            pair: Any = folded.get_submodule(conv), folded.get_submodule(norm)
            replace_module(folded, conv, fuse_conv_bn_eval(*pair))
            replace_module(folded, norm, nn.Identity())
    with torch.no_grad():
        found = folded(*example)
    same = all(torch.allclose(a.float(), b.float(), atol=1e-2) for a, b in zip(found, expected, strict=True))
    return folded if same else original


def replace_module(network: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule `name`."""
    parent, _, own = name.rpartition(".")
    setattr(network.get_submodule(parent), own, module)
