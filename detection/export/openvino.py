"""OpenVINO's intermediate representation: a graph (.xml) and its weights (.bin), for Intel and ARM processors."""

import tempfile
from pathlib import Path
from typing import Any
from zlib import crc32

from detection.core.errors import UserError
from detection.core.outputs import write_output
from detection.export.onnx import export_onnx
from detection.export.spec import ExportSpec
from detection.runtime.metadata import METADATA_KEY
from detection.runtime.openvino import CHECKSUM, import_openvino


def export_openvino(spec: ExportSpec, path: Path) -> list[str]:
    """Export a detector to ONNX, convert it to OpenVINO and write it.

    Args:
        path: of the .xml; the .bin is written next to it.

    Returns:
        One line that describes the files.

    Raises:
        UserError: OpenVINO or ONNX is not installed, or the path cannot be written to.
    """
    openvino = import_openvino(path)
    model = openvino_model(spec)
    size = save_openvino(model, spec.metadata.to_json(), path)
    version = openvino.__version__.split("-")[0]
    operators = len(model.get_ops())
    return [f"{path} and .bin  {size / 1e6:.1f} MB, {spec.metadata.form}, OpenVINO {version}, {operators} operators"]


def openvino_model(spec: ExportSpec) -> Any:
    """Convert the detector to an `openvino.Model` in memory."""
    openvino = import_openvino("the export")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "detector.onnx"
        export_onnx(spec, path)
        # Not openvino.convert_model, which sends usage data to a server.
        return openvino.Core().read_model(path.read_bytes())


def save_openvino(model: Any, metadata: str, path: Path, *, fp16: bool = False) -> int:
    """Write an `openvino.Model` as .xml and .bin; the .xml holds the metadata and the checksum of the .bin.

    The checksum detects a pair of files from different exports.

    Args:
        fp16: store the weights in the .bin as float16; OpenVINO still computes in float32.

    Returns:
        Size of both files in bytes.
    """
    openvino = import_openvino(path)
    model.set_rt_info(metadata, METADATA_KEY)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "detector.xml"
        openvino.save_model(model, file, compress_to_fp16=fp16)
        weights = file.with_suffix(".bin").read_bytes()
        model.set_rt_info(str(crc32(weights)), CHECKSUM)
        openvino.save_model(model, file, compress_to_fp16=fp16)
        graph = file.read_bytes()
        if file.with_suffix(".bin").read_bytes() != weights:
            raise UserError("OpenVINO wrote different weights the second time; please report this")
    write_output(path.with_suffix(".bin"), lambda out: out.write(weights))
    write_output(path, lambda out: out.write(graph))
    return len(weights) + len(graph)
