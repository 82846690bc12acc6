"""Finding, reading and loading weights, with a report: nothing is lost in silence (`strict=False` never is).

Users of other toolkits lost their ImageNet weights without a word, because a state dict of another layout
or width was loaded with `strict=False`. Here each load counts what matched and refuses what does not fit.
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
from backbones.file_limits import LARGEST_DIRECTORY, Unreadable, check_size
from backbones.torch_files import read_torch_file
from backbones.weight_layouts import framework_of, to_published, width_of
from backbones.weight_readers import is_mindspore, read_mindspore, read_pdparams

log = logging.getLogger("backbones")

# Published behind weights=timm, by (name, width); timm/<name> is there under its own name. The hub has no other width
# of GhostNet v1.
TIMM_NAMES = {
    ("ghostnet", 1.0): "ghostnet_100.in1k",
    ("ghostnetv2", 1.0): "ghostnetv2_100.in1k",
    ("ghostnetv2", 1.3): "ghostnetv2_130.in1k",
    ("ghostnetv2", 1.6): "ghostnetv2_160.in1k",
}
# Left in published checkpoints (GhostNetV2's, for one) by the profiler thop.
JUNK = ("total_ops", "total_params")


class WeightsError(ValueError):
    """Weights that cannot be had or do not fit; the message says what to do."""


@dataclass
class LoadReport:
    """What a load did, by state-dict key."""

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
    """Return (state dict on the CPU, a name for its source).

    Args:
        weights: "timm", "torchvision", or the path of a `.safetensors` or PyTorch file, of PaddleClas's `.pdparams` or
            MindCV's `.ckpt`. No code in it is run, whatever the format. The layouts of PaddleClas and MindCV, known by
            their keys, are converted to the published one, see `backbones.weight_layouts`.
        name, width: the backbone that it is for, to find the hub's file.

    Raises:
        WeightsError: absent, unreadable, not a state dict, or not published.
    """
    if str(weights) == "timm":
        return _read_timm(name, width)
    if str(weights) == "torchvision":
        return _read_torchvision(name, width)
    path = Path(weights).expanduser()
    if not path.is_file():
        raise WeightsError(f"weights file {path} does not exist, or is no file")
    content: object
    framework = None
    try:
        if path.suffix == ".safetensors":
            content = _read_safetensors(path)
        elif path.suffix == ".pdparams":
            framework, content = "PaddlePaddle", read_pdparams(path)
        elif path.suffix == ".ckpt" and is_mindspore(path):
            framework, content = "MindSpore", read_mindspore(path)
        else:
            content = read_torch_file(path)
    except (OSError, Unreadable) as error:
        raise WeightsError(f"weights file {path} cannot be read: {error}") from error
    state_dict = _state_dict_of(content, path)
    layout = framework_of(state_dict)
    if framework is not None and layout is None:
        raise WeightsError(
            f"weights file {path} is of {framework}, but not of a GhostNet of PaddleClas or MindCV, which alone are "
            f"converted (it has {_first(state_dict)})"
        )
    if layout is None:
        return state_dict, str(path)
    try:
        return to_published(state_dict), f"{path} ({layout}'s layout, converted)"
    except ValueError as error:
        raise WeightsError(f"weights file {path} cannot be converted: {error}") from error


def _state_dict_of(content: object, path: Path) -> dict[str, Tensor]:
    """Unwrap {"state_dict": …} and {"model": …}, drop `module.` (DataParallel) and what is no tensor."""
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise WeightsError(f"weights file {path} holds a {type(content).__name__}, not a state dict")
    state_dict = {str(k).removeprefix("module."): v for k, v in content.items() if isinstance(v, Tensor)}
    if not state_dict:
        raise WeightsError(f"weights file {path} holds no tensors")
    return state_dict


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    size = check_size(path)
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > min(size, LARGEST_DIRECTORY):
        raise Unreadable("it is no safetensors file, or a truncated one")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise Unreadable(f"it is no safetensors file, or a damaged one ({error})") from error


def _read_timm(name: str, width: float) -> tuple[dict[str, Tensor], str]:
    hub_id = name.removeprefix("timm/") if name.startswith("timm/") else TIMM_NAMES.get((name, width))
    if hub_id is None:
        published = ", ".join(f"{known} at width {at:.1f}" for known, at in TIMM_NAMES)
        raise WeightsError(
            f"there are no ImageNet weights for {name} at width {width:g} behind weights=timm "
            f"(published there: {published}, and timm/<name>); give a file, or weights=null to train from scratch"
        )
    try:
        import timm
    except ImportError as error:
        raise WeightsError("weights=timm needs the package timm: pip install -e '.[timm]'") from error
    try:
        model = timm.create_model(hub_id, pretrained=True)
    except Exception as error:  # the hub's client raises a dozen kinds; each means "could not be had"
        raise WeightsError(
            f"{hub_id} could not be fetched from the hub: {type(error).__name__}: {str(error).splitlines()[0]}. "
            "Without a network, download the file elsewhere and give its path as model.backbone.weights"
        ) from error
    return model.state_dict(), f"timm/{hub_id}"


def _read_torchvision(name: str, width: float) -> tuple[dict[str, Tensor], str]:
    if name not in torchvision.models.list_models(module=torchvision.models) or width != 1:
        raise WeightsError(
            f"there are no ImageNet weights for {name} at width {width:g} behind weights=torchvision, which has those "
            "of torchvision's own networks (resnet50, mobilenet_v3_large, …) at width 1 alone"
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
    """Load all of `model` from `state_dict`, log and return the report.

    Tensors of a classifier that the model does not have (a backbone's `classifier_prefixes`) are left over in order.
    A backbone may know how to rename those of another published layout (`convert_keys`). What is no part of the network
    (an optimizer's state, say) is reported as unexpected. Everything else must fit:

    Raises:
        WeightsError: an older, incompatible release; another width (shapes differ); nothing matches; some
            tensors of the model are missing, or the file has more of one of its parts (layer1.2 where it ends at
            layer1.1); a tensor holds numbers that are not finite. The model is then untouched.
    """
    own = model.state_dict()
    prefixes: tuple[str, ...] = ()
    if isinstance(model, Backbone):
        state_dict, prefixes = model.convert_keys(state_dict), model.classifier_prefixes
    state_dict = {key: value for key, value in state_dict.items() if not key.endswith(JUNK)}
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
    # Batch norm's step counter came with PyTorch 0.4.1; it plays no part in what the network computes.
    report.missing = [k for k in own if k not in state_dict and not k.endswith("num_batches_tracked")]
    log.info("%s", report)

    if any(k.startswith("features.") and ".conv." in k and ".primary_conv." in k for k in report.unexpected):
        raise WeightsError(
            f"{report}. These keys (features.N.conv.…) are of the older ghostnet.pytorch release, which is a "
            "different network (other channel rounding, other gates, depthwise layers at stride 1): use "
            "state_dict_73.98.pth or timm's ghostnet_100.in1k"
        )
    if not report.matched and not report.mismatched:
        expected = next(iter(own))
        raise WeightsError(
            f"{report}. Nothing matches: the file is of another network (it has {_first(state_dict)}, "
            f"expected {expected}, …)"
        )
    if report.mismatched:
        key = report.mismatched[0]
        found, expected_width = width_of(state_dict), width_of(own)
        advice = "set model.backbone.width to the file's width"
        if found is not None and expected_width is not None and found != expected_width:
            advice = f"the file's width is {found:g}: set model.backbone.width={found:g}"
        raise WeightsError(
            f"{report}. The file is of another width or variant: {key} is {list(state_dict[key].shape)} in the "
            f"file, {list(own[key].shape)} in the model; {advice}"
        )
    if report.missing:
        raise WeightsError(
            f"{report}. The file lacks parts of the network ({', '.join(report.missing[:3])}, …): "
            "they would silently stay random"
        )
    parts = {key.partition(".")[0] for key in own}
    strange = [key for key in report.unexpected if key.partition(".")[0] in parts]
    if strange:
        raise WeightsError(
            f"{report}. The file has tensors that this network has no place for ({', '.join(strange[:3])}, …): "
            "it is of another one, a deeper variant perhaps"
        )
    if bad := first_not_finite(usable):
        raise WeightsError(f"weights {source}: {bad} has numbers that are not finite (NaN or infinite)")
    model.load_state_dict({**own, **usable})
    return report


def first_not_finite(state_dict: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or an infinite number; None where all are finite."""
    numbers = {name: value for name, value in state_dict.items() if value.is_floating_point()}
    # A sum takes one pass; of finite numbers it may be infinite, too.
    sums = [value.sum(dtype=torch.float32) for value in numbers.values()]
    if not sums or bool(torch.stack(sums).isfinite().all()):
        return None
    return next((name for name, value in numbers.items() if not bool(value.isfinite().all())), None)


def _first(state_dict: Mapping[str, Tensor]) -> str:
    return ", ".join(list(state_dict)[:2]) + ", …"
