"""Turns a convolutional classifier into a backbone and keeps the names of its modules.

Most classifiers run a sequence of modules – stem, blocks, classifier – each on the output of the previous one. One
forward pass with hooks finds this sequence; it is split into stages where the feature map shrinks. So no table of layer
names is needed, and each level is the output of the *last* module with its stride.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from backbones.base import LEVELS, Backbone
from backbones.hooks import eval_mode, forward_hooks

REQUIRED_LEVELS = ("c2", "c3", "c4", "c5")
# (height, width) of the test image. It is small to save time, not square so that swapped or flattened axes are noticed,
# and large enough for several positions in c5, so that a global mean is not taken for one more stride.
PROBE_SIZE = (64, 96)


class SequentialFeatures(Backbone):
    """The feature extractor of a classifier, with the classifier's state-dict keys.

    The modules after the last feature map of stride 32 are removed, and so are the 1x1 convolutions at its end that
    only widen the map for the classifier (to 1280 channels in MobileNetV2; `blocks.9` of GhostNet).
    `classifier_prefixes` holds their names.

    Args:
        network: takes [N, 3, H, W] float32. Its modules are moved to the backbone, so it cannot be used afterwards.
        name: the network's, for error messages.

    Raises:
        ValueError: the network is not a sequence of modules up to stride 32, or has no maps of strides 4, 8, 16 and 32
            (vision transformers).
    """

    def __init__(self, network: nn.Module, name: str, out_levels: Sequence[str] = REQUIRED_LEVELS) -> None:
        super().__init__()
        keys = list(network.state_dict())
        self._names = _find_stages(network, name)
        _prune(network, {part for parts in self._names.values() for part in parts})
        for child_name, child in network.named_children():
            self.add_module(child_name, child)
        own = set(self.state_dict())
        self.classifier_prefixes = tuple(key for key in keys if key not in own)
        self.set_out_levels(out_levels)

    def stage_modules(self) -> Iterator[tuple[str, list[nn.Module]]]:
        # Looked up by name at each call, because a module may have been replaced by a fused or ghosted one.
        for level, names in self._names.items():
            yield level, [self.get_submodule(name) for name in names]


def _find_stages(network: nn.Module, name: str) -> "OrderedDict[str, list[str]]":
    """level -> names of the modules that compute it from the previous level, in order."""
    with eval_mode(network):
        device = next(network.parameters()).device
        image = torch.arange(3 * PROBE_SIZE[0] * PROBE_SIZE[1], device=device).sin().view(1, 3, *PROBE_SIZE)
        calls, spatial = _record_calls(network, image, name)
        maps = _strip_classifier_convs(network, _follow_chain(network, image, calls))
    stages: OrderedDict[str, list[str]] = OrderedDict()
    first: list[str] = []
    for part, x in maps:
        stride = PROBE_SIZE[0] // x.shape[2]
        if stride == 1:
            first.append(part)
        else:
            stages.setdefault(LEVELS[stride.bit_length() - 2], []).append(part)
    lacking = [level for level in REQUIRED_LEVELS if level not in stages]
    if lacking:
        strides = ", ".join(str(2 ** (LEVELS.index(level) + 1)) for level in stages) or "none"
        raise ValueError(
            f"{name} cannot be a backbone: detectors need feature maps [N, C, H, W] of strides 4, 8, 16 and 32 from "
            f"modules that run one after the other; only these strides were found: {strides}. Vision transformers and "
            "networks of other structure are not supported; use mobilenet_v3_large, resnet50 or timm/ghostnetv2_100"
        )
    kept = tuple(f"{part}." for part, _ in maps)
    lost = [conv for conv in spatial if not f"{conv}.".startswith(kept)]
    if lost:
        raise ValueError(
            f"{name} cannot be a backbone: after {maps[-1][0]!r} its modules do not run one after the other, and "
            f"layers would be lost (first: {lost[0]})"
        )
    next(iter(stages.values()))[:0] = first
    return stages


def _record_calls(network: nn.Module, image: Tensor, name: str) -> tuple[list[tuple[str, Any]], list[str]]:
    """Run the network once with forward hooks.

    Returns:
        (name, output) of its parts, in the order of their calls; and the names of all convolutions with a kernel above
        1 whose output has more than one position. Parts are the children of the network, and the children of a plain
        `nn.Sequential` or `nn.ModuleList` in its place. Modules of other classes are not split, because the last layer
        of a stride inside them is not the end of a stage (the expansion in a MobileNet block of stride 2, for example).
    """
    calls: list[tuple[str, Any]] = []
    spatial: list[str] = []

    def note_call(part: str, args: tuple, output: Any) -> None:
        # A copy, because a later layer may change it in place.
        calls.append((part, output.clone() if isinstance(output, Tensor) else None))

    def note_spatial(part: str, args: tuple, output: Tensor) -> None:
        if output.shape[2:].numel() > 1:
            spatial.append(part)

    convolutions = {
        part: m for part, m in network.named_modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1
    }
    try:
        with forward_hooks(dict(_parts(network)), note_call), forward_hooks(convolutions, note_spatial):
            network(image)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{name} cannot be a backbone: it does not take images of any size "
            f"(at {PROBE_SIZE[0]}x{PROBE_SIZE[1]}: {reason})"
        ) from error
    return calls, spatial


def _parts(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if type(child) in (nn.Sequential, nn.ModuleList):
            yield from _parts(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _follow_chain(network: nn.Module, image: Tensor, calls: Sequence[tuple[str, Any]]) -> list[tuple[str, Tensor]]:
    """(part, its map) of the first parts that, run one after the other, reproduce the outputs of the network."""
    maps: list[tuple[str, Tensor]] = []
    x = image
    for part, expected in calls:
        if expected is None or not _is_map(expected) or (maps and expected.shape[2] > maps[-1][1].shape[2]):
            break
        try:
            x = network.get_submodule(part)(x)
        except Exception:  # its input is not just the output of the previous part: the sequence ends here
            break
        # On the meta device, where costs are counted, tensors have shapes but no values.
        if x.shape != expected.shape or not (x.is_meta or torch.allclose(x, expected, rtol=1e-4, atol=1e-5)):
            break
        maps.append((part, expected))
    return maps


def _is_map(x: Tensor) -> bool:
    """[N, C, H / stride, W / stride] with a stride of 1, 2, 4, … 32."""
    if x.dim() != 4 or 0 in x.shape:
        return False
    stride = PROBE_SIZE[0] // x.shape[2]
    return stride in (1, 2, 4, 8, 16, 32) and tuple(x.shape[2:]) == tuple(side // stride for side in PROBE_SIZE)


def _strip_classifier_convs(network: nn.Module, maps: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """`maps` without the single 1x1 convolutions at its end.

    A block has several convolutions (or attention layers). A depthwise convolution and its 1x1 convolution that are two
    parts are kept.
    """
    layers = [
        [m for m in network.get_submodule(part).modules() if isinstance(m, (nn.Conv2d, nn.Linear))] for part, _ in maps
    ]
    end = len(maps)
    for index in reversed(range(end)):
        if not layers[index]:  # a norm or an activation that may belong to the part before it
            continue
        before = next((found for found in reversed(layers[:index]) if found), [])
        if len(layers[index]) > 1 or not _is_pointwise(layers[index][0]) or all(map(_is_depthwise, before)):
            break
        end = index
    return maps[:end]


def _is_pointwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)


def _is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels


def _prune(module: nn.Module, parts: set[str], prefix: str = "") -> None:
    """Remove all modules except `parts` and their parents. The others keep their names, including numbers."""
    for name, child in list(module.named_children()):
        path = f"{prefix}{name}"
        if path in parts:
            continue
        if any(part.startswith(f"{path}.") for part in parts):
            _prune(child, parts, f"{path}.")
        else:
            delattr(module, name)
