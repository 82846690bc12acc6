"""What tools/quantize.py does: smaller files of a detector, and what each of them costs in AP and takes in time."""

import dataclasses
import tempfile
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from detection.config import DetectionConfig
from detection.config_io import parse_config
from detection.core.errors import UserError
from detection.core.extras import require_for_quantization
from detection.core.outputs import check_outputs, write_output
from detection.core.progress import progress_bar
from detection.data.image_io import read_image
from detection.data.load_split import read_split
from detection.data.transforms import resize
from detection.export.exporter import build_export_spec, exported_files, verify_export
from detection.inference.sample_images import sample_image_paths
from detection.quantization.accuracy import AccuracyTest, Row, latencies, report, spread
from detection.quantization.onnx import Frames, OnnxQuantizer, store_fp16
from detection.runtime.exported import ExportedDetector
from detection.runtime.metadata import METADATA_KEY, Metadata, parse_metadata

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml"}


def quantize_checkpoint(
    checkpoint: str | Path,
    *,
    formats: Sequence[str] = ("onnx",),
    precisions: Sequence[str] = ("fp16", "int8"),
    form: str = "end_to_end",
    batch: int | None = None,
    size: tuple[int, int] | None = None,
    out: str | Path | None = None,
    calibration: Sequence[str] = (),
    calibration_images: int = 128,
    val_images: int = 1000,
    max_loss: float = 0.01,
    keep: Sequence[str] = (),
    threads: int = 2,
    overrides: Sequence[str] = (),
    force: bool = False,
) -> str:
    """Write NAME.float32, NAME.fp16 and NAME.int8 files of a checkpoint, score and time all of them.

    An int8 file that loses more than `max_loss` AP gets layers back in float32, those first that change the answers
    most when they alone are quantised: 1, 2, 4, … until it holds.

    Args:
        formats: "onnx", "openvino".
        precisions: "fp16", "int8"; the float32 file to compare with is always made.
        form, batch, size: see `detection.export.exporter.build_export_spec`.
        out: folder; default: the checkpoint's.
        calibration: images for the ranges of int8 (files, folders, globs); default: `data.train` of the config.
        calibration_images, val_images: at most so many, spread evenly.
        keep: patterns of names of layers that stay in float32 in any case.
        threads: of the runtimes.
        overrides: `key=value` for the config.
        force: overwrite files that this toolkit did not write.

    Returns:
        A Markdown table, which is also written to NAME.quantized.md.

    Raises:
        UserError: unreadable checkpoint or data, a missing extra, `keep` that matches nothing, or no int8 file
            within `max_loss`.
    """
    folder = Path(checkpoint).parent if out is None else Path(out)
    require_for_quantization(formats, precisions)
    stem = Path(checkpoint).stem
    table = folder / f"{stem}.quantized.md"
    names = [f"{stem}.{precision}{SUFFIXES[name]}" for name in formats for precision in ("float32", *precisions)]
    files = [file for name in names for file in exported_files(folder / name)]
    check_outputs([table, *files], [checkpoint], force=force)
    model, metadata = export_float32(checkpoint, form, batch, size, overrides)
    config = parse_config(dict(metadata.config), f"config in {checkpoint}")
    exam = AccuracyTest(config, metadata, val_images, threads)
    quantizer = None
    if "int8" in precisions:
        frames = calibration_frames(config, metadata, calibration, calibration_images)
        quantizer = OnnxQuantizer(model, frames, threads)
    rows = []
    for file_format in formats:
        maker = QuantizedExporter(file_format, model, metadata, quantizer)
        plain = folder / f"{stem}.float32{SUFFIXES[file_format]}"
        size_ = maker.plain(plain)
        numbers = exam.score(plain).numbers
        rows.append(Row(plain, file_format, "float32", size_, numbers))
        print(f"{plain}: AP {numbers['AP']:.4f}", flush=True)
        for precision in precisions:
            path = folder / f"{stem}.{precision}{SUFFIXES[file_format]}"
            if precision == "fp16":
                rows.append(Row(path, file_format, precision, maker.fp16(path), exam.score(path).numbers))
            else:
                rows.append(search_int8(maker, exam, path, numbers["AP"], max_loss, keep))
            print(f"{path}: AP {rows[-1].numbers['AP']:.4f}", flush=True)
    for row, milliseconds in zip(rows, latencies([row.path for row in rows], exam.frame(), threads), strict=True):
        row.milliseconds = milliseconds
    text = report(rows, len(exam.index), exam.frame()[0].shape, threads)
    write_output(table, lambda file: file.write(f"{text}\n".encode()))
    return text


def export_float32(
    checkpoint: str | Path, form: str, batch: int | None, size: tuple[int, int] | None, overrides: Sequence[str]
) -> tuple[Any, Metadata]:
    """The checkpoint as an `onnx.ModelProto`, compared with PyTorch, and its metadata."""
    from detection.export.onnx import export_onnx

    spec = build_export_spec(checkpoint, form=form, batch=batch, size=size, overrides=overrides)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "detector.onnx"
        export_onnx(spec, path)
        verify_export(path, spec)
        import onnx

        model = onnx.load(path)
    metadata = parse_metadata({p.key: p.value for p in model.metadata_props}[METADATA_KEY], checkpoint)
    return model, metadata


