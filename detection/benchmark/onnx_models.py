"""Runs any ONNX file in ONNX Runtime on random inputs of its declared types, to time the session."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detection.core.errors import UserError
from detection.runtime.onnx import open_session

CPU = torch.device("cpu")
TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}


class OnnxModel:
    """A session for an ONNX file of which only the inputs are known.

    Args:
        path: an ONNX file.
        size: height and width in pixels, for dynamic dimensions.
        threads: of the session.
        device: on which ONNX Runtime runs it, if it supports the device.

    Attributes:
        fixed_batch: batch size of the file; None if it is dynamic.
        size: height and width of the input images; None if no input has the shape of images.
        metadata: the custom metadata of the file.

    Raises:
        UserError: the file cannot be read, or the type of an input is not supported.
    """

    def __init__(self, path: str | Path, size: tuple[int, int], threads: int, device: torch.device = CPU) -> None:
        self.session = open_session(path, device, threads)
        self.path = path
        self.metadata: dict[str, str] = self.session.get_modelmeta().custom_metadata_map
        self.inputs = [(i.name, i.type, list(i.shape)) for i in self.session.get_inputs()]
        for name, kind, _ in self.inputs:
            if kind not in TYPES:
                raise UserError(f"{path}: input {name!r} is {kind}; supported types: {', '.join(TYPES)}")
        batches = [shape[0] for _, _, shape in self.inputs if shape and isinstance(shape[0], int)]
        self.fixed_batch: int | None = batches[0] if batches else None
        self.default_size = size
        self.size: tuple[int, int] | None = None
        for name, _, shape in self.inputs:
            if len(shape) == 4:
                _, *rest = self._shape(name, shape, 1)
                self.size = (rest[0], rest[1]) if _is_channels_last(shape) else (rest[1], rest[2])
                break
        self._feeds: dict[int, dict[str, np.ndarray]] = {}

    def __call__(self, images: Sequence[Any]) -> None:
        """Run the session on a random batch of the same size as `images`."""
        batch = len(images)
        if batch not in self._feeds:
            self._feeds[batch] = self._random_inputs(batch)
        try:
            self.session.run(None, self._feeds[batch])
        except Exception as error:
            raise UserError(f"{self.path} fails on random inputs: {str(error).splitlines()[0][:300]}") from error

    def _random_inputs(self, batch: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng(0)
        feeds = {}
        for name, kind, shape in self.inputs:
            full, dtype = self._shape(name, shape, batch), TYPES[kind]
            if dtype == np.uint8:
                feeds[name] = random.integers(0, 256, full, dtype)
            elif np.issubdtype(dtype, np.floating):
                feeds[name] = random.random(full).astype(dtype)
            else:
                # Integer inputs of detectors are the sizes of images.
                feeds[name] = np.full(full, min(self.default_size)).astype(dtype)
        return feeds

    def _shape(self, name: str, shape: Sequence[int | str | None], batch: int) -> tuple[int, ...]:
        """The declared shape; dynamic dimensions become `batch`, three channels and the default size."""
        height, width = self.default_size
        defaults: tuple[int, ...]
        if len(shape) == 4:
            defaults = (batch, height, width, 3) if _is_channels_last(shape) else (batch, 3, height, width)
        elif all(isinstance(side, int) for side in shape[1:]):
            defaults = (batch,) * len(shape)
        else:
            raise UserError(
                f"{self.path}: input {name!r} has the shape {list(shape)}; only images (four dimensions) may have "
                "dynamic dimensions besides the first. Export the file with fixed dimensions"
            )
        return tuple(side if isinstance(side, int) else default for side, default in zip(shape, defaults, strict=True))


def _is_channels_last(shape: Sequence[int | str | None]) -> bool:
    return shape[3] in (1, 3, 4) and shape[1] not in (1, 3, 4)
