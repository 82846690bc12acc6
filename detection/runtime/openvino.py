"""Runs exported detectors with OpenVINO."""

import logging
import threading
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch

from backbones.file_limits import UnreadableFile, check_size
from detection.core.errors import UserError
from detection.core.extras import require
from detection.runtime.inference_fn import InferenceFn
from detection.runtime.metadata import METADATA_KEY, Metadata, check_signature, non_finite_error, parse_metadata

log = logging.getLogger("detection")

CHECKSUM = f"{METADATA_KEY}_bin_crc32"
"""Key of the checksum of the .bin in the .xml."""


def import_openvino(path: str | Path) -> Any:
    """Import OpenVINO. Raises UserError that names the extra if it is not installed."""
    require(str(path), "openvino")
    import openvino

    return openvino


def open_openvino(path: Path, device: torch.device, threads: int) -> tuple[InferenceFn, Metadata]:
    """Open a .xml and its .bin on the CPU -> (inference function, metadata).

    Raises:
        UserError: OpenVINO is not installed; a file is missing, corrupt or of another kind; or the two files do not
            belong together.
    """
    openvino = import_openvino(path)
    if device.type != "cpu":
        log.warning("%s runs on the CPU: OpenVINO does not support %s", path, device.type)
    weights = path.with_suffix(".bin")
    if not weights.is_file():
        raise UserError(f"{weights} is missing: an OpenVINO detector is two files, {path.name} and {weights.name}")
    core = openvino.Core()
    try:
        check_size(path)
        check_size(weights)
        model = core.read_model(path, weights)
    except (RuntimeError, UnreadableFile) as error:
        raise UserError(
            f"{path} and its .bin are not an OpenVINO model (truncated or corrupt?): {_reason(error)}"
        ) from error
    metadata = parse_metadata(_rt_info(model, METADATA_KEY), path)
    if _rt_info(model, CHECKSUM) != str(crc32(weights.read_bytes())):
        raise UserError(f"{weights} does not belong to {path.name} (truncated, corrupt, or of another export)")
    inputs = {i.any_name: (str(i.element_type.to_dtype()), _shape(i)) for i in model.inputs}
    check_signature(metadata, inputs, {output.any_name: _shape(output) for output in model.outputs}, path)
    for operation in model.get_ops():
        if operation.get_type_name() == "Constant" and operation.get_element_type().is_real():
            if np.isnan(operation.data).any():
                raise non_finite_error(path, operation.get_friendly_name())
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        # Otherwise processors with bfloat16 or float16 use it, which changes the boxes.
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = core.compile_model(model, "CPU", settings)
    names = [output.get_any_name() for output in compiled.outputs]
    # A request is not thread-safe, and tools/detect.py uses several threads.
    local = threading.local()

    def run(images: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
        if not hasattr(local, "request"):
            local.request = compiled.create_infer_request()
        outputs = local.request.infer({"images": images, "sizes": sizes}, share_inputs=True)
        return {name: outputs[name] for name in names}

    return run, metadata


def _shape(port: Any) -> list[int | None]:
    return [side.get_length() if side.is_static else None for side in port.partial_shape]


def _rt_info(model: Any, key: str) -> str | None:
    return model.get_rt_info(key).astype(str) if model.has_rt_info(key) else None


def _reason(error: Exception) -> str:
    """The last line of OpenVINO's message; the lines before it are locations in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__
