"""Any convolutional classifier as a backbone, under the names of its own parts.

Most such networks run a chain of parts – stem, blocks, classifier – each on what the one before gave, whatever their
class is called. The chain is found by watching the network at work and cut into stages where the map shrinks. So no
table of names and taps is needed, none can be wrong, and each level is what the *last* part of its stride puts out.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from backbones.base import LEVELS, Backbone
from backbones.hooks import evaluation, watched

NEEDED = ("c2", "c3", "c4", "c5")
# Small, so that finding the chain takes little time; not square, so that swapped or flattened axes are noticed; and
# with more than one place in c5, so that a global mean is not taken for one more stride.
IMAGE = (64, 96)


class ChainFeatures(Backbone):
    """The trunk of a classifier, with the classifier's own state-dict keys.

    Left out are the parts after the last map of stride 32, and the 1x1 convolutions at its end that widen the map for
    the classifier alone (to 1280 channels in MobileNetV2, GhostNet's `blocks.9`). `classifier_prefixes` names them.

    Args:
        network: takes [N, 3, H, W] float32. It is taken apart, so it cannot be used afterwards.
        name: how errors call it.

    Raises:
        ValueError: it is no chain of parts up to stride 32, or does not have the strides 4, 8, 16 and 32, as
            vision transformers do not.
    """

    def __init__(self, network: nn.Module, name: str, out_levels: Sequence[str] = NEEDED) -> None:
        super().__init__()
        keys = list(network.state_dict())
        self._names = _find_stages(network, name)
        _prune(network, {part for parts in self._names.values() for part in parts})
        for child_name, child in network.named_children():
            self.add_module(child_name, child)
        own = set(self.state_dict())
        self.classifier_prefixes = tuple(key for key in keys if key not in own)
        self.measure(out_levels)

    def stage_modules(self) -> Iterator[tuple[str, list[nn.Module]]]:
        # By name, at each call: a part may have been replaced by a fused or a ghosted one.
        for level, names in self._names.items():
            yield level, [self.get_submodule(name) for name in names]


def _find_stages(network: nn.Module, name: str) -> "OrderedDict[str, list[str]]":
    """level -> names of the parts that are run one after the other to get there from the level before."""
    with evaluation(network):
        device = next(network.parameters()).device
        image = torch.arange(3 * IMAGE[0] * IMAGE[1], device=device).sin().view(1, 3, *IMAGE)
        calls, spatial = _watch(network, image, name)
        maps = _without_widening(network, _follow(network, image, calls))
    stages: OrderedDict[str, list[str]] = OrderedDict()
    first: list[str] = []
    for part, x in maps:
        stride = IMAGE[0] // x.shape[2]
        if stride == 1:
            first.append(part)
        else:
            stages.setdefault(LEVELS[stride.bit_length() - 2], []).append(part)
    lacking = [level for level in NEEDED if level not in stages]
    if lacking:
        strides = ", ".join(str(2 ** (LEVELS.index(level) + 1)) for level in stages) or "none"
        raise ValueError(
            f"{name} cannot be a backbone: of the strides 4, 8, 16 and 32 that detectors need, only these could be "
            f"found in maps [N, C, H, W] that its parts hand on one to the next: {strides}. Vision transformers and "
            "networks of other structure are not covered; mobilenet_v3_large, resnet50 or timm/ghostnetv2_100 are"
        )
    kept = tuple(f"{part}." for part, _ in maps)
    lost = [conv for conv in spatial if not f"{conv}.".startswith(kept)]
    if lost:
        raise ValueError(
            f"{name} cannot be a backbone: what it computes after {maps[-1][0]!r} cannot be followed, and layers "
            f"would be lost (first: {lost[0]})"
        )
    next(iter(stages.values()))[:0] = first
    return stages


def _watch(network: nn.Module, image: Tensor, name: str) -> tuple[list[tuple[str, Any]], list[str]]:
    """Run the network once.

    Returns:
        (name, output) of its parts, in order. Parts are the children of the network itself and, in place of a plain
        `nn.Sequential` or `nn.ModuleList`, the children of that: what is inside a class of its own is not taken apart,
        for there the last layer of a stride is no stage's end (the expansion in a MobileNet block of stride 2, say).
        And the names of all convolutions with a kernel above 1 whose output has more than one place.
    """
    calls: list[tuple[str, Any]] = []
    spatial: list[str] = []

    def note_call(part: str, args: tuple, output: Any) -> None:
        # A copy, because a layer that works in place may change it later.
        calls.append((part, output.clone() if isinstance(output, Tensor) else None))

    def note_spatial(part: str, args: tuple, output: Tensor) -> None:
        if output.shape[2:].numel() > 1:
            spatial.append(part)

    convolutions = {
        part: m for part, m in network.named_modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1
    }
    try:
        with watched(dict(_parts(network)), note_call), watched(convolutions, note_spatial):
            network(image)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{name} cannot be a backbone: it does not take images of any size (at {IMAGE[0]}x{IMAGE[1]}: {reason})"
        ) from error
    return calls, spatial


def _parts(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if type(child) in (nn.Sequential, nn.ModuleList):
            yield from _parts(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _follow(network: nn.Module, image: Tensor, calls: Sequence[tuple[str, Any]]) -> list[tuple[str, Tensor]]:
    """(part, its map), as long as the parts alone, run one after the other, give what the network itself computed."""
    maps: list[tuple[str, Tensor]] = []
    x = image
    for part, expected in calls:
        if expected is None or not _is_map(expected) or (maps and expected.shape[2] > maps[-1][1].shape[2]):
            break
        try:
            x = network.get_submodule(part)(x)
        except Exception:  # it was called with more, or other, than the part before it gave: the chain ends here
            break
        # On the meta device, where costs are counted, there are shapes alone.
        if x.shape != expected.shape or not (x.is_meta or torch.allclose(x, expected, rtol=1e-4, atol=1e-5)):
            break
        maps.append((part, expected))
    return maps


def _is_map(x: Tensor) -> bool:
    """[N, C, H / stride, W / stride] with a stride of 1, 2, 4, … 32."""
    if x.dim() != 4 or 0 in x.shape:
        return False
    stride = IMAGE[0] // x.shape[2]
    return stride in (1, 2, 4, 8, 16, 32) and tuple(x.shape[2:]) == tuple(side // stride for side in IMAGE)


def _without_widening(network: nn.Module, maps: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """`maps` without the parts at its end from the first lone 1x1 convolution on.

    A last block has more convolutions than one (or attention, which is made of several). Where it is written as two
    parts, a depthwise convolution and the 1x1 one that belongs to it, it stays.
    """
    layers = [
        [m for m in network.get_submodule(part).modules() if isinstance(m, (nn.Conv2d, nn.Linear))] for part, _ in maps
    ]
    end = len(maps)
    for index in reversed(range(end)):
        if not layers[index]:  # a norm or an activation, perhaps of what comes before it
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
    """Remove all that is neither one of the parts nor holds one. The others keep their names, numbers included."""
    for name, child in list(module.named_children()):
        path = f"{prefix}{name}"
        if path in parts:
            continue
        if any(part.startswith(f"{path}.") for part in parts):
            _prune(child, parts, f"{path}.")
        else:
            delattr(module, name)
