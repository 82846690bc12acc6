"""The settings of `tools/benchmark.py`, checked before slow imports."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from detection.config_io import load_config
from detection.core.errors import UserError
from detection.core.text import did_you_mean

DIVISOR = 32
"""Detectors pad images to multiples of this (`NormalizeAndBatch`)."""
PYTORCH = ("eager", "channels_last", "compile", "cuda_graph")
BACKENDS = (*PYTORCH, "onnxruntime", "openvino")
CHECKPOINTS = (".pt", ".pth", ".safetensors")
EXPORTED = {".onnx": "onnxruntime", ".xml": "openvino", ".torchscript": "torchscript", ".pt2": "torch_export"}
"""Suffix of an exported file -> its backend."""
PEERS = ("ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn_v2")
"""Detectors of torchvision, by the names of their builders."""
PEER_BACKENDS = ("eager", "onnxruntime")
"""Default backends of a peer: the usual one, and the fastest on most CPUs that torchvision supports."""


@dataclass(frozen=True)
class Settings:
    """Settings of a latency benchmark.

    Attributes:
        targets: configs (.yaml), checkpoints (see `CHECKPOINTS`) and exported files (see `EXPORTED`), in table order.
        peers: add torchvision's detectors (`PEERS`).
        backends: of configs, checkpoints and peers. None: all; those that cannot run get a row with the reason.
        batches: batch sizes.
        threads: CPU threads of each network. None: PyTorch's default.
        runs: timed calls of each row.
        size: height and width of the images. None: the sizes in the configs; peers and ONNX files of other programs get
            the size of the first config or checkpoint.
        images: input images; default: a drawn one.
        num_classes: of networks with random weights. None: that of the first checkpoint, else 80.
        score_threshold: of checkpoints, instead of `eval.score_threshold` in their configs.
        device: "auto", "cpu", "cuda" or "cuda:N".
        aps: network -> AP, for files that do not hold it.
        memory: measure the memory as well, each row in a process of its own.
    """

    targets: tuple[str, ...] = ()
    peers: bool = False
    backends: tuple[str, ...] | None = None
    batches: tuple[int, ...] = (1,)
    threads: int | None = None
    runs: int = 50
    size: tuple[int, int] | None = None
    images: tuple[str, ...] = ()
    num_classes: int | None = None
    score_threshold: float | None = None
    device: str = "auto"
    seed: int = 0
    aps: dict[str, float] = field(default_factory=dict)
    memory: bool = True

    def __post_init__(self) -> None:
        for target in self.targets:
            if kind_of(target) == "config":
                load_config(target)
        for backend in self.backends or ():
            _known("backend", backend, BACKENDS)
        for name in self.aps:
            _known("--ap: network", name, (*self.targets, *(PEERS if self.peers else ())))
        for image in self.images:
            if not Path(image).is_file():
                raise UserError(f"image {image} does not exist")
        if self.size is not None and (self.size[0] % DIVISOR or self.size[1] % DIVISOR):
            height, width = (max(DIVISOR, round(side / DIVISOR) * DIVISOR) for side in self.size)
            raise UserError(
                f"size {self.size[0]}x{self.size[1]}: detectors take sides that are multiples of {DIVISOR}; "
                f"the nearest is {height}x{width}"
            )


def kind_of(target: str) -> str:
    """ "config", "checkpoint" or "exported". Raises UserError for a missing file or one of another kind."""
    path = Path(target)
    suffix = path.suffix.lower()
    kinds = {"config": (".yaml", ".yml"), "checkpoint": CHECKPOINTS, "exported": EXPORTED}
    kind = next((kind for kind, suffixes in kinds.items() if suffix in suffixes), None)
    if kind is None:
        hint = "; for the cost of a backbone use --cost" if not suffix else ""
        raise UserError(
            f"{target} is neither a config (.yaml) nor a checkpoint ({', '.join(CHECKPOINTS)}) nor an exported file "
            f"({', '.join(EXPORTED)}){hint}"
        )
    # `load_config` reports a missing config with the closest name.
    if kind != "config" and not path.is_file():
        raise UserError(f"{'file' if kind == 'exported' else kind} {target} does not exist")
    return kind


def _known(what: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        raise UserError(f"unknown {what} {name!r}{did_you_mean(name, names)}; known: {', '.join(names)}")
