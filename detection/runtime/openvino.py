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
"""Where the .xml says what .bin it belongs to."""


def import_openvino(path: str | Path) -> Any:
    """The package. Raises UserError, naming the extra, where it is not installed."""
    require(str(path), "openvino")
    import openvino

    return openvino


def open_openvino(path: Path, device: torch.device, threads: int) -> tuple[InferenceFn, Metadata]:
    """The function that a .xml and its .bin hold, on the CPU, and their metadata.

    Raises:
        UserError: OpenVINO is not installed; a file is absent, corrupt or foreign; the two do not belong together.
    """
    openvino = import_openvino(path)
    if device.type != "cpu":
        log.warning("%s runs on the CPU: OpenVINO does not know %s", path, device.type)
    numbers = path.with_suffix(".bin")
    if not numbers.is_file():
        raise UserError(f"{numbers} is missing: an OpenVINO detector is two files, {path.name} and {numbers.name}")
    core = openvino.Core()
    try:
        check_size(path)
        check_size(numbers)
        model = core.read_model(path, numbers)
    except (RuntimeError, UnreadableFile) as error:
        raise UserError(
            f"{path} and its .bin are no OpenVINO model (truncated or corrupt?): {_reason(error)}"
        ) from error
    metadata = parse_metadata(_note(model, METADATA_KEY), path)
    if _note(model, CHECKSUM) != str(crc32(numbers.read_bytes())):
        raise UserError(f"{numbers} does not belong to {path.name} (truncated, corrupt, or of another export)")
    inputs = {i.any_name: (str(i.element_type.to_dtype()), _shape(i)) for i in model.inputs}
    check_signature(metadata, inputs, {output.any_name: _shape(output) for output in model.outputs}, path)
    for operation in model.get_ops():
        if operation.get_type_name() == "Constant" and operation.get_element_type().is_real():
            if np.isnan(operation.data).any():
                raise non_finite_error(path, operation.get_friendly_name())
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        # Else processors with bfloat16 or float16 compute in that, and find other boxes.
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = core.compile_model(model, "CPU", settings)
    names = [output.get_any_name() for output in compiled.outputs]
    # A request is for one thread at a time; tools/detect.py has several.
    own = threading.local()

    def run(images: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
        if not hasattr(own, "request"):
            own.request = compiled.create_infer_request()
        found = own.request.infer({"images": images, "sizes": sizes}, share_inputs=True)
        return {name: found[name] for name in names}

    return run, metadata


def _shape(port: Any) -> list[int | None]:
    return [side.get_length() if side.is_static else None for side in port.partial_shape]


def _note(model: Any, key: str) -> str | None:
    return model.get_rt_info(key).astype(str) if model.has_rt_info(key) else None


def _reason(error: Exception) -> str:
    """OpenVINO's messages go over several lines, places in its source first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__
