"""PaddleClas's GhostNet built independently from its description, and writers of both frameworks' files.

The real networks, run by the real frameworks, are compared by `check.py`; these stand in for them in `make test`.
"""

import pickle
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

# Kernel, expansion, output channels, squeeze-and-excite, stride: PaddleClas counts its bottlenecks from 0 to 15.
BOTTLENECKS = [
    (3, 16, 16, False, 1),
    (3, 48, 24, False, 2),
    (3, 72, 24, False, 1),
    (5, 72, 40, True, 2),
    (5, 120, 40, True, 1),
    (3, 240, 80, False, 2),
    (3, 200, 80, False, 1),
    (3, 184, 80, False, 1),
    (3, 184, 80, False, 1),
    (3, 480, 112, True, 1),
    (3, 672, 112, True, 1),
    (5, 672, 160, True, 2),
    (5, 960, 160, False, 1),
    (5, 960, 160, True, 1),
    (5, 960, 160, False, 1),
    (5, 960, 160, True, 1),
]
LEVELS = {2: "c2", 4: "c3", 10: "c4", 15: "c5"}


def scaled(channels: int, width: float) -> int:
    rounded = max(4, int(channels * width + 2) // 4 * 4)
    return rounded if rounded >= 0.9 * channels * width else rounded + 4


class ConvBN(nn.Module):
    def __init__(self, inputs, outputs, kernel, stride=1, groups=1, relu=True):
        super().__init__()
        self._conv = nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
        self._batch_norm = nn.BatchNorm2d(outputs)
        self.relu = relu

    def forward(self, x):
        x = self._batch_norm(self._conv(x))
        return x.relu() if self.relu else x


class Ghost(nn.Module):
    def __init__(self, inputs, outputs, relu):
        super().__init__()
        self.primary_conv = ConvBN(inputs, outputs // 2, 1, relu=relu)
        self.cheap_operation = ConvBN(outputs // 2, outputs // 2, 3, groups=outputs // 2, relu=relu)

    def forward(self, x):
        x = self.primary_conv(x)
        return torch.cat([x, self.cheap_operation(x)], 1)


class Gate(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // 4)
        self.excitation = nn.Linear(channels // 4, channels)

    def forward(self, x):
        gate = self.excitation(self.squeeze(x.mean((2, 3))).relu()).clamp(0, 1)
        return x * gate[:, :, None, None]


class Bottleneck(nn.Module):
    def __init__(self, inputs, hidden, outputs, kernel, gated, stride):
        super().__init__()
        self.ghost_module_1 = Ghost(inputs, hidden, relu=True)
        self.depthwise_conv = ConvBN(hidden, hidden, kernel, 2, hidden, relu=False) if stride == 2 else None
        self.se_block = Gate(hidden) if gated else None
        self.ghost_module_2 = Ghost(hidden, outputs, relu=False)
        self.shortcut_depthwise = self.shortcut_conv = None
        if stride == 2 or inputs != outputs:
            self.shortcut_depthwise = ConvBN(inputs, inputs, kernel, stride, inputs, relu=False)
            self.shortcut_conv = ConvBN(inputs, outputs, 1, relu=False)

    def forward(self, x):
        y = self.ghost_module_1(x)
        for module in (self.depthwise_conv, self.se_block, self.ghost_module_2):
            y = y if module is None else module(y)
        return y + (x if self.shortcut_conv is None else self.shortcut_conv(self.shortcut_depthwise(x)))


class PaddleGhostNet(nn.Module):
    """forward: images -> {"c2": …, "c3": …, "c4": …, "c5": …, "logits": …}"""

    def __init__(self, width, classes=1000):
        super().__init__()
        channels = scaled(16, width)
        self.conv1 = ConvBN(3, channels, 3, 2)
        for index, (kernel, expansion, outputs, gated, stride) in enumerate(BOTTLENECKS):
            block = Bottleneck(channels, scaled(expansion, width), scaled(outputs, width), kernel, gated, stride)
            self.add_module(f"_ghostbottleneck_{index}", block)
            channels = scaled(outputs, width)
        self.conv_last = ConvBN(channels, scaled(960, width), 1)
        self.fc_0 = ConvBN(scaled(960, width), 1280, 1)
        self.fc_1 = nn.Linear(1280, classes)

    def forward(self, x):
        found = {}
        x = self.conv1(x)
        for index in range(len(BOTTLENECKS)):
            x = getattr(self, f"_ghostbottleneck_{index}")(x)
            if index in LEVELS:
                found[LEVELS[index]] = x
        x = self.fc_0(self.conv_last(x).mean((2, 3), keepdim=True))
        return {**found, "logits": self.fc_1(x.flatten(1))}

    def arrays(self) -> dict[str, np.ndarray]:
        """Names and arrays as `paddle.save` writes them: no step counters, linear weights [in, out]."""
        names = {"running_mean": "_mean", "running_var": "_variance"}
        linear = {f"{name}.weight" for name, module in self.named_modules() if isinstance(module, nn.Linear)}
        arrays = {}
        for key, value in self.state_dict().items():
            module, _, name = key.rpartition(".")
            if name != "num_batches_tracked":
                array = value.numpy().T.copy() if key in linear else value.numpy()
                arrays[f"{module}.{names.get(name, name)}"] = array
        return arrays


def unsettle(network: nn.Module, *, seed: int = 0) -> nn.Module:
    """In evaluation mode, with random scales and shifts, statistics of real inputs, and gates that open and shut."""
    torch.manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 0.8)
            nn.init.uniform_(module.bias, -0.2, 0.2)
            module.momentum = 1
        elif isinstance(module, Gate):
            nn.init.uniform_(module.excitation.bias, -0.5, 1.5)
    network.train()
    with torch.no_grad():
        network(torch.randn(4, 3, 128, 128))
    return network.eval()


def write_pdparams(path: Path, arrays: dict[str, np.ndarray], *, protocol: int = 4, old_numpy: bool = False) -> Path:
    """As `paddle.save(layer.state_dict(), path)`, which adds a table of its internal names."""
    names = {"StructuredToParameterName@@": {name: f"parameter_{i}" for i, name in enumerate(arrays)}}
    content = pickle.dumps({**arrays, **names}, protocol)
    if old_numpy:  # as NumPy 1 calls the module, with which the published files were made
        content = content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    path.write_bytes(content)
    return path


def write_mindspore(path: Path, entries: dict[str, tuple[list[int], str, list[bytes]]]) -> Path:
    """As `mindspore.save_checkpoint`: tag -> (dims, type, content in one or more pieces)."""
    content = b""
    for tag, (dims, kind, pieces) in entries.items():
        for piece in pieces:
            tensor = b"".join(b"\x08" + _varint(side) for side in dims)
            tensor += _field(2, kind.encode()) + _field(3, piece)
            content += _field(1, _field(1, tag.encode()) + _field(2, tensor))
    path.write_bytes(content)
    return path


def mindcv_entries(state_dict: dict[str, Tensor]) -> dict[str, tuple[list[int], str, list[bytes]]]:
    """The published network's tensors as MindCV 0.3 names them."""
    norms = {k.removesuffix(".running_mean") for k in state_dict if k.endswith(".running_mean")}
    names = {
        "weight": "gamma",
        "bias": "beta",
        "running_mean": "moving_mean",
        "running_var": "moving_variance",
    }
    entries = {}
    for key, value in state_dict.items():
        module, _, name = key.rpartition(".")
        if name == "num_batches_tracked":
            continue
        if module in norms:
            name = names[name]
        module = module.replace("blocks.9.0.conv", "blocks.9.features.0").replace(
            "blocks.9.0.bn1", "blocks.9.features.1"
        )
        entries[f"{module}.{name}"] = (list(value.shape), "Float32", [value.numpy().tobytes()])
    return entries


def _field(number: int, content: bytes) -> bytes:
    return struct.pack("B", number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    low = bytes([value & 0x7F])
    return low if value < 0x80 else bytes([low[0] | 0x80]) + _varint(value >> 7)
