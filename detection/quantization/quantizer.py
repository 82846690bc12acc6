"""tools/quantize.py: writes smaller files of a detector (fp16, int8) and measures their AP and latency."""

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
from detection.export.onnx import export_onnx
from detection.export.openvino import save_openvino
from detection.inference.sample_images import sample_image_paths
from detection.quantization.accuracy import (
    AccuracyEvaluator,
    AccuracyRow,
    evenly_spaced,
    format_report,
    measure_latencies,
)
from detection.quantization.onnx import CanvasBatch, OnnxQuantizer, store_weights_fp16
from detection.quantization.openvino import quantize_openvino
from detection.runtime.exported import ExportedDetector
from detection.runtime.metadata import METADATA_KEY, Metadata, parse_metadata
from detection.runtime.openvino import import_openvino
from detection.zoo.names import output_folder

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
    """Write NAME.float32, NAME.fp16 and NAME.int8 files of a checkpoint; measure the AP and latency of all.

    If an int8 file loses more than `max_loss` AP, the 1, 2, 4, … layers with the largest quantization error stay in
    float32, until the loss is within the limit.

    Args:
        formats: "onnx", "openvino".
        precisions: "fp16", "int8"; the float32 file is always written for comparison.
        form, batch, size: see `detection.export.exporter.build_export_spec`.
        out: folder; default: the checkpoint's.
        calibration: images for the ranges of int8 (files, folders, globs); default: `data.train` of the config.
        calibration_images, val_images: largest number of images, spread evenly over all.
        keep: name patterns of layers that always stay in float32.
        threads: of the runtimes.
        overrides: `key=value` for the config.
        force: overwrite files that this toolkit did not write.

    Returns:
        A Markdown table, which is also written to NAME.quantized.md.

    Raises:
        UserError: the checkpoint or the data cannot be read, an extra is missing, a pattern of `keep` matches nothing,
            or no int8 file is within `max_loss`.
    """
    folder = output_folder(checkpoint) if out is None else Path(out)
    require_for_quantization(formats, precisions)
    stem = Path(checkpoint).stem
    table = folder / f"{stem}.quantized.md"
    names = [f"{stem}.{precision}{SUFFIXES[name]}" for name in formats for precision in ("float32", *precisions)]
    files = [file for name in names for file in exported_files(folder / name)]
    check_outputs([table, *files], [checkpoint], force=force)
    model, metadata = export_float32(checkpoint, form, batch, size, overrides)
    config = parse_config(dict(metadata.config), f"config in {checkpoint}")
    evaluator = AccuracyEvaluator(config, metadata, val_images, threads)
    quantizer = None
    if "int8" in precisions:
        batches = calibration_batches(config, metadata, calibration, calibration_images)
        quantizer = OnnxQuantizer(model, batches, threads)
    rows = []
    for file_format in formats:
        exporter = QuantizedExporter(file_format, model, metadata, quantizer)
        float32_path = folder / f"{stem}.float32{SUFFIXES[file_format]}"
        num_bytes = exporter.write_float32(float32_path)
        metrics = evaluator.score(float32_path).numbers
        rows.append(AccuracyRow(float32_path, file_format, "float32", num_bytes, metrics))
        print(f"{float32_path}: AP {metrics['AP']:.4f}", flush=True)
        for precision in precisions:
            path = folder / f"{stem}.{precision}{SUFFIXES[file_format]}"
            if precision == "fp16":
                num_bytes = exporter.write_fp16(path)
                rows.append(AccuracyRow(path, file_format, precision, num_bytes, evaluator.score(path).numbers))
            else:
                rows.append(search_int8(exporter, evaluator, path, metrics["AP"], max_loss, keep))
            print(f"{path}: AP {rows[-1].metrics['AP']:.4f}", flush=True)
    first_batch = evaluator.first_batch()
    times = measure_latencies([row.path for row in rows], first_batch, threads)
    for row, milliseconds in zip(rows, times, strict=True):
        row.milliseconds = milliseconds
    text = format_report(rows, len(evaluator.annotations), first_batch[0].shape, threads)
    write_output(table, lambda file: file.write(f"{text}\n".encode()))
    return text


def export_float32(
    checkpoint: str | Path, form: str, batch: int | None, size: tuple[int, int] | None, overrides: Sequence[str]
) -> tuple[Any, Metadata]:
    """Export a checkpoint to an `onnx.ModelProto`, compare it with PyTorch, and return it with its metadata."""
    spec = build_export_spec(checkpoint, form=form, batch=batch, size=size, overrides=overrides)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "detector.onnx"
        export_onnx(spec, path)
        verify_export(path, spec)
        import onnx

        model = onnx.load(path)
    metadata = parse_metadata({p.key: p.value for p in model.metadata_props}[METADATA_KEY], checkpoint)
    return model, metadata


