"""Runs an exported detector with any runtime, behind the calling protocol of the PyTorch model."""

import dataclasses
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
from detection.models.postprocess_spec import PostprocessSpec
from detection.runtime.decode import decode
from detection.runtime.inference_fn import InferenceFn
from detection.runtime.metadata import METADATA_KEY, OUTPUTS, Metadata, check_signature, parse_metadata
from detection.runtime.onnx import check_onnx, open_session
from detection.runtime.openvino import open_openvino
from detection.runtime.torch_archives import open_torch_export, open_torchscript

SUFFIXES = (".onnx", ".xml", ".torchscript", ".pt2")
"""ONNX, OpenVINO, TorchScript, torch.export."""


def is_exported(path: str | Path) -> bool:
    """Whether a path has the suffix of an exported detector; all other files are checkpoints."""
    return Path(path).suffix.lower() in SUFFIXES


def load_exported(
    path: str | Path,
    device: torch.device,
    *,
    score_threshold: float | None = None,
    overrides: Sequence[str] = (),
    threads: int | None = None,
) -> tuple["ExportedDetector", DetectionConfig, Classes]:
    """Load an exported file; called by `detection.runtime.pytorch.load_detector`.

    Args:
        device: the CPU or CUDA. A runtime without CUDA logs a warning and runs on the CPU.
        threads: number of threads of the runtime. None: that of PyTorch (`torch.set_num_threads`, OMP_NUM_THREADS).

    Raises:
        UserError: the file is missing, corrupt or of another kind; its runtime is not installed; or `overrides` change
            what is fixed in the file, like the model or a threshold below that of the file.
    """
    run, metadata = open_exported(path, device, threads or torch.get_num_threads())
    config = exported_config(metadata, path, overrides)
    spec = PostprocessSpec.of(config.eval)
    if score_threshold is not None:
        spec = dataclasses.replace(spec, score_threshold=score_threshold)
    detector = ExportedDetector(run, metadata, path, spec)
    return detector, config, Classes(metadata.names, metadata.ids)


def open_exported(path: str | Path, device: torch.device, threads: int) -> tuple[InferenceFn, Metadata]:
    """Open a file with its runtime -> (inference function, metadata). Raises UserError, see `load_exported`."""
    path = Path(path)
    if not os.path.lexists(path):
        raise UserError(f"exported detector {shown(path)} does not exist")
    open_regular_file(path, "exported detector").close()
    suffix = path.suffix.lower()
    if suffix == ".onnx":
        return open_onnx(path, device, threads)
    if suffix == ".xml":
        return open_openvino(path, device, threads)
    if suffix == ".torchscript":
        return open_torchscript(path, device)
    if suffix == ".pt2":
        return open_torch_export(path, device)
    raise UserError(f"{path} is not an exported detector; expected: a file that ends in {', '.join(SUFFIXES)}")


def read_metadata(path: str | Path) -> Metadata:
    """The metadata of an exported file. Raises UserError, see `load_exported`."""
    return open_exported(path, torch.device("cpu"), 1)[1]


def exported_config(metadata: Metadata, path: str | Path, overrides: Sequence[str] = ()) -> DetectionConfig:
    """The config of the training run with the sizes and thresholds of the file, then `overrides`.

    Raises:
        UserError: an override changes what is fixed in the file.
    """
    raw: dict[str, Any] = {**metadata.config}
    if not all(isinstance(raw.get(name), dict) for name in ("data", "eval")):
        raise UserError(f"config in {path} has no sections data and eval; export the checkpoint again")
    raw["data"] = {**raw["data"], "short_side": metadata.short_side, "long_side": metadata.long_side}
    thresholds = {name: getattr(metadata, name) for name in ("score_threshold", "nms_threshold", "max_detections")}
    raw["eval"] = {**raw["eval"], **thresholds}
    original = parse_config(raw, f"config in {path}")
    config = original.with_overrides(overrides)
    fixed = ["model"] if config.model != original.model else []
    inside = ("pre_nms_top_k", *(("nms_threshold", "max_detections") if metadata.form == "end_to_end" else ()))
    fixed += [f"eval.{name}" for name in inside if getattr(config.eval, name) != getattr(original.eval, name)]
    if fixed:
        raise UserError(f"{', '.join(fixed)} cannot be changed in {path}; export the checkpoint again to change it")
    return config


