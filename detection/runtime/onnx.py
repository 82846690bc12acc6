"""Opens ONNX Runtime sessions for files and for models in memory, and checks ONNX files."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backbones.file_limits import UnreadableFile, read_bytes
from backbones.weight_readers import protobuf_fields
from detection.core.errors import UserError
from detection.core.extras import require
from detection.runtime.metadata import METADATA_KEY, non_finite_error

log = logging.getLogger("detection")


# TensorProto.data_type -> NumPy type.
FLOAT_TYPES = {1: np.float32, 10: np.float16, 11: np.float64}


def check_onnx(path: Path) -> None:
    """Check a file before it is loaded.

    Raises:
        UserError: it cannot be read, is too large, is not an ONNX file, or has weights that are NaN.
    """
    try:
        for graph in _parts(memoryview(read_bytes(path)), 7):
            for initializer in _parts(graph, 5):
                fields = dict(protobuf_fields(initializer))
                kind, name, data = fields.get(2), fields.get(8), fields.get(9)
                if not isinstance(kind, int) or kind not in FLOAT_TYPES or isinstance(data, int | None):
                    continue
                if np.isnan(np.frombuffer(data, FLOAT_TYPES[kind])).any():
                    tensor = "" if isinstance(name, int | None) else bytes(name).decode(errors="replace")
                    raise non_finite_error(path, tensor)
    except (OSError, UnreadableFile, ValueError) as error:
        raise UserError(
            f"{path} is not an ONNX file that ONNX Runtime can run (truncated or corrupt?): {error}"
        ) from error


def has_onnx_metadata(path: Path) -> bool:
    """Whether an ONNX file has metadata of this toolkit; False also for what is not a readable ONNX file."""
    try:
        entries = _parts(memoryview(read_bytes(path)), 14)
        return any(bytes(next(_parts(entry, 1), b"")).decode() == METADATA_KEY for entry in entries)
    except (OSError, UnreadableFile, ValueError):
        return False


def _parts(message: memoryview, number: int) -> Iterator[memoryview]:
    """The length-delimited fields of a protocol buffer message with this field number."""
    return (part for key, part in protobuf_fields(message) if key == number and not isinstance(part, int))


def open_session(model: str | Path | bytes, device: torch.device, threads: int) -> Any:
    """Open an `onnxruntime.InferenceSession` on the CPU or CUDA.

    If the device is CUDA and the installed ONNX Runtime does not support it, a warning is logged and the CPU is used.

    Args:
        model: a file, or the content of one.
        threads: number of threads of one operator.

    Raises:
        UserError: ONNX Runtime is not installed, or cannot run the file.
    """
    name = "the model" if isinstance(model, bytes) else str(model)
    require(name, "onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda":
        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
        else:
            log.warning("%s runs on the CPU: this ONNX Runtime has no CUDA (pip install onnxruntime-gpu)", name)
    try:
        return onnxruntime.InferenceSession(model, options, providers=providers)
    # Its errors have no common class but Exception.
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{name} is not an ONNX file that ONNX Runtime can run (truncated or corrupt?): {reason[:300]}"
        ) from error