def calibration_batches(
    config: DetectionConfig, metadata: Metadata, sources: Sequence[str], count: int
) -> list[CanvasBatch]:
    """Calibration images, resized and padded as in detection.

    Args:
        sources: images; empty: those of `data.train`.

    Raises:
        UserError: the images do not exist or cannot be read.
    """
    if sources:
        paths = sample_image_paths(sources, count)
    else:
        try:
            annotations = read_split(config.data, "train")
        except UserError as error:
            raise UserError(
                f"int8 needs images for its calibration: those of data.train, or --calibration DIR ({error})"
            ) from None
        paths = [
            str(Path(annotations.images) / str(annotations.file_names[i]))
            for i in evenly_spaced(len(annotations), count)
        ]
    # Only for `pad_to_canvas`.
    detector = ExportedDetector(lambda images, sizes: {}, metadata)
    batches, step = [], metadata.batch or 1
    bar = progress_bar(range(0, len(paths), step), "reading")
    for start in bar:
        images = [read_image(path) for path in paths[start : start + step]]
        batches.append(
            detector.pad_to_canvas([resize(image, metadata.short_side, metadata.long_side)[0] for image in images])
        )
    return batches


class QuantizedExporter:
    """Writes the files of one format.

    Args:
        model: the float32 detector as an `onnx.ModelProto`.
        quantizer: of the same model; None without int8.
    """

    def __init__(self, file_format: str, model: Any, metadata: Metadata, quantizer: OnnxQuantizer | None) -> None:
        self.file_format, self.model, self.metadata = file_format, model, metadata
        self.quantizer = quantizer

    def write_float32(self, path: Path) -> int:
        """Write the float32 file. Returns its size in bytes."""
        if self.file_format == "onnx":
            return self._write_onnx(self.model, self.metadata, path)
        return self._write_openvino(self._openvino(), self.metadata, path)

    def write_fp16(self, path: Path) -> int:
        """Write the file whose weights are stored as float16. Returns its size in bytes."""
        metadata = dataclasses.replace(self.metadata, quantized={"weights": "float16"})
        if self.file_format == "onnx":
            return self._write_onnx(store_weights_fp16(self.model), metadata, path)
        return self._write_openvino(self._openvino(), metadata, path, fp16=True)

    def write_int8(self, path: Path, float32_layers: Collection[str]) -> int:
        """Write the int8 file, with these layers in float32. Returns its size in bytes."""
        quantizer = self.quantizer
        assert quantizer is not None
        note = {
            "weights": "int8 (7 bits), per channel",
            "activations": "uint8",
            "calibration_images": sum(len(images) for images, _ in quantizer.batches),
            "layers": [layer for layer in quantizer.layers if layer not in float32_layers],
            "float32_layers": [layer for layer in quantizer.layers if layer in float32_layers],
        }
        metadata = dataclasses.replace(self.metadata, quantized=note)
        if self.file_format == "onnx":
            return self._write_onnx(quantizer.quantized(float32_layers), metadata, path)
        model = quantize_openvino(self.model, quantizer.layer_groups, quantizer.batches, float32_layers)
        return self._write_openvino(model, metadata, path)

    def _openvino(self) -> Any:
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
        return save_openvino(model, metadata.to_json(), path, fp16=fp16)


def search_int8(
    exporter: QuantizedExporter,
    evaluator: AccuracyEvaluator,
    path: Path,
    reference: float,
    max_loss: float,
    keep: Sequence[str] = (),
) -> AccuracyRow:
    """Write the int8 file with the fewest float32 layers (0, 1, 2, 4, … in addition to `keep`) whose AP is within
    `max_loss` of `reference`.

    Raises:
        UserError: a pattern of `keep` matches nothing, or no file is within `max_loss`.
    """
    quantizer = exporter.quantizer
    assert quantizer is not None
    always = match_layers(quantizer.layers, keep)
    others = [layer for layer in quantizer.layers if layer not in always]
    ranking: list[str] = []
    count = 0
    while count < len(others):
        float32_layers = {*always, *ranking[:count]}
        num_bytes = exporter.write_int8(path, float32_layers)
        metrics = evaluator.score(path).numbers
        counts = (len(float32_layers), len(quantizer.layers))
        if reference - metrics["AP"] <= max_loss:
            return AccuracyRow(path, exporter.file_format, "int8", num_bytes, metrics, counts)
        print(
            f"{path}: AP {metrics['AP']:.4f} with {counts[0]} of {counts[1]} layers in float32: "
            f"{reference - metrics['AP']:.4f} lost, more than {max_loss:g}",
            flush=True,
        )
        if not ranking:
            errors = quantizer.errors()
            ranking = sorted(others, key=lambda layer: -errors[layer])
        count = max(1, 2 * count)
    for file in (path, path.with_suffix(".bin")):
        file.unlink(missing_ok=True)
    raise UserError(
        f"no int8 file of {exporter.file_format} stays within --max-loss {max_loss:g}; use --precision fp16"
    )


def match_layers(layers: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """Layers whose names match a pattern. Raises UserError for a pattern that matches none."""
    found = set()
    for pattern in patterns:
        matches = {layer for layer in layers if fnmatchcase(layer, pattern)}
        if not matches:
            raise UserError(
                f"--keep {pattern!r} matches no layer; examples of names: {', '.join(layers[:: len(layers) // 4])}"
            )
        found |= matches
    return found
