"""Exported detectors, whatever runs them, with the calling protocol of the PyTorch model."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from detection.checkpoint import Classes
from detection.config import DetectionConfig
from detection.config_io import parse_config
from detection.core.errors import UserError
from detection.core.files import open_regular_file, shown
from detection.core.memory import is_out_of_memory
from detection.runtime.decode import decode
from detection.runtime.inference_fn import InferenceFn
from detection.runtime.metadata import KEY, OUTPUTS, Metadata, check_graph, parse_metadata
from detection.runtime.onnx import check_onnx, open_session

SUFFIXES = (".onnx", ".xml", ".torchscript", ".pt2")
"""ONNX, OpenVINO, TorchScript, torch.export."""


def is_exported(path: str | Path) -> bool:
    """Whether a file is an exported detector, by its name's ending; checkpoints are the rest."""
    return Path(path).suffix.lower() in SUFFIXES


def load_exported(
    path: str | Path,
    device: torch.device,
    *,
    score_threshold: float | None = None,
    overrides: Sequence[str] = (),
    threads: int | None = None,
) -> tuple["ExportedDetector", DetectionConfig, Classes]:
    """As `detection.runtime.pytorch.load_detector`, which calls it, for an exported file.

    Args:
        device: the CPU, or CUDA where the runtime has it; if not, a warning is logged and the CPU does it.
        threads: of the runtime; None: as many as PyTorch has (`torch.set_num_threads`, OMP_NUM_THREADS).

    Raises:
        UserError: absent, corrupt or foreign file; its runtime is not installed; `overrides` of what the file
            cannot change any more, like the model or a threshold below the file's own.
    """
    run, metadata = open_exported(path, device, threads or torch.get_num_threads())
    config = exported_config(metadata, path, overrides)
    limits = config.eval
    detector = ExportedDetector(
        run,
        metadata,
        path,
        score_threshold=limits.score_threshold if score_threshold is None else score_threshold,
        nms_threshold=limits.nms_threshold,
        max_detections=limits.max_detections,
    )
    return detector, config, Classes(metadata.names, metadata.ids)


def open_exported(path: str | Path, device: torch.device, threads: int) -> tuple[InferenceFn, Metadata]:
    """The function that a file holds, and what it says about itself. Raises UserError, see `load_exported`."""
    path = Path(path)
    if not os.path.lexists(path):
        raise UserError(f"exported detector {shown(path)} does not exist")
    open_regular_file(path, "exported detector").close()
    suffix = path.suffix.lower()
    if suffix == ".onnx":
        return open_onnx(path, device, threads)
    if suffix == ".xml":
        from detection.runtime.openvino import open_openvino

        return open_openvino(path, device, threads)
    if suffix == ".torchscript":
        from detection.runtime.torch_archives import open_torchscript

        return open_torchscript(path, device)
    if suffix == ".pt2":
        from detection.runtime.torch_archives import open_torch_export

        return open_torch_export(path, device)
    raise UserError(f"{path} is no exported detector, those end in {', '.join(SUFFIXES)}")


def read_metadata(path: str | Path) -> Metadata:
    """What an exported file says about itself. Raises UserError, see `load_exported`."""
    return open_exported(path, torch.device("cpu"), 1)[1]


def exported_config(metadata: Metadata, path: str | Path, overrides: Sequence[str] = ()) -> DetectionConfig:
    """The config of the training, with the sizes and limits of the file, and overrides that it can still follow.

    Raises:
        UserError: an override of what is fixed in the file.
    """
    raw: dict[str, Any] = {**metadata.config}
    if not all(isinstance(raw.get(name), dict) for name in ("data", "eval")):
        raise UserError(f"config in {path} has no sections data and eval; export the checkpoint again")
    raw["data"] = {**raw["data"], "short_side": metadata.short_side, "long_side": metadata.long_side}
    told = {name: getattr(metadata, name) for name in ("score_threshold", "nms_threshold", "max_detections")}
    raw["eval"] = {**raw["eval"], **told}
    plain = parse_config(raw, f"config in {path}")
    config = plain.with_overrides(overrides)
    fixed = ["model"] if config.model != plain.model else []
    limits = ("nms_threshold", "candidates", "max_detections") if metadata.form == "end_to_end" else ("candidates",)
    fixed += [f"eval.{name}" for name in limits if getattr(config.eval, name) != getattr(plain.eval, name)]
    if fixed:
        raise UserError(f"{', '.join(fixed)} cannot be changed in {path}; export the checkpoint again with it")
    return config


