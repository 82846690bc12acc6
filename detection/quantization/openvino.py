"""int8 for OpenVINO: the same part of the same graph as detection/quantization/onnx.py, by NNCF."""

import logging
import os
from collections.abc import Collection, Sequence
from typing import Any

from detection.core.extras import require
from detection.quantization.onnx import Frames
from detection.runtime.openvino import import_openvino

CONVOLUTION = "/WithoutBiases"
"""What OpenVINO appends to the name of an ONNX node whose bias it makes an addition of its own."""


def quantized_openvino(model: Any, units: dict[str, list[str]], frames: Sequence[Frames], kept: Collection[str]) -> Any:
    """A float32 detector as an `openvino.Model` in int8.

    Args:
        model: the detector as an `onnx.ModelProto`.
        units: of each layer the names of the nodes that are quantised with it, see `OnnxQuantizer`.
        frames: calibration images in their frames.
        kept: layers that stay in float32.

    Raises:
        UserError: NNCF or OpenVINO is not installed.
    """
    nncf = import_nncf()
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix

    plain = import_openvino("int8").Core().read_model(model.SerializeToString())
    wanted = {name for layer, unit in units.items() if layer not in kept for name in unit}
    names = [op.get_friendly_name() for op in plain.get_ops() if op.get_type_name() not in ("Constant", "Parameter")]
    return nncf.quantize(
        plain,
        nncf.Dataset([{"images": images, "sizes": sizes} for images, sizes in frames]),
        subset_size=len(frames),
        preset=nncf.QuantizationPreset.MIXED,
        target_device=nncf.TargetDevice.CPU,
        ignored_scope=nncf.IgnoredScope(
            names=[name for name in names if name.removesuffix(CONVOLUTION) not in wanted], validate=False
        ),
        # Weights of 7 bits, for processors whose sums would overflow; see detection/quantization/onnx.py.
        advanced_parameters=AdvancedQuantizationParameters(overflow_fix=OverflowFix.ENABLE),
    )


def import_nncf() -> Any:
    """The package, told to be silent and not to report its use to a server. Raises UserError where it is missing."""
    require("int8 for OpenVINO", "nncf")
    os.environ.setdefault("NNCF_CI", "1")
    import nncf

    nncf.set_log_level(logging.ERROR)
    return nncf
