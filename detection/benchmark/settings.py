"""What a user asks `tools/benchmark.py` to time, checked before anything heavy is imported."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from detection.config_io import load_config
from detection.core.errors import UserError

DIVISOR = 32
"""Detectors pad images to multiples of this (`NormalizeAndBatch`)."""
PYTORCH = ("eager", "channels_last", "compile", "cuda_graph")
BACKENDS = (*PYTORCH, "onnxruntime", "openvino")
EXPORTED = {".onnx": "onnxruntime", ".xml": "openvino", ".torchscript": "torchscript", ".pt2": "torch_export"}
"""How an exported file's name ends -> what runs it."""
PEERS = ("ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn_v2")
"""torchvision's, by the names of their builders."""
PEER_BACKENDS = ("eager", "onnxruntime")
"""A peer's, where none are named: what people run, and what is as fast on most CPUs as torchvision lets it be."""


@dataclass(frozen=True)
class Settings:
    """How networks are timed.

    Attributes:
        targets: configs (.yaml), checkpoints (.pt, .pth) and exported files (see `EXPORTED`), in the table's order.
        peers: torchvision's detectors (`PEERS`) as well.
        backends: of configs, checkpoints and peers. None: all that can run here; what cannot gets a row that says so.
        batches: images in a call.
        threads: of each network, on the CPU. None: as many as PyTorch takes.
        runs: timed calls of each row.
        size: height and width of the images. None: a config's and a checkpoint's own sides, and those of the first
            of them for peers and foreign files.
        images: images that are detected in; a drawn one where there is none.
        num_classes: of networks with random weights. None: as many as the first trained one has, else 80.
        score_threshold: of checkpoints, in place of their own `eval.score_threshold`.
        device: "auto", "cpu", "cuda" or "cuda:N".
        aps: network -> AP, where its file does not know it.
        memory: measure that, too, each row in a process of its own.
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
    """ "config", "checkpoint" or "exported". Raises UserError for a file that is absent or of none of these kinds."""
    path = Path(target)
    suffix = path.suffix.lower()
    kind = {".yaml": "config", ".yml": "config", ".pt": "checkpoint", ".pth": "checkpoint"}.get(suffix)
    kind = kind or ("exported" if suffix in EXPORTED else None)
    if kind is None:
        hint = "; what a backbone costs is told by --cost" if not suffix else ""
        raise UserError(
            f"{target} is neither a config (.yaml) nor a checkpoint (.pt, .pth) nor an exported file "
            f"({', '.join(EXPORTED)}){hint}"
        )
    # A config's absence is told where it is read, with the nearest name.
    if kind != "config" and not path.is_file():
        raise UserError(f"{'file' if kind == 'exported' else kind} {target} does not exist")
    return kind


def _known(what: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise UserError(f"unknown {what} {name!r}{hint}; known: {', '.join(names)}")
