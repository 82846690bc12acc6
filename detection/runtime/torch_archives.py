"""Runs exported detectors in PyTorch's own formats: TorchScript and torch.export."""

import logging
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

# The graphs in the files use its operators (nms, roi_align).
import torchvision  # noqa: F401

from backbones.file_limits import UnreadableFile, check_size, read_zip_directory
from backbones.weights import first_non_finite
from detection.core.errors import UserError
from detection.runtime.inference_fn import InferenceFn
from detection.runtime.metadata import (
    METADATA_KEY,
    MIN_CANVAS_STRIDES,
    OUTPUTS,
    Metadata,
    non_finite_error,
    parse_metadata,
)

log = logging.getLogger("detection")

MAX_PROGRAM_SIZE = 1 << 26
"""Largest size of the compressed records (the code of TorchScript), in bytes."""


def open_torchscript(path: Path, device: torch.device) -> tuple[InferenceFn, Metadata]:
    """Open a TorchScript file on the CPU -> (inference function, metadata). Raises UserError for an unreadable file."""
    metadata = archived_metadata(path, "TorchScript")
    if device.type != "cpu":
        log.warning("%s runs on the CPU, where it was traced; use --format torch_export or onnx", path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the format is deprecated
            module = torch.jit.load(path, map_location="cpu").eval()
    except Exception as error:
        raise UserError(_unreadable(path, "TorchScript", error)) from error
    _check_weights(module, path)
    return _inference_fn(module, metadata, torch.device("cpu"), path), metadata


def open_torch_export(path: Path, device: torch.device) -> tuple[InferenceFn, Metadata]:
    """Open a torch.export file on the device -> (inference function, metadata). Raises UserError for an unreadable
    file."""
    metadata = archived_metadata(path, "torch.export")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(path)
            if device.type != "cpu":
                from torch.export.passes import move_to_device_pass

                program = move_to_device_pass(program, device)
            module = program.module()
    except Exception as error:
        raise UserError(_unreadable(path, "torch.export", error)) from error
    _check_weights(module, path)
    if metadata.size is None:
        return _with_padding(
            _inference_fn(module, metadata, device, path), MIN_CANVAS_STRIDES * metadata.stride
        ), metadata
    return _inference_fn(module, metadata, device, path), metadata


def archived_metadata(path: Path, kind: str) -> Metadata:
    """Read the metadata from an archive of PyTorch (a zip file) without running code in it.

    Raises:
        UserError: the file is not an archive, is truncated, or has no metadata.
    """
    try:
        with path.open("rb") as file:
            read_zip_directory(file, check_size(path), max_expanded=MAX_PROGRAM_SIZE)
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise UserError(f"{path} is damaged: {damaged} in it has a wrong checksum; export the checkpoint again")
            names = [name for name in archive.namelist() if name.endswith(f"/extra/{METADATA_KEY}")]
            text = archive.read(names[0]).decode() if names else None
    except (zipfile.BadZipFile, zlib.error, OSError, UnreadableFile, UnicodeDecodeError, EOFError) as error:
        raise UserError(_unreadable(path, kind, error)) from error
    return parse_metadata(text, path)


def _check_weights(module: torch.nn.Module, path: Path) -> None:
    if bad := first_non_finite(module.state_dict()):
        raise non_finite_error(path, bad, "NaN or infinite")


def _inference_fn(module: Any, metadata: Metadata, device: torch.device, path: Path) -> InferenceFn:
    names = OUTPUTS[metadata.form]

    def run(images: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
        try:
            with torch.inference_mode():
                outputs = module(torch.from_numpy(images).to(device), torch.from_numpy(sizes).to(device))
        except RuntimeError as error:
            if "assertion" not in str(error):
                raise
            # The program checks assumptions that torch.export could not prove.
            raise UserError(
                f"{path} cannot run on {len(images)} images on a canvas of {images.shape[1]}x{images.shape[2]}; export "
                f"it with a fixed --size and --batch, or --format onnx ({str(error).splitlines()[0]})"
            ) from error
        return {name: value.cpu().numpy() for name, value in zip(names, outputs, strict=True)}

    return run


def _with_padding(run: InferenceFn, min_side: int) -> InferenceFn:
    """Pad canvases with a side below `min_side` at the right and bottom, so boxes stay the same."""

    def run_padded(images: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
        missing = [max(0, min_side - side) for side in images.shape[1:3]]
        if any(missing):
            images = np.pad(images, ((0, 0), (0, missing[0]), (0, missing[1]), (0, 0)))
        return run(images, sizes)

    return run_padded


def _unreadable(path: Path, kind: str, error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return (
        f"{path} is not a {kind} file that PyTorch {torch.__version__} can read (truncated or corrupt?): "
        f"{lines[0][:200]}"
    )
