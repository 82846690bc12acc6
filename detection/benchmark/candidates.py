"""A network in a backend, ready to be timed: its file, and how to open it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN

from detection.benchmark.cuda_graph import capture_graphs
from detection.benchmark.onnx_models import OnnxModel
from detection.benchmark.peers import PeerSession, open_peer
from detection.benchmark.settings import PYTORCH
from detection.runtime.pytorch import load_detector, predict_batch

DetectFn = Callable[[list[Tensor]], Any]
"""uint8 images [3, H, W] on the CPU -> a list of {boxes, …}; None for an ONNX file of another program."""


@dataclass(frozen=True)
class Candidate:
    """One network in one backend: everything that another process needs to open it, and its properties.

    Attributes:
        network, backend, parameters, macs, ap: see `LatencyRow`.
        kind: "detector" (a file for `load_detector`), "peer" (a detector of torchvision) or "raw_onnx" (an ONNX file of
            another program).
        path: the file that is opened.
        size: height and width of its input images.
        num_classes: of a peer.
        overrides: for the config of a checkpoint.
        optional: if it cannot run, the table shows the reason; otherwise that is an error.
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
        """Size of its files; OpenVINO stores the weights in a second file."""
        files = [self.path, *([self.path.with_suffix(".bin")] if self.path.suffix == ".xml" else [])]
        return sum(file.stat().st_size for file in files if file.is_file())


def open_candidate(candidate: Candidate) -> DetectFn:
    """Load a candidate on its device. Raises UserError if its file, backend or a library is wrong or missing."""
    torch.set_num_threads(candidate.threads)
    device = torch.device(candidate.device)
    if candidate.kind == "raw_onnx":
        return OnnxModel(candidate.path, candidate.size, candidate.threads, device)
    if candidate.kind == "peer" and candidate.backend == "onnxruntime":
        return PeerSession(candidate.path, candidate.threads, device)
    if candidate.kind == "peer":
        model = open_peer(candidate.network, candidate.path, candidate.num_classes, candidate.size).to(device)
        return _pytorch_detect_fn(model, candidate.backend, device, "off", float_input=True)
    model, config, _ = load_detector(candidate.path, device, overrides=candidate.overrides)
    if candidate.backend in PYTORCH:
        amp = config.train.amp if device.type == "cuda" else "off"
        return _pytorch_detect_fn(model, candidate.backend, device, amp)
    return model


def _pytorch_detect_fn(model: Any, backend: str, device: torch.device, amp: str, float_input: bool = False) -> DetectFn:
    """float_input: the model takes float images in [0, 1], like torchvision's detectors."""
    memory_format = torch.contiguous_format if backend == "eager" else torch.channels_last
    model = model.to(memory_format=memory_format)
    if backend == "compile":
        # As in training: decoding and NMS depend on the data and would be recompiled often.
        parts = [model.rpn.head, model.roi_heads.box_head] if isinstance(model, FasterRCNN) else [model.head]
        for part in (model.backbone, *parts):
            part.compile(dynamic=False)
    elif backend == "cuda_graph":
        capture_graphs(model)

    def run(images: list[Tensor]) -> list[dict[str, Tensor]]:
        if float_input:
            images = [image.to(device).float() / 255 for image in images]
        return predict_batch(model, images, device, amp)

    return run