class ExportedDetector(nn.Module):
    """torchvision's calling protocol around the function of an exported file.

    forward: list of uint8 tensors [3, H, W] of any sizes -> list of {boxes float32 [n, 4], labels int64 [n],
    scores float32 [n]} on the CPU.

    Args:
        run: what the file computes.
        path: of the file, for messages.
        score_threshold, nms_threshold, max_detections: None: as the metadata say. A file of the end-to-end
            form has the last two inside; its score threshold can be raised.

    Raises:
        UserError: a score threshold below that of the end-to-end form.
    """

    def __init__(
        self,
        run: InferenceFn,
        metadata: Metadata,
        path: str | Path = "the exported detector",
        *,
        score_threshold: float | None = None,
        nms_threshold: float | None = None,
        max_detections: int | None = None,
    ) -> None:
        super().__init__()
        self.run, self.metadata, self.path = run, metadata, path
        self.score_threshold = metadata.score_threshold if score_threshold is None else score_threshold
        self.nms_threshold = metadata.nms_threshold if nms_threshold is None else nms_threshold
        self.max_detections = metadata.max_detections if max_detections is None else max_detections
        if metadata.form == "end_to_end" and self.score_threshold < metadata.score_threshold:
            raise UserError(
                f"{path} was exported with eval.score_threshold={metadata.score_threshold:g} and has no detections "
                f"below that; a threshold of {self.score_threshold:g} needs a new export"
            )
        self.eval()

    def forward(self, images: Sequence[Tensor], targets: Any = None) -> list[dict[str, Tensor]]:
        found: list[dict[str, Tensor]] = []
        chunk = self.metadata.batch or max(len(images), 1)
        for start in range(0, len(images), chunk):
            arrays = [to_array(image) for image in images[start : start + chunk]]
            frames, sizes = self.put_into_frames(arrays)
            try:
                detections = self.detections(self.run(frames, sizes), frames, sizes)
            except Exception as error:
                # Runtimes have no error in common; a lack of memory is told by who called.
                if isinstance(error, UserError) or is_out_of_memory(error):
                    raise
                reason = (str(error) or type(error).__name__).splitlines()[0][:300]
                raise UserError(
                    f"{self.path} does not run on {len(frames)} images of {frames.shape[1]}x{frames.shape[2]} pixels: "
                    f"{type(error).__name__}: {reason}"
                ) from error
            found += detections[: len(arrays)]
        return found

    def put_into_frames(self, images: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [h, w, 3] each -> uint8 [N, H, W, 3], int64 [N, 2]; a file's fixed batch is filled up with nothing.

        Raises:
            UserError: an image does not fit into the file's fixed frame.
        """
        sizes = np.array([image.shape[:2] for image in images], np.int64)
        height, width = (int(side) for side in sizes.max(axis=0))
        if self.metadata.size is None:
            stride = self.metadata.stride
            frame = (-(-height // stride) * stride, -(-width // stride) * stride)
        else:
            frame = self.metadata.size
            if height > frame[0] or width > frame[1]:
                raise UserError(
                    f"an image of {height}x{width} pixels (height x width, resized) does not fit into the fixed "
                    f"{frame[0]}x{frame[1]} of {self.path}; export with --size dynamic, or one that fits"
                )
        batch = self.metadata.batch or len(images)
        frames = np.zeros((batch, *frame, 3), np.uint8)
        for slot, image in zip(frames, images, strict=False):
            slot[: image.shape[0], : image.shape[1]] = image
        unused = np.ones((batch - len(images), 2), np.int64)
        return frames, np.concatenate([sizes, unused])

    def detections(
        self, outputs: dict[str, np.ndarray], frames: np.ndarray, sizes: np.ndarray
    ) -> list[dict[str, Tensor]]:
        """What the file put out, as one dict of tensors for each image."""
        if self.metadata.form == "raw":
            found = decode(
                outputs["cls_logits"],
                outputs["bbox_regression"],
                sizes,
                frames.shape[1:3],
                vars(self.metadata),
                score_threshold=self.score_threshold,
                nms_threshold=self.nms_threshold,
                max_detections=self.max_detections,
            )
        else:
            names = ("boxes", "labels", "scores")
            # Unused rows score zero.
            used = outputs["scores"] > max(self.score_threshold, 0)
            found = [{name: outputs[name][i][row] for name in names} for i, row in enumerate(used)]
            labels = np.concatenate([image["labels"] for image in found])
            if len(labels) and not 1 <= labels.min() <= labels.max() <= len(self.metadata.names):
                raise UserError(
                    f"{self.path} gives labels {labels.min()} to {labels.max()}, but its metadata have "
                    f"{len(self.metadata.names)} class names; export the checkpoint again"
                )
        return [{name: torch.from_numpy(value) for name, value in image.items()} for image in found]


def to_array(image: Tensor) -> np.ndarray:
    """uint8 [3, H, W] -> uint8 [H, W, 3], without a copy where it is on the CPU."""
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3:
        raise ValueError(f"an exported detector takes uint8 [3, H, W], not {image.dtype} {list(image.shape)}")
    return image.permute(1, 2, 0).cpu().numpy()


def open_onnx(path: Path, device: torch.device, threads: int) -> tuple[InferenceFn, Metadata]:
    """The function of an ONNX file and its metadata. Raises UserError, see `open_session`."""
    check_onnx(path)
    session = open_session(path, device, threads)
    metadata = parse_metadata(session.get_modelmeta().custom_metadata_map.get(KEY), path)
    inputs = {i.name: (i.type.removeprefix("tensor(").removesuffix(")"), i.shape) for i in session.get_inputs()}
    check_graph(metadata, inputs, {output.name: output.shape for output in session.get_outputs()}, path)
    outputs = list(OUTPUTS[metadata.form])

    def run(images: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(outputs, session.run(outputs, {"images": images, "sizes": sizes}), strict=True))

    return run, metadata
