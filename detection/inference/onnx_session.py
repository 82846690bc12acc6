"""ONNX Runtime's sessions, for detectors, for any file in the benchmark, and for models in memory."""

import logging
from pathlib import Path
from typing import Any

import torch

from detection.errors import UserError
from detection.extras import require

log = logging.getLogger("detection")


def open_session(model: str | Path | bytes, device: torch.device, threads: int) -> Any:
    """An `onnxruntime.InferenceSession`: on CUDA where the device says so and the installed build has it, else on the
    CPU, with a warning.

    Args:
        model: a file, or one's content.
        threads: that one operator may use.

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
    # Its errors share no class but Exception.
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{name} is no ONNX file that ONNX Runtime can run (truncated or corrupt?): {reason[:300]}"
        ) from error
