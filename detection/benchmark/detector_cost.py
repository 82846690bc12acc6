"""Counts the cost of a backbone or a detector, part by part, on the meta device, which is fast at any input size."""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN

from backbones import build_backbone
from backbones.cost import Cost, measure_cost, measure_memory
from detection.benchmark.cost_report import CostRow
from detection.benchmark.settings import DIVISOR
from detection.config_io import load_config
from detection.core.errors import UserError
from detection.models.build import build_model

PARTS = {"backbone": "pyramid.body", "neck": "pyramid.fpn", "head": "head", "total": ""}
"""Part -> its module in `DetectorParts`."""


class DetectorParts(nn.Module):
    """The parts of a torchvision-style detector that have weights, called one after the other.

    The rest – anchors, box decoding, selection of proposals, RoIAlign, NMS – has hardly any multiply-adds and cannot
    run on the meta device. forward: images [N, 3, H, W] -> outputs of the heads.
    """

    def __init__(self, pyramid: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.head = head

    def forward(self, images: Tensor) -> object:
        return self.head(list(self.pyramid(images).values()))


class TwoStageHead(nn.Module):
    """The two heads of Faster R-CNN; the second runs on empty feature maps in place of the output of RoIAlign."""

    def __init__(self, model: FasterRCNN, proposals: int) -> None:
        super().__init__()
        self.rpn = model.rpn.head
        self.box_head = model.roi_heads.box_head
        self.box_predictor = model.roi_heads.box_predictor
        self.roi_shape = (proposals, model.backbone.out_channels, *model.roi_heads.box_roi_pool.output_size)

    def forward(self, features: list[Tensor]) -> object:
        rois = features[0].new_zeros(self.roi_shape)
        return self.rpn(features), self.box_predictor(self.box_head(rois))


def network_costs(
    target: str, size: tuple[int, int] | None = None, *, num_classes: int = 80, layers: bool = False
) -> list[CostRow]:
    """The cost of a detector or a backbone for one image.

    Args:
        target: path of a config, or NAME or NAME@WIDTH of a backbone, counted without its classifier.
        size: height and width in pixels. None: the config's short and long side; 224x224 for a backbone. Detectors pad
            it to multiples of 32.
        num_classes: of the detector's head.
        layers: add a row for every layer that has parameters or multiply-adds.

    Returns:
        Rows backbone, neck, head and total; a backbone has one row.

    Raises:
        UserError: the config or backbone does not exist, or the image is too small for the network.
    """
    if not is_config(target):
        with torch.device("meta"):
            backbone = _backbone(target).eval()
        return _rows(target, size or (224, 224), backbone, backbone, {"backbone": ""}, layers)
    # The weights do not affect the cost, and their file may be missing.
    config = load_config(target, ["model.backbone.weights=null"])
    height, width = size or (config.data.short_side, config.data.long_side)
    with torch.device("meta"):
        model = build_model(config, num_classes)
    return detector_costs(target, model, (-(-height // DIVISOR) * DIVISOR, -(-width // DIVISOR) * DIVISOR), layers)


def detector_costs(name: str, model: nn.Module, size: tuple[int, int], layers: bool = False) -> list[CostRow]:
    """Rows for backbone, neck, head and total of a detector with torchvision's parts, built on the meta device.

    The second stage of Faster R-CNN is counted for the proposals of one image: 1000 (torchvision's default in
    inference) for multiply-adds and activations, 512 (in training) for memory.

    Args:
        name: of the network in the rows.
        model: with `backbone.body`, `backbone.fpn` and `head`, or a Faster R-CNN.
        size: height and width of the padded image.
    """
    model.eval()
    inference = training = inference_parts(model)
    if isinstance(model, FasterRCNN):
        proposals = model.roi_heads.fg_bg_sampler.batch_size_per_image
        training = DetectorParts(model.backbone, TwoStageHead(model, proposals))
    return _rows(name, size, inference, training, PARTS, layers)


def detector_total(model: nn.Module, size: tuple[int, int]) -> Cost:
    """The total cost of a detector with torchvision's parts (RetinaNet, SSD, Faster R-CNN) for one image.

    Args:
        model: in evaluation mode, on any device; it is not changed.
        size: height and width of the padded image.
    """
    parts = inference_parts(copy.deepcopy(model).to("meta"))
    return measure_cost(parts, torch.zeros(1, 3, *size, device="meta"))[""]


def inference_parts(model: nn.Module) -> DetectorParts:
    """The parts of a detector; the second stage of Faster R-CNN gets the number of proposals in inference."""
    if isinstance(model, FasterRCNN):
        return DetectorParts(model.backbone, TwoStageHead(model, model.rpn.post_nms_top_n()))
    return DetectorParts(model.get_submodule("backbone"), model.get_submodule("head"))


def is_config(target: str) -> bool:
    """Whether a command-line argument is the path of a config; no name of a backbone ends in .yaml."""
    return Path(target).suffix.lower() in (".yaml", ".yml")


def _backbone(target: str) -> nn.Module:
    name, at, width = target.partition("@")
    try:
        factor = float(width) if at else 1.0
    except ValueError:
        raise UserError(f"{target}: width {width!r} is not a number, like 1.1") from None
    try:
        return build_backbone(name, width=factor)
    except ValueError as error:
        hint = ". For a config give its path, which ends in .yaml" if str(error).startswith("unknown") else ""
        raise UserError(f"{error}{hint}") from error


def _rows(
    name: str,
    size: tuple[int, int],
    inference: nn.Module,
    training: nn.Module,
    parts: dict[str, str],
    layers: bool,
) -> list[CostRow]:
    """Rows of `parts` (part -> module name): memory of `training`, everything else of `inference`."""
    try:
        images = torch.zeros(1, 3, *size, device="meta")
        costs = measure_cost(inference, images)
        memory = measure_memory(training, images)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"an image of {size[0]}x{size[1]} pixels is too small for {name}: {reason}") from error

    def row(part: str, module: str) -> CostRow:
        cost = costs[module]
        return CostRow(name, size, part, cost.parameters, cost.macs, cost.activations, memory[module])

    rows = [row(part, module) for part, module in parts.items()]
    if layers:
        leaves = [module for module, child in inference.named_modules() if not list(child.children())]
        rows += [row(_layer_name(leaf, parts), leaf) for leaf in leaves if costs[leaf].parameters or costs[leaf].macs]
    return rows


def _layer_name(module: str, parts: dict[str, str]) -> str:
    for part, prefix in parts.items():
        if prefix and module.startswith(f"{prefix}."):
            return part + module.removeprefix(prefix)
    return module
