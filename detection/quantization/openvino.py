"""int8 for OpenVINO with NNCF; the same layers are quantized as in detection/quantization/onnx.py."""

import logging
import os
from collections.abc import Collection, Sequence
from typing import Any

from detection.core.extras import require
from detection.quantization.onnx import CanvasBatch
from detection.runtime.openvino import import_openvino

SPLIT_SUFFIX = "/WithoutBiases"
"""Suffix that OpenVINO appends to the name of an ONNX node whose bias becomes a separate addition."""


def quantize_openvino(
    model: Any, layer_groups: dict[str, list[str]], batches: Sequence[CanvasBatch], float32_layers: Collection[str]
) -> Any:
    """Quantize a float32 detector to an int8 `openvino.Model`.

    Args:
        model: the detector as an `onnx.ModelProto`.
        layer_groups: layer -> names of the nodes that are quantized with it, see `find_layer_groups`.
        batches: calibration images.
        float32_layers: layers that stay in float32.

    Raises:
        UserError: NNCF or OpenVINO is not installed.
    """
    nncf = import_nncf()
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix

    plain = import_openvino("int8").Core().read_model(model.SerializeToString())
    wanted = {name for layer, group in layer_groups.items() if layer not in float32_layers for name in group}
    names = [op.get_friendly_name() for op in plain.get_ops() if op.get_type_name() not in ("Constant", "Parameter")]
    return nncf.quantize(
        plain,
        nncf.Dataset([{"images": images, "sizes": sizes} for images, sizes in batches]),
        subset_size=len(batches),
        preset=nncf.QuantizationPreset.MIXED,
        target_device=nncf.TargetDevice.CPU,
        ignored_scope=nncf.IgnoredScope(
            names=[name for name in names if name.removesuffix(SPLIT_SUFFIX) not in wanted], validate=False
        ),
        # Weights with 7 bits, because sums overflow on some processors; see detection/quantization/onnx.py.
        advanced_parameters=AdvancedQuantizationParameters(overflow_fix=OverflowFix.ENABLE),
    )


def import_nncf() -> Any:
    """Import NNCF without its messages and its usage reports to a server. Raises UserError if it is not installed."""
    require("int8 for OpenVINO", "nncf")
    os.environ.setdefault("NNCF_CI", "1")
    import nncf

    nncf.set_log_level(logging.ERROR)
    return nncf
