"""Networks in backends, ready to be timed: files on disk, and how each is opened."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN

from detection.benchmark.cuda_graph import record_graphs
from detection.benchmark.onnx_models import OnnxModel
from detection.benchmark.peers import PeerSession, open_peer
from detection.benchmark.settings import PYTORCH
from detection.runtime.pytorch import load_detector, predict_batch

Run = Callable[[list[Tensor]], Any]
"""uint8 images [3, H, W] on the CPU -> a list of {boxes, …}, or None of a foreign file."""


@dataclass(frozen=True)
class Candidate:
    """One network in one backend: all that another process needs to open it, and what is known of it.

    Attributes:
        network, backend, parameters, macs, ap: see `LatencyRow`.
        kind: "detector" (what `load_detector` takes), "peer" or "foreign".
        path: the file that is opened.
        size: height and width of the images that it is given.
        num_classes: a peer's.
        overrides: of a checkpoint's config.
        optional: whether it only gets a row that says why, where it cannot run.
    """

    network: str
    backend: str
    kind: str
    path: Path
    size: tuple[int, int]
    device: str
    threads: int
    num_classes: int = 0
    overrides: tuple[str, ...] = ()
    optional: bool = False
    parameters: int | None = None
    macs: int | None = None
    ap: float | None = None

    def file_bytes(self) -> int:
        """An OpenVINO model's weights lie in a file beside it."""
        files = [self.path, *([self.path.with_suffix(".bin")] if self.path.suffix == ".xml" else [])]
        return sum(file.stat().st_size for file in files if file.is_file())


def open_contender(contender: Candidate) -> Run:
    """Load it, on its device. Raises UserError where its file, backend or a library is wrong or missing."""
    torch.set_num_threads(contender.threads)
    device = torch.device(contender.device)
    if contender.kind == "foreign":
        return OnnxModel(contender.path, contender.size, contender.threads, device)
    if contender.kind == "peer" and contender.backend == "onnxruntime":
        return PeerSession(contender.path, contender.threads, device)
    if contender.kind == "peer":
        model = open_peer(contender.network, contender.path, contender.num_classes, contender.size).to(device)
        return _in_pytorch(model, contender.backend, device, "off", unit=True)
    model, config, _ = load_detector(contender.path, device, overrides=contender.overrides)
    if contender.backend in PYTORCH:
        amp = config.train.amp if device.type == "cuda" else "off"
        return _in_pytorch(model, contender.backend, device, amp)
    return model


def _in_pytorch(model: Any, backend: str, device: torch.device, amp: str, unit: bool = False) -> Run:
    """unit: it takes float images in [0, 1], as torchvision's detectors do."""
    layout = torch.contiguous_format if backend == "eager" else torch.channels_last
    model = model.to(memory_format=layout)
    if backend == "compile":
        # As in training: decoding and NMS depend on the data and would be compiled again and again.
        parts = [model.rpn.head, model.roi_heads.box_head] if isinstance(model, FasterRCNN) else [model.head]
        for part in (model.backbone, *parts):
            part.compile(dynamic=False)
    elif backend == "cuda_graph":
        record_graphs(model)

    def run(images: list[Tensor]) -> list[dict[str, Tensor]]:
        if unit:
            images = [image.to(device).float() / 255 for image in images]
        return predict_batch(model, images, device, amp)

    return run
