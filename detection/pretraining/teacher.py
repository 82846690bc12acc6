"""A frozen network whose logits, and feature maps at strides 8, 16, 32, another one learns from."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from backbones import WeightsError, load_weights, read_weights
from backbones.classifier import HEAD_PREFIXES, build_classifier, normalize
from backbones.file_limits import UnreadableFile
from backbones.hooks import eval_mode, forward_hooks
from backbones.timm_features import from_efficientnet_pytorch
from backbones.torch_files import read_torch_file
from detection.checkpoint import is_classes
from detection.core.device import autocast
from detection.core.errors import UserError
from detection.core.extras import require
from detection.core.limits import parameter_limit
from detection.pretraining.classification_config import TeacherConfig

log = logging.getLogger("detection")

LEVELS = {8: "c3", 16: "c4", 32: "c5"}
"""Those that detectors read."""


@dataclass(frozen=True)
class FeatureTap:
    """The module of a network that outputs the feature map of one level."""

    module: str
    channels: int


@dataclass(frozen=True)
class TeacherOutput:
    """Output of the teacher for a batch."""

    logits: Tensor
    """[N, num_classes]"""
    maps: dict[str, Tensor]
    """level -> [N, C, H/stride, W/stride]"""


class Teacher:
    """Call it on images, float32 [N, 3, H, W] in [0, 1], to get a `TeacherOutput`. Always in evaluation mode."""

    def __init__(
        self,
        network: nn.Module,
        taps: Mapping[str, FeatureTap],
        class_names: tuple[str, ...] = (),
        amp: str = "off",
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.taps = taps
        self.class_names = class_names
        self.amp = amp

    @torch.no_grad()
    def __call__(self, images: Tensor) -> TeacherOutput:
        with autocast(images.device, self.amp):
            logits, maps = logits_and_maps(self.network, normalize(images, self.network), self.taps)
        return TeacherOutput(logits, maps)


def build_teacher(spec: TeacherConfig, classes: tuple[str, ...] | None, size: int, device: torch.device) -> Teacher:
    """Build the teacher and load its weights, all of them.

    Args:
        classes: names of the data's classes; None for unlabelled data.
        size: side of the images in pixels.

    Raises:
        UserError: unknown name; weights that cannot be had or do not fit; images that it cannot take; other classes
            than the data's, where its logits are to be learned; no maps of strides 8, 16, 32, where those are.
    """
    source, _, name = spec.name.partition("/")
    try:
        if name and source == "timm":
            network = _timm_network(name, spec.weights)
        elif name and source == "torchvision":
            network = _torchvision_network(name, spec.weights)
        else:
            state_dict, file = read_weights(spec.weights, spec.name, spec.width)
            with parameter_limit({"teacher.name": spec.name, "teacher.width": spec.width}):
                network = build_classifier(spec.name, num_classes=_classes_in(state_dict), width=spec.width)
            load_weights(network, state_dict, file)
    except WeightsError as error:
        raise UserError(f"teacher.weights: {error}") from error
    except ValueError as error:
        raise UserError(f"teacher: {error}") from error
    network = network.to(device).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    taps: dict[str, FeatureTap] = {}
    try:
        with torch.no_grad():
            count = network(torch.zeros(1, 3, size, size, device=device)).shape[1]
        if spec.features:
            taps = find_taps(network)
    except (RuntimeError, AssertionError, ValueError) as error:  # transformers, for one, take one image size only
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"teacher: {spec.name} cannot take images of {size} px (data.size): {reason}") from error
    if spec.logits and classes is not None:
        _check_classes(spec, count, classes)
    if spec.features and not taps:
        raise UserError(f"teacher: {spec.name} has no maps of strides 8, 16 or 32; set teacher.features=0")
    log.info("teacher: %s, %.2f M parameters", spec.name, sum(p.numel() for p in network.parameters()) / 1e6)
    names = _class_names(spec.weights) or tuple(str(number) for number in range(count))
    return Teacher(network, taps, names, spec.amp)


def _timm_network(name: str, weights: str) -> nn.Module:
    require(f"teacher timm/{name}", "timm")
    import timm

    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}; timm.list_models('*…*') lists them")
    if weights == "pretrained":
        try:
            network = timm.create_model(name, pretrained=True)
        except Exception as error:  # the hub's client raises many types of errors
            raise _not_fetched(f"timm/{name}", error) from error
    else:
        state_dict, file = read_weights(weights, f"timm/{name}", 1.0)
        network = timm.create_model(name, num_classes=_classes_in(state_dict))
        load_weights(network, from_efficientnet_pytorch(state_dict, network.state_dict()), file)
    own = timm.data.resolve_model_data_config(network)
    network.mean, network.std = own["mean"], own["std"]
    return network


def _torchvision_network(name: str, weights: str) -> nn.Module:
    """A classifier of torchvision. All have ImageNet's mean and std, the default of `normalize`."""
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ValueError(f"torchvision has no classifier {name!r}; it has {', '.join(known)}")
    if weights == "pretrained":
        try:
            return torchvision.models.get_model(name, weights="DEFAULT")
        except Exception as error:  # from urllib, hashing or the file system
            raise _not_fetched(f"torchvision/{name}", error) from error
    state_dict, file = read_weights(weights, f"torchvision/{name}", 1.0)
    options: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    network = torchvision.models.get_model(name, weights=None, num_classes=_classes_in(state_dict), **options)
    load_weights(network, state_dict, file)
    return network


