"""torch.export: the whole graph in PyTorch's own operators, for torch.compile, AOTInductor and what else reads it."""

import copy
import io
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from backbones.hooks import watched
from detection.core.errors import UserError
from detection.core.outputs import write_output
from detection.runtime.metadata import KEY, SMALLEST

if TYPE_CHECKING:
    from detection.export.spec import ExportSpec


def export_torch_export(prepared: "ExportSpec", path: Path) -> list[str]:
    """Export the network and write it, the metadata as an extra file in the archive.

    Returns:
        A line that tells of the file.

    Raises:
        UserError: the network has what torch.export cannot follow, or the path cannot be written to.
    """
    example = large_enough(prepared)
    network = fold_norms(prepared.network, example)
    if prepared.metadata.form == "end_to_end":
        network.keep = keep_at_once  # type: ignore[assignment]
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(
                network,
                example,
                dynamic_shapes=dynamic_shapes(prepared),
                # That maps of the pyramid are as large as each other's halves holds for multiples of 32; PyTorch cannot
                # prove it and checks it when the program runs.
                prefer_deferred_runtime_asserts_over_guards=True,
            )
        except Exception as error:
            raise UserError(
                f"torch.export cannot follow this network ({str(error).splitlines()[0][:200]}); use --format onnx"
            ) from error
        torch.export.save(program, buffer, extra_files={KEY: prepared.metadata.to_json()})
    write_output(path, lambda file: file.write(buffer.getbuffer()))
    megabytes, version = buffer.getbuffer().nbytes / 1e6, torch.__version__.split("+")[0]
    return [
        f"{path}  {megabytes:.1f} MB, {prepared.metadata.form}, torch.export of PyTorch {version}, "
        f"{len(program.graph.nodes)} nodes"
    ]


def large_enough(prepared: "ExportSpec") -> tuple[Tensor, Tensor]:
    """The example, in frames of at least `SMALLEST` where they may have any size; sides that differ stay different."""
    images, sizes = prepared.example
    least, stride = SMALLEST * prepared.metadata.stride, prepared.metadata.stride
    if prepared.metadata.size is None and min(images.shape[1:3]) < least:
        images = images.new_zeros(len(images), least, least + stride, 3)
    return images, sizes


def dynamic_shapes(prepared: "ExportSpec") -> dict[str, dict[int, Any]]:
    """What `torch.export` is told of the inputs: which of their sides are any, and that frames are multiples of the
    stride."""
    metadata, dim = prepared.metadata, torch.export.Dim
    images: dict[int, Any] = {0: dim("batch", min=1)} if metadata.batch is None else {}
    frame: dict[int, Any] = {}
    if metadata.size is None:
        frame = {side: metadata.stride * dim(name, min=SMALLEST) for side, name in ((1, "height"), (2, "width"))}
    return {"images": {**images, **frame}, "sizes": dict(images)}


def keep_at_once(boxes: Tensor, scores: Tensor, nms_threshold: float, score_threshold: float, most: int) -> Tensor:
    """`detection.export.retinanet.keep_mask` without a loop, for which torch.export wants to know the number of rounds.

    One call suppresses in all images and groups: each is moved to a place of its own, as torchvision's `batched_nms`
    does with classes; in float64, so that the coordinates keep their digits however far they are moved.
    """
    groups = scores.shape[1]
    image, group, place = torch.where(scores > score_threshold)
    apart = (boxes.amax() + 1).double()
    moved = boxes[image, place].double() + ((image * groups + group) * apart)[:, None]
    # Two boxes of nothing, which are always kept: programs check that there are two, lest the layout of memory change,
    # and images with one detection, or none, would be refused. Their places are in a group that is cut off.
    moved = torch.cat([moved, moved.new_tensor([[-2, -2, -1, -1], [-4, -4, -3, -3]])])
    best = torch.cat([scores[image, group, place].double(), moved.new_ones(2)])
    image, place = (torch.cat([index, index.new_zeros(2)]) for index in (image, place))
    group = torch.cat([group, group.new_full((2,), groups)])
    kept = torchvision.ops.nms(moved, best, nms_threshold)
    mask = F.pad(torch.zeros_like(scores), (0, 0, 0, 1))
    mask[image[kept], group[kept], place[kept]] = 1.0
    return mask[:, :groups]


def fold_norms(network: nn.Module, example: tuple[Tensor, ...]) -> nn.Module:
    """A copy in which convolutions do the work of the batch norms behind them: a third of the graph's nodes less.

    Pairs are found by watching the network run. A convolution that is used more than once, as those of `PerLevelTower`,
    keeps its norms; and should something else have looked at what a convolution gave, the answers show it, and the
    copy is left as it was.
    """
    plain = copy.deepcopy(network)
    names = {name: m for name, m in plain.named_modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)}
    calls: Counter[str] = Counter()
    pairs: list[tuple[str, str]] = []
    last: list[tuple[str, Tensor]] = []

    def see(name: str, arguments: tuple, output: Any) -> None:
        calls[name] += 1
        if isinstance(names[name], nn.Conv2d):
            last[:] = [(name, output)]
        elif last and arguments[0] is last[0][1]:
            pairs.append((last[0][0], name))

    with torch.no_grad(), watched(names, see):
        expected = plain(*example)
    folded = copy.deepcopy(plain)
    for conv, norm in pairs:
        if calls[conv] == calls[norm] == 1:
            parts: Any = folded.get_submodule(conv), folded.get_submodule(norm)
            replace(folded, conv, fuse_conv_bn_eval(*parts))
            replace(folded, norm, nn.Identity())
    with torch.no_grad():
        found = folded(*example)
    same = all(torch.allclose(a.float(), b.float(), atol=1e-2) for a, b in zip(found, expected, strict=True))
    return folded if same else plain


def replace(network: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one called `name`."""
    parent, _, own = name.rpartition(".")
    setattr(network.get_submodule(parent), own, module)