class ExportedDetector(nn.Module):
    """An exported file with torchvision's calling protocol.

    forward: list of uint8 tensors [3, H, W] of any sizes -> list of {boxes float32 [n, 4], labels int64 [n],
    scores float32 [n]} on the CPU.

    Args:
        run: the inference function of the file.
        path: the file's, for messages.
        postprocess_spec: None: that of the metadata. In a file of the end-to-end form it is fixed, but for the score
            threshold, which can be raised.

    Raises:
        UserError: the score threshold is below that of a file of the end-to-end form.
    """

    def __init__(
        self,
        run: InferenceFn,
        metadata: Metadata,
        path: str | Path = "the exported detector",
        postprocess_spec: PostprocessSpec | None = None,
    ) -> None:
        super().__init__()
        self.run, self.metadata, self.path = run, metadata, path
        self.postprocess_spec = postprocess_spec or metadata.postprocess_spec
        if metadata.form == "end_to_end" and self.postprocess_spec.score_threshold < metadata.score_threshold:
            raise UserError(
                f"{path} was exported with eval.score_threshold={metadata.score_threshold:g} and has no detections "
                f"below that; a threshold of {self.postprocess_spec.score_threshold:g} needs a new export"
            )
        self.eval()

    def forward(self, images: Sequence[Tensor], targets: Any = None) -> list[dict[str, Tensor]]:
        results: list[dict[str, Tensor]] = []
        chunk = self.metadata.batch or max(len(images), 1)
        for start in range(0, len(images), chunk):
            arrays = [to_array(image) for image in images[start : start + chunk]]
            canvases, sizes = self.pad_to_canvas(arrays)
            try:
                detections = self.postprocess(self.run(canvases, sizes), canvases, sizes)
            except Exception as error:
                # The runtimes have no common error class. The caller reports a lack of memory.
                if isinstance(error, UserError) or is_out_of_memory(error):
                    raise
                reason = (str(error) or type(error).__name__).splitlines()[0][:300]
                raise UserError(
                    f"{self.path} does not run on {len(canvases)} images of {canvases.shape[1]}x{canvases.shape[2]} "
                    f"pixels: {type(error).__name__}: {reason}"
                ) from error
            results += detections[: len(arrays)]
        return results

    def pad_to_canvas(self, images: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Copy each image to the top left of a canvas of zeros.

        Args:
            images: uint8 [h, w, 3] each.

        Returns:
            Canvases uint8 [N, H, W, 3] and (height, width) of each image, int64 [N, 2]. A file with a fixed batch size
            gets as many canvases; the surplus ones are empty.

        Raises:
            UserError: an image does not fit into the fixed canvas of the file.
        """
        sizes = np.array([image.shape[:2] for image in images], np.int64)
        height, width = (int(side) for side in sizes.max(axis=0))
        if self.metadata.size is None:
            stride = self.metadata.stride
            canvas_size = (-(-height // stride) * stride, -(-width // stride) * stride)
        else:
            canvas_size = self.metadata.size
            if height > canvas_size[0] or width > canvas_size[1]:
                raise UserError(
                    f"an image of {height}x{width} pixels (height x width, resized) does not fit into the fixed "
                    f"{canvas_size[0]}x{canvas_size[1]} of {self.path}; export with --size dynamic, or one that fits"
                )
        batch = self.metadata.batch or len(images)
        canvases = np.zeros((batch, *canvas_size, 3), np.uint8)
        for canvas, image in zip(canvases, images, strict=False):
            canvas[: image.shape[0], : image.shape[1]] = image
        unused = np.ones((batch - len(images), 2), np.int64)
        return canvases, np.concatenate([sizes, unused])

    def postprocess(
        self, outputs: dict[str, np.ndarray], canvases: np.ndarray, sizes: np.ndarray
    ) -> list[dict[str, Tensor]]:
        """Convert the outputs of the file to one dict of tensors for each image."""
        if self.metadata.form == "raw":
            results = decode(
                outputs["cls_logits"],
                outputs["bbox_regression"],
                sizes,
                canvases.shape[1:3],
                vars(self.metadata),
                score_threshold=self.postprocess_spec.score_threshold,
                nms_threshold=self.postprocess_spec.nms_threshold,
                max_detections=self.postprocess_spec.max_detections,
            )
        else:
            names = ("boxes", "labels", "scores")
            # Unused rows have a score of zero.
            used = outputs["scores"] > max(self.postprocess_spec.score_threshold, 0)
            results = [{name: outputs[name][i][row] for name in names} for i, row in enumerate(used)]
            labels = np.concatenate([image["labels"] for image in results])
            if len(labels) and not 1 <= labels.min() <= labels.max() <= len(self.metadata.names):
                raise UserError(
                    f"{self.path} returns labels {labels.min()} to {labels.max()}, but its metadata have "
                    f"{len(self.metadata.names)} class names; export the checkpoint again"
                )
        return [{name: torch.from_numpy(value) for name, value in image.items()} for image in results]


def to_array(image: Tensor) -> np.ndarray:
    """uint8 [3, H, W] -> uint8 [H, W, 3], without a copy if it is on the CPU."""
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3:
        raise ValueError(f"an exported detector takes uint8 [3, H, W], not {image.dtype} {list(image.shape)}")
    return image.permute(1, 2, 0).cpu().numpy()


def open_onnx(path: Path, device: torch.device, threads: int) -> tuple[InferenceFn, Metadata]:
    """Open an ONNX file -> (inference function, metadata). Raises UserError, see `open_session`."""
    check_onnx(path)
    session = open_session(path, device, threads)
    metadata = parse_metadata(session.get_modelmeta().custom_metadata_map.get(METADATA_KEY), path)
    inputs = {i.name: (i.type.removeprefix("tensor(").removesuffix(")"), i.shape) for i in session.get_inputs()}
    check_signature(metadata, inputs, {output.name: output.shape for output in session.get_outputs()}, path)
    outputs = list(OUTPUTS[metadata.form])

    def run(images: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(outputs, session.run(outputs, {"images": images, "sizes": sizes}), strict=True))

    return run, metadata
