"""Finds, reads and loads weights, and reports every tensor that was not loaded.

`strict=False` is never used: with it, a state dict of another layout or width leaves the network random without a
warning. Here each load counts the matching tensors and raises an error for those that do not fit.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from backbones.base import Backbone
from backbones.file_limits import MAX_ZIP_DIRECTORY, UnreadableFile, check_size
from backbones.torch_files import read_torch_file
from backbones.weight_layouts import convert_to_published, detect_layout, ghostnet_width
from backbones.weight_readers import is_mindspore, read_mindspore, read_pdparams

log = logging.getLogger("backbones")

# (name, width) -> timm's name of the weights for weights=timm; timm/<name> uses its own name. The hub has GhostNet v1
# only at width 1.0.
TIMM_NAMES = {
    ("ghostnet", 1.0): "ghostnet_100.in1k",
    ("ghostnetv2", 1.0): "ghostnetv2_100.in1k",
    ("ghostnetv2", 1.3): "ghostnetv2_130.in1k",
    ("ghostnetv2", 1.6): "ghostnetv2_160.in1k",
}
# Keys that the profiler thop left in published checkpoints, for example GhostNetV2's.
PROFILER_KEYS = ("total_ops", "total_params")


class WeightsError(ValueError):
    """Weights are not available or do not fit; the message says what to do."""


@dataclass
class LoadReport:
    """The state-dict keys of a load, by result."""

    source: str
    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    classifier: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = (
            f"weights {self.source}: {len(self.matched)} matched, {len(self.missing)} missing, "
            f"{len(self.unexpected)} unexpected, {len(self.mismatched)} shape-mismatched"
        )
        if self.classifier:
            text += f" ({len(self.classifier)} classifier tensors not needed here)"
        return text


def read_weights(weights: str | os.PathLike[str], name: str, width: float) -> tuple[dict[str, Tensor], str]:
    """Return (state dict on the CPU, name of its source).

    Args:
        weights: "timm", "torchvision", or the path of a `.safetensors` or PyTorch file, of PaddleClas's `.pdparams` or
            MindCV's `.ckpt`. No code in the file is run. The layouts of PaddleClas and MindCV are recognized by their
            keys and converted to the published one, see `backbones.weight_layouts`.
        name, width: of the backbone, to find the file on the hub.

    Raises:
        WeightsError: the weights are missing, unreadable, not a state dict, or not published.
    """
    if str(weights) == "timm":
        return _read_timm(name, width)
    if str(weights) == "torchvision":
        return _read_torchvision(name, width)
    path = Path(weights).expanduser()
    if not path.is_file():
        raise WeightsError(f"weights file {path} does not exist or is not a file")
    content: object
    framework = None
    try:
        if path.suffix == ".safetensors":
            content, _ = read_safetensors(path)
        elif path.suffix == ".pdparams":
            framework, content = "PaddlePaddle", read_pdparams(path)
        elif path.suffix == ".ckpt" and is_mindspore(path):
            framework, content = "MindSpore", read_mindspore(path)
        else:
            content = read_torch_file(path)
    except (OSError, UnreadableFile) as error:
        raise WeightsError(f"weights file {path} cannot be read: {error}") from error
    state_dict = _state_dict_of(content, path)
    layout = detect_layout(state_dict)
    if framework is not None and layout is None:
        raise WeightsError(
            f"weights file {path} of {framework} cannot be converted: expected: a GhostNet of PaddleClas or MindCV, "
            f"got keys {_first_keys(state_dict)}"
        )
    if layout is None:
        return state_dict, str(path)
    try:
        return convert_to_published(state_dict), f"{path} ({layout}'s layout, converted)"
    except ValueError as error:
        raise WeightsError(f"weights file {path} cannot be converted: {error}") from error


def _state_dict_of(content: object, path: Path) -> dict[str, Tensor]:
    """Unwrap {"state_dict": …} and {"model": …}; remove the prefix `module.` (DataParallel) and all but tensors."""
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise WeightsError(f"weights file {path} holds a {type(content).__name__}, not a state dict")
    state_dict = {str(k).removeprefix("module."): v for k, v in content.items() if isinstance(v, Tensor)}
    if not state_dict:
        raise WeightsError(f"weights file {path} holds no tensors")
    return state_dict


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a .safetensors file, on the CPU, and its metadata.

    Raises:
        UnreadableFile, OSError: it is not such a file, it is damaged, or it is too large.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    size = check_size(path)
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > min(size, MAX_ZIP_DIRECTORY):
        raise UnreadableFile("it is not a safetensors file, or it is truncated")
    try:
        with safe_open(path, "pt") as opened:
            metadata = opened.metadata() or {}
        return load_file(path), metadata
    except SafetensorError as error:
        raise UnreadableFile(f"it is not a safetensors file, or it is damaged ({error})") from error


def _read_timm(name: str, width: float) -> tuple[dict[str, Tensor], str]:
    hub_id = name.removeprefix("timm/") if name.startswith("timm/") else TIMM_NAMES.get((name, width))
    if hub_id is None:
        published = ", ".join(f"{known} at width {at:.1f}" for known, at in TIMM_NAMES)
        raise WeightsError(
            f"weights=timm has no ImageNet weights for {name} at width {width:g} (published: {published}, and "
            "timm/<name>); give a file, or weights=null to train from scratch"
        )
    try:
        import timm
    except ImportError as error:
        raise WeightsError("weights=timm needs the package timm: pip install -e '.[timm]'") from error
    try:
        model = timm.create_model(hub_id, pretrained=True)
    except Exception as error:  # the hub's client raises many kinds of errors
        raise WeightsError(
            f"{hub_id} could not be fetched from the hub: {type(error).__name__}: {str(error).splitlines()[0]}. "
            "Without a network, download the file elsewhere and give its path as model.backbone.weights"
        ) from error
    return model.state_dict(), f"timm/{hub_id}"


def _read_torchvision(name: str, width: float) -> tuple[dict[str, Tensor], str]:
    if name not in torchvision.models.list_models(module=torchvision.models) or width != 1:
        raise WeightsError(
            f"weights=torchvision has no ImageNet weights for {name} at width {width:g}, only for torchvision's own "
            "networks (resnet50, mobilenet_v3_large, …) at width 1"
        )
    weights = torchvision.models.get_model_weights(name).DEFAULT
    try:
        return dict(weights.get_state_dict(check_hash=True)), f"torchvision/{weights}"
    except (OSError, RuntimeError) as error:
        raise WeightsError(
            f"{weights} could not be fetched: {type(error).__name__}: {str(error).splitlines()[0]}. Without a network, "
            f"download {weights.url} elsewhere and give its path as model.backbone.weights"
        ) from error


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor], source: str = "state dict") -> LoadReport:
    """Load every tensor of `model` from `state_dict`; log and return the report.

    Tensors of a classifier that a backbone does not have (`classifier_prefixes`) are allowed. A backbone may convert
    the keys of another published layout (`convert_keys`). Tensors of no part of the network (the state of an optimizer,
    for example) are reported as unexpected. Everything else must fit.

    Raises:
        WeightsError: an older, incompatible release; another width (shapes differ); nothing matches; tensors of the
            model are missing; the file has more layers in a part of the network (layer1.2 if it ends at layer1.1); or a
            tensor has numbers that are not finite. The model is not changed then.
    """
    own = model.state_dict()
    prefixes: tuple[str, ...] = ()
    if isinstance(model, Backbone):
        state_dict, prefixes = model.convert_keys(state_dict), model.classifier_prefixes
    state_dict = {key: value for key, value in state_dict.items() if not key.endswith(PROFILER_KEYS)}
    report = LoadReport(source)
    usable: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if key not in own:
            (report.classifier if key.startswith(prefixes) else report.unexpected).append(key)
        elif own[key].shape != value.shape:
            report.mismatched.append(key)
        else:
            report.matched.append(key)
            usable[key] = value
    # The step counter of batch norms was added in PyTorch 0.4.1 and does not affect the outputs.
    report.missing = [k for k in own if k not in state_dict and not k.endswith("num_batches_tracked")]
    log.info("%s", report)

    if any(k.startswith("features.") and ".conv." in k and ".primary_conv." in k for k in report.unexpected):
        raise WeightsError(
            f"{report}. These keys (features.N.conv.…) are of the older ghostnet.pytorch release, which is a "
            "different network (other channel rounding, other gates, depthwise layers at stride 1); use "
            "state_dict_73.98.pth or timm's ghostnet_100.in1k"
        )
    if not report.matched and not report.mismatched:
        expected = next(iter(own))
        raise WeightsError(
            f"{report}. Nothing matches: the file is of another network (it has {_first_keys(state_dict)}, "
            f"expected {expected}, …)"
        )
    if report.mismatched:
        key = report.mismatched[0]
        found, expected_width = ghostnet_width(state_dict), ghostnet_width(own)
        advice = "set model.backbone.width to the file's width"
        if found is not None and expected_width is not None and found != expected_width:
            advice = f"the file's width is {found:g}: set model.backbone.width={found:g}"
        raise WeightsError(
            f"{report}. The file is of another width or variant: {key} is {list(state_dict[key].shape)} in the "
            f"file, {list(own[key].shape)} in the model; {advice}"
        )
    if report.missing:
        raise WeightsError(
            f"{report}. The file lacks tensors of the network ({', '.join(report.missing[:3])}, …), which would stay "
            "random"
        )
    parts = {key.partition(".")[0] for key in own}
    surplus = [key for key in report.unexpected if key.partition(".")[0] in parts]
    if surplus:
        raise WeightsError(
            f"{report}. The file has tensors that this network does not have ({', '.join(surplus[:3])}, …): it is of "
            "another network, perhaps a deeper variant"
        )
    if bad := first_non_finite(usable):
        raise WeightsError(f"weights {source}: {bad} has numbers that are not finite (NaN or infinite)")
    model.load_state_dict({**own, **usable})
    return report


def first_non_finite(state_dict: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with NaN or an infinite number; None if all are finite."""
    numbers = {name: value for name, value in state_dict.items() if value.is_floating_point()}
    # A sum takes one pass. The sum of finite numbers may be infinite as well, so the tensors are checked below.
    sums = [value.sum(dtype=torch.float32) for value in numbers.values()]
    if not sums or bool(torch.stack(sums).isfinite().all()):
        return None
    return next((name for name, value in numbers.items() if not bool(value.isfinite().all())), None)


def _first_keys(state_dict: Mapping[str, Tensor]) -> str:
    return ", ".join(list(state_dict)[:2]) + ", …"
