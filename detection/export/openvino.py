"""OpenVINO's intermediate representation: a graph (.xml) and its numbers (.bin), for Intel's and ARM's processors."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

from detection.core.errors import UserError
from detection.core.outputs import write_output
from detection.runtime.metadata import METADATA_KEY
from detection.runtime.openvino import CHECKSUM, import_openvino

if TYPE_CHECKING:
    from detection.export.spec import ExportSpec


def export_openvino(spec: "ExportSpec", path: Path) -> list[str]:
    """Write a detector for OpenVINO, by way of ONNX.

    Args:
        path: of the .xml; the .bin is written beside it.

    Returns:
        A line that tells of the files.

    Raises:
        UserError: OpenVINO or ONNX is not installed, or the path cannot be written to.
    """
    openvino = import_openvino(path)
    model = openvino_model(spec)
    size = save_openvino(model, spec.metadata.to_json(), path)
    version = openvino.__version__.split("-")[0]
    operators = len(model.get_ops())
    return [f"{path} and .bin  {size / 1e6:.1f} MB, {spec.metadata.form}, OpenVINO {version}, {operators} operators"]


def openvino_model(spec: "ExportSpec") -> Any:
    """The detector as an `openvino.Model`, all of it in memory."""
    from detection.export.onnx import export_onnx

    openvino = import_openvino("the export")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "detector.onnx"
        export_onnx(spec, path)
        # Not openvino.convert_model: it reports its use to a server.
        return openvino.Core().read_model(path.read_bytes())


def save_openvino(model: Any, metadata: str, path: Path, *, fp16: bool = False) -> int:
    """Write an `openvino.Model` as .xml and .bin, with the metadata and the checksum of the .bin in it.

    The two can be parted, or one of them be left from another export; the checksum tells.

    Args:
        fp16: keep the numbers of the .bin as float16; OpenVINO computes as before.

    Returns:
        Bytes of both files.
    """
    openvino = import_openvino(path)
    model.set_rt_info(metadata, METADATA_KEY)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "detector.xml"
        openvino.save_model(model, file, compress_to_fp16=fp16)
        numbers = file.with_suffix(".bin").read_bytes()
        model.set_rt_info(str(crc32(numbers)), CHECKSUM)
        openvino.save_model(model, file, compress_to_fp16=fp16)
        graph = file.read_bytes()
        if file.with_suffix(".bin").read_bytes() != numbers:
            raise UserError("OpenVINO did not write the same numbers twice; please report it")
    write_output(path.with_suffix(".bin"), lambda out: out.write(numbers))
    write_output(path, lambda out: out.write(graph))
    return len(numbers) + len(graph)
