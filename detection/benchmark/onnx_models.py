"""Any ONNX file in ONNX Runtime, on inputs of its own kind: its raw session time."""

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
    """A session of a file about which nothing is known but its inputs.

    Args:
        path: an ONNX file.
        size: height and width in pixels, for dimensions that the file leaves open.
        threads: of the session.
        device: where ONNX Runtime shall run it, if it can.

    Attributes:
        fixed_batch: images that it takes in a call; None where that is open.
        size: height and width of the images that it gets; None where no input looks like images.
        metadata: what its makers wrote into it.

    Raises:
        UserError: the file cannot be read, or an input is of a kind that cannot be made up.
    """

    def __init__(self, path: str | Path, size: tuple[int, int], threads: int, device: torch.device = CPU) -> None:
        self.session = open_session(path, device, threads)
        self.path = path
        self.metadata: dict[str, str] = self.session.get_modelmeta().custom_metadata_map
        self.inputs = [(i.name, i.type, list(i.shape)) for i in self.session.get_inputs()]
        for name, kind, _ in self.inputs:
            if kind not in TYPES:
                raise UserError(f"{path}: input {name!r} is {kind}; only numbers can be made up: {', '.join(TYPES)}")
        batches = [shape[0] for _, _, shape in self.inputs if shape and isinstance(shape[0], int)]
        self.fixed_batch: int | None = batches[0] if batches else None
        self.asked_size = size
        self.size: tuple[int, int] | None = None
        for name, _, shape in self.inputs:
            if len(shape) == 4:
                _, *rest = self._shape(name, shape, 1)
                self.size = (rest[0], rest[1]) if _is_channels_last(shape) else (rest[1], rest[2])
                break
        self._feeds: dict[int, dict[str, np.ndarray]] = {}

    def __call__(self, images: Sequence[Any]) -> None:
        """Run it on as many made-up images as these."""
        batch = len(images)
        if batch not in self._feeds:
            self._feeds[batch] = self._make(batch)
        try:
            self.session.run(None, self._feeds[batch])
        except Exception as error:
            raise UserError(f"{self.path} fails on random inputs: {str(error).splitlines()[0][:300]}") from error

    def _make(self, batch: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng(0)
        feeds = {}
        for name, kind, shape in self.inputs:
            full, dtype = self._shape(name, shape, batch), TYPES[kind]
            if dtype == np.uint8:
                feeds[name] = random.integers(0, 256, full, dtype)
            elif np.issubdtype(dtype, np.floating):
                feeds[name] = random.random(full).astype(dtype)
            else:
                # Detectors take the sizes of images as integers; a side is one.
                feeds[name] = np.full(full, min(self.asked_size)).astype(dtype)
        return feeds

    def _shape(self, name: str, shape: Sequence[int | str | None], batch: int) -> tuple[int, ...]:
        """The declared shape with `batch`, three channels and the asked size in place of what is open."""
        height, width = self.asked_size
        defaults: tuple[int, ...]
        if len(shape) == 4:
            defaults = (batch, height, width, 3) if _is_channels_last(shape) else (batch, 3, height, width)
        elif all(isinstance(side, int) for side in shape[1:]):
            defaults = (batch,) * len(shape)
        else:
            raise UserError(
                f"{self.path}: input {name!r} has the shape {list(shape)}; only images (four dimensions) may have "
                "open dimensions besides the first. Fix them when the file is exported"
            )
        return tuple(side if isinstance(side, int) else default for side, default in zip(shape, defaults, strict=True))


def _is_channels_last(shape: Sequence[int | str | None]) -> bool:
    return shape[3] in (1, 3, 4) and shape[1] not in (1, 3, 4)
