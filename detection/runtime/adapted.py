"""Runs a detector's ONNX file of another project through its adapter."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from detection.checkpoint import Classes
from detection.config import DetectionConfig
from detection.core.errors import UserError
from detection.core.files import open_regular_file
from detection.core.memory import is_out_of_memory
from detection.models.postprocess import batched_nms_topk
from detection.models.postprocess_spec import PostprocessSpec
from detection.runtime.adapter import Adapter, InputConfig, adapter_config
from detection.runtime.adapter_layouts import (
    Candidates,
    check_input,
    check_outputs,
    check_predictions,
    decode_predictions,
    read_boxes,
)
from detection.runtime.exported import to_array
from detection.runtime.onnx import check_onnx, open_session


def load_adapted(
    path: str | Path,
    adapter: Adapter,
    device: torch.device,
    *,
    score_threshold: float | None = None,
    overrides: Sequence[str] = (),
) -> tuple["AdaptedDetector", DetectionConfig, Classes]:
    """Load an ONNX file with its adapter; called by `detection.runtime.pytorch.load_detector`.

    Raises:
        UserError: the file is missing, is not ONNX or does not fit the adapter; or `overrides` change what is fixed.
    """
    detector = AdaptedDetector(path, adapter, device, torch.get_num_threads())
    config = adapter_config(adapter, detector.input.size, path, overrides)
    more = [] if score_threshold is None else [f"eval.score_threshold={score_threshold}"]
    detector.postprocess_spec = PostprocessSpec.of(config.with_overrides(more).eval)
    return detector, config, adapter.class_list


class AdaptedDetector(nn.Module):
    """An ONNX file of another project with torchvision's calling protocol.

    forward: list of uint8 RGB tensors [3, H, W], resized by `resize` -> list of {boxes float32 [n, 4] xyxy in pixels of
    the resized image, labels int64 [n], scores float32 [n]} on the CPU.

    Attributes:
        input: the input of the file.
        resize: resizes an image before it is given to `forward`; one that is larger than the input does not fit.
        postprocess_spec: the thresholds of the adapter, unless they are replaced.

    Raises:
        UserError: the file is missing, is not ONNX or does not fit the adapter.
    """

    def __init__(self, path: str | Path, adapter: Adapter, device: torch.device, threads: int) -> None:
        super().__init__()
        self.path, self.adapter = Path(path), adapter
        open_regular_file(self.path, "detector").close()
        check_onnx(self.path)
        self.session = open_session(self.path, device, threads)
        inputs = [(i.name, i.type, i.shape) for i in self.session.get_inputs()]
        self.input = check_input(inputs, adapter.input, self.path)
        self.resize = InputResize(self.input.size, adapter.input)
        outputs = {output.name: output.shape for output in self.session.get_outputs()}
        self.output_names = check_outputs(outputs, adapter, self.input.size, self.path)
        self.postprocess_spec = PostprocessSpec(
            adapter.score_threshold, adapter.nms_threshold, adapter.max_detections, adapter.pre_nms_top_k
        )
        self.eval()

    def forward(self, images: Sequence[Tensor], targets: Any = None) -> list[dict[str, Tensor]]:
        results: list[dict[str, Tensor]] = []
        chunk = self.input.batch or max(len(images), 1)
        for start in range(0, len(images), chunk):
            results += self._detect([to_array(image) for image in images[start : start + chunk]])
        return results

    def _detect(self, images: Sequence[np.ndarray]) -> list[dict[str, Tensor]]:
        # A file with a fixed batch size gets as many images; the surplus ones are empty.
        canvases = np.full(
            (self.input.batch or len(images), *self.input.size, 3), self.adapter.input.pad_value, np.uint8
        )
        offsets = [self._place(canvas, image) for canvas, image in zip(canvases, images, strict=False)]
        try:
            values = normalize(canvases, self.adapter.input, self.input.dtype)
            outputs = [np.asarray(o) for o in self.session.run(self.output_names, {self.input.name: values})]
        except Exception as error:
            # ONNX Runtime's errors have no common class. The caller reports a lack of memory.
            if is_out_of_memory(error):
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0][:300]
            raise UserError(f"{self.path} does not run: {type(error).__name__}: {reason}") from error
        results = []
        for i, (left, top) in enumerate(offsets):
            boxes, labels, scores = self._candidates(outputs, i)
            height, width = images[i].shape[:2]
            boxes = boxes - np.array([left, top, left, top], np.float32)
            boxes = np.clip(boxes, 0, np.array([width, height, width, height], np.float32))
            results.append(self._suppress(boxes, labels, scores))
        return results

    def _place(self, canvas: np.ndarray, image: np.ndarray) -> tuple[int, int]:
        """Copy an image onto the canvas; returns its left and upper side there."""
        (height, width), (rows, columns) = self.input.size, image.shape[:2]
        if rows > height or columns > width:
            raise ValueError(f"an image of {rows}x{columns} does not fit into {height}x{width}; resize it first")
        around = self.adapter.input.fit == "pad_around"
        top, left = ((height - rows) // 2, (width - columns) // 2) if around else (0, 0)
        canvas[top : top + rows, left : left + columns] = image
        return left, top

    def _candidates(self, outputs: Sequence[np.ndarray], i: int) -> Candidates:
        """The candidates of image i above the score threshold."""
        spec, size = self.postprocess_spec, self.input.size
        if self.adapter.output.layout != "boxes":
            # The shape in the file may leave sizes open.
            check_predictions(outputs[0].shape, self.adapter, size, self.path)
            return decode_predictions(outputs[0][i], self.adapter, size, spec.score_threshold, spec.pre_nms_top_k)
        if outputs[0].ndim == 3:
            outputs = [output[i] for output in outputs]
        found = read_boxes(outputs, self.adapter, size, self.path)
        above = found.scores > spec.score_threshold
        return Candidates(*(array[above] for array in found))

    def _suppress(self, boxes: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> dict[str, Tensor]:
        spec = self.postprocess_spec
        found = {"boxes": boxes, "labels": labels, "scores": scores}
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in found.items()}
        keep = batched_nms_topk(
            tensors["boxes"], tensors["scores"], tensors["labels"], spec.nms_threshold, spec.max_detections
        )
        return {name: tensor[keep] for name, tensor in tensors.items()}


@dataclass(frozen=True)
class InputResize:
    """Resizes an image uint8 [h, w, 3] for an input of `size` (height, width), without padding."""

    size: tuple[int, int]
    config: InputConfig

    def __call__(self, image: np.ndarray) -> np.ndarray:
        height, width = self.size
        if self.config.fit != "stretch":
            scale = min(height / image.shape[0], width / image.shape[1])
            rounded = int if self.config.fit == "pad_right_bottom" else round
            height, width = (max(1, rounded(side * scale)) for side in image.shape[:2])
        if image.shape[:2] == (height, width):
            return image
        interpolation = cv2.INTER_AREA if self.config.interpolation == "area" else cv2.INTER_LINEAR
        return cv2.resize(image, (width, height), interpolation=interpolation)


def normalize(images: np.ndarray, config: InputConfig, dtype: Any) -> np.ndarray:
    """uint8 RGB [N, H, W, 3] -> the values that the network takes, in its layout; uint8 stays as it is."""
    if config.color == "bgr":
        images = images[..., ::-1]
    if config.layout == "nchw":
        images = images.transpose(0, 3, 1, 2)
    if dtype == np.uint8:
        return np.ascontiguousarray(images)
    shape = (3, 1, 1) if config.layout == "nchw" else (3,)
    mean, std = (np.array(values, np.float32).reshape(shape) for values in (config.mean, config.std))
    values = np.ascontiguousarray(images, np.float32)
    values *= np.float32(config.range / 255) / std
    values -= mean / std
    return values.astype(dtype, copy=False)