def calibration_frames(config: DetectionConfig, metadata: Metadata, sources: Sequence[str], count: int) -> list[Frames]:
    """Images as the file takes them, resized and put into frames as in detection.

    Args:
        sources: images; empty: those of `data.train`.

    Raises:
        UserError: they are not there, or cannot be read.
    """
    if sources:
        paths = sample_image_paths(sources, count)
    else:
        try:
            index = read_split(config.data, "train")
        except UserError as error:
            raise UserError(
                f"int8 is calibrated on images of the training, or name some: --calibration DIR ({error})"
            ) from None
        paths = [str(Path(index.images) / str(index.file_names[i])) for i in spread(len(index), count)]
    # Only for its frames.
    detector = ExportedDetector(lambda images, sizes: {}, metadata)
    frames, step = [], metadata.batch or 1
    bar = progress_bar(range(0, len(paths), step), "reading")
    for start in bar:
        images = [read_image(path) for path in paths[start : start + step]]
        frames.append(
            detector.pad_to_canvas([resize(image, metadata.short_side, metadata.long_side)[0] for image in images])
        )
    return frames


class QuantizedExporter:
    """Writes the files of one format.

    Args:
        model: the float32 detector as an `onnx.ModelProto`.
        quantizer: of the same; None where no int8 is made.
    """

    def __init__(self, file_format: str, model: Any, metadata: Metadata, quantizer: OnnxQuantizer | None) -> None:
        self.file_format, self.model, self.metadata = file_format, model, metadata
        self.quantizer = quantizer

    def plain(self, path: Path) -> int:
        """Write the float32 file -> bytes."""
        if self.file_format == "onnx":
            return self._write_onnx(self.model, self.metadata, path)
        return self._write_openvino(self._openvino(), self.metadata, path)

    def fp16(self, path: Path) -> int:
        """Write the file whose weights are stored as float16 -> bytes."""
        metadata = dataclasses.replace(self.metadata, quantized={"weights": "float16"})
        if self.file_format == "onnx":
            return self._write_onnx(store_fp16(self.model), metadata, path)
        return self._write_openvino(self._openvino(), metadata, path, fp16=True)

    def int8(self, path: Path, kept: Collection[str]) -> int:
        """Write the int8 file, these layers in float32 -> bytes."""
        quantizer = self.quantizer
        assert quantizer is not None
        note = {
            "weights": "int8 (7 bits), per channel",
            "activations": "uint8",
            "calibration_images": sum(len(images) for images, _ in quantizer.frames),
            "layers": [layer for layer in quantizer.layers if layer not in kept],
            "float32_layers": [layer for layer in quantizer.layers if layer in kept],
        }
        metadata = dataclasses.replace(self.metadata, quantized=note)
        if self.file_format == "onnx":
            return self._write_onnx(quantizer.quantized(kept), metadata, path)
        from detection.quantization.openvino import quantized_openvino

        model = quantized_openvino(self.model, quantizer.units, quantizer.frames, kept)
        return self._write_openvino(model, metadata, path)

    def _openvino(self) -> Any:
        from detection.runtime.openvino import import_openvino

        return import_openvino("--format openvino").Core().read_model(self.model.SerializeToString())

    @staticmethod
    def _write_onnx(model: Any, metadata: Metadata, path: Path) -> int:
        import onnx

        del model.metadata_props[:]
        onnx.helper.set_model_props(model, {METADATA_KEY: metadata.to_json()})
        onnx.checker.check_model(model, full_check=True)
        data = model.SerializeToString()
        write_output(path, lambda file: file.write(data))
        return len(data)

    @staticmethod
    def _write_openvino(model: Any, metadata: Metadata, path: Path, fp16: bool = False) -> int:
        from detection.export.openvino import save_openvino

        return save_openvino(model, metadata.to_json(), path, fp16=fp16)


def search_int8(
    maker: QuantizedExporter,
    exam: AccuracyTest,
    path: Path,
    reference: float,
    max_loss: float,
    keep: Sequence[str] = (),
) -> Row:
    """Write the int8 file with the fewest layers in float32 (of 0, 1, 2, 4, … more than `keep` says) that scores within
    `max_loss` of `reference` AP.

    Raises:
        UserError: `keep` matches nothing, or no file does.
    """
    quantizer = maker.quantizer
    assert quantizer is not None
    kept = matching(quantizer.layers, keep)
    rest = [layer for layer in quantizer.layers if layer not in kept]
    worst: list[str] = []
    back = 0
    while back < len(rest):
        left = {*kept, *worst[:back]}
        size = maker.int8(path, left)
        numbers = exam.score(path).numbers
        if reference - numbers["AP"] <= max_loss:
            return Row(path, maker.file_format, "int8", size, numbers, (len(left), len(quantizer.layers)))
        print(
            f"{path}: AP {numbers['AP']:.4f} with {len(left)} of {len(quantizer.layers)} layers in float32: "
            f"{reference - numbers['AP']:.4f} lost, more than {max_loss:g}",
            flush=True,
        )
        if not worst:
            errors = quantizer.errors()
            worst = sorted(rest, key=lambda layer: -errors[layer])
        back = max(1, 2 * back)
    for file in (path, path.with_suffix(".bin")):
        file.unlink(missing_ok=True)
    raise UserError(f"no int8 file of {maker.file_format} stays within --max-loss {max_loss:g}; use --precision fp16")


def matching(layers: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """Layers whose names match a pattern. Raises UserError for a pattern that matches none."""
    found = set()
    for pattern in patterns:
        some = {layer for layer in layers if fnmatchcase(layer, pattern)}
        if not some:
            raise UserError(
                f"--keep {pattern!r} matches no layer; they are called like {', '.join(layers[:: len(layers) // 4])}"
            )
        found |= some
    return found