def _not_fetched(name: str, error: Exception) -> WeightsError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return WeightsError(
        f"{name} could not be fetched: {reason}. Without a network, download the file elsewhere and give its path"
    )


def _classes_in(state_dict: Mapping[str, Tensor]) -> int:
    """Number of classes: the rows of the last tensor, which is the bias or weight of the last linear layer."""
    *_, last = state_dict.values()
    return int(last.shape[0]) if last.ndim else 0


def _check_classes(spec: TeacherConfig, count: int, classes: tuple[str, ...]) -> None:
    if count != len(classes):
        raise UserError(
            f"teacher: {spec.name} has {count} classes, the data have {len(classes)}: set teacher.logits=0 and "
            "teacher.features=1 to learn its maps alone, or give one that was trained on these classes"
        )
    names = _class_names(spec.weights)
    if names is not None and names != classes:
        raise UserError(
            f"teacher: {spec.weights} was trained on other classes ({', '.join(names[:3])}, …) than the data have "
            f"({', '.join(classes[:3])}, …)"
        )


def _class_names(weights: str) -> tuple[str, ...] | None:
    """Class names in a checkpoint of this toolkit; None for other files."""
    try:
        content = read_torch_file(Path(weights))
    except (OSError, UnreadableFile):  # no file, or another format
        return None
    if not isinstance(content, dict) or "format" not in content or not is_classes(content.get("classes")):
        return None
    return tuple(content["classes"]["names"])


def find_taps(network: nn.Module) -> dict[str, FeatureTap]:
    """level -> the last block of its stride, found in a forward pass; all backbones here follow this rule.

    Left out are parts of a block that leads to the next stride, modules that give maps of several sizes (one ReLU used
    everywhere), and a classifier's last convolution.
    """
    size = 128
    seen: list[tuple[str, int, int]] = []  # name, strides of input and output, in the order of execution
    channels: dict[str, int] = {}

    def note(name: str, args: tuple, output: Any) -> None:
        if args and all(isinstance(x, Tensor) and x.ndim == 4 for x in (args[0], output)):
            seen.append((name, size // args[0].shape[2], size // output.shape[2]))
            channels[name] = output.shape[1]

    modules = {name: module for name, module in network.named_modules() if name}
    with forward_hooks(modules, note), eval_mode(network):
        network(torch.zeros(1, 3, size, size, device=next(network.parameters()).device))

    outputs: dict[str, set[int]] = {}
    for name, _, stride in seen:
        outputs.setdefault(name, set()).add(stride)
    leading_on = [(f"{name}.", before) for name, before, after in seen if after > before]
    last = {
        stride: name
        for name, _, stride in seen
        if stride in LEVELS
        and len(outputs[name]) == 1
        and not any(name.startswith(block) and stride == before for block, before in leading_on)
        and not f"{name}.".startswith(HEAD_PREFIXES)
    }
    return {LEVELS[stride]: FeatureTap(last[stride], channels[last[stride]]) for stride in sorted(last)}


def logits_and_maps(
    network: nn.Module, images: Tensor, taps: Mapping[str, FeatureTap]
) -> tuple[Tensor, dict[str, Tensor]]:
    """One forward pass of a classifier; returns its logits and, by level, the last outputs of its tapped modules."""
    maps: dict[str, Tensor] = {}
    modules = {level: network.get_submodule(tap.module) for level, tap in taps.items()}
    with forward_hooks(modules, lambda level, args, output: maps.update({level: output})):
        logits = network(images)
    return logits, maps
