"""What tools/quantize.py does: smaller files of a detector, and what each of them costs in AP and takes in time."""

import dataclasses
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from detection.benchmark.report import markdown
from detection.checkpoint import Classes
from detection.config import Config, parse_config
from detection.data.dataset import DetectionDataset
from detection.data.sources import read_split
from detection.data.transforms import read_image, resize
from detection.device import progress_interval
from detection.errors import UserError
from detection.evaluation.coco import Evaluation, evaluate_results
from detection.evaluation.evaluate import detect_dataset, eval_loader
from detection.evaluation.score import category_ids_of
from detection.export.export import prepare, verify
from detection.export.int8_onnx import Frames, OnnxQuantizer, store_fp16
from detection.export.metadata import KEY, Metadata, parse_metadata
from detection.files import make_folder, write_atomically
from detection.inference.exported import ExportedDetector, open_exported
from detection.inference.pictures import find_pictures

CPU = torch.device("cpu")
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml"}
HEADER = ("file", "MB", "of float32", "AP", "change", "AP50", "ms", "times as fast", "layers left in float32")


@dataclass
class Row:
    """A file and what was measured of it.

    Attributes:
        precision: float32, fp16 or int8.
        size: bytes, of OpenVINO both files.
        left: how many of the layers are not int8, and how many there are; None where that was not asked for.
        milliseconds: median time of a batch.
    """

    path: Path
    file_format: str
    precision: str
    size: int
    numbers: dict[str, float]
    left: tuple[int, int] | None = None
    milliseconds: float = 0.0


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
    calibration_pictures: int = 128,
    val_pictures: int = 1000,
    max_loss: float = 0.01,
    keep: Sequence[str] = (),
    threads: int = 2,
    overrides: Sequence[str] = (),
) -> str:
    """Write NAME.float32, NAME.fp16 and NAME.int8 files of a checkpoint, score and time all of them.

    An int8 file that loses more than `max_loss` AP gets layers back in float32, those first that change the answers
    most when they alone are quantised: 1, 2, 4, … until it holds.

    Args:
        formats: "onnx", "openvino".
        precisions: "fp16", "int8"; the float32 file to compare with is always made.
        form, batch, size: see `detection.export.export.prepare`.
        out: folder; default: the checkpoint's.
        calibration: pictures for the ranges of int8 (files, folders, globs); default: `data.train` of the config.
        calibration_pictures, val_pictures: at most so many, spread evenly.
        keep: patterns of names of layers that stay in float32 in any case.
        threads: of the runtimes.
        overrides: `key=value` for the config.

    Returns:
        A Markdown table, which is also written to NAME.quantized.md.

    Raises:
        UserError: unreadable checkpoint or data, a missing extra, `keep` that matches nothing, or no int8 file
            within `max_loss`.
    """
    folder = Path(checkpoint).parent if out is None else Path(out)
    make_folder(folder, "output folder")
    stem = Path(checkpoint).stem
    model, metadata = export_float32(checkpoint, form, batch, size, overrides)
    config = parse_config(dict(metadata.config), f"config in {checkpoint}")
    exam = Exam(config, metadata, val_pictures, threads)
    quantizer = None
    if "int8" in precisions:
        frames = calibration_frames(config, metadata, calibration, calibration_pictures)
        quantizer = OnnxQuantizer(model, frames, threads)
    rows = []
    for file_format in formats:
        maker = Maker(file_format, model, metadata, quantizer)
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
    write_atomically(folder / f"{stem}.quantized.md", lambda file: file.write(f"{text}\n".encode()))
    return text


def export_float32(
    checkpoint: str | Path, form: str, batch: int | None, size: tuple[int, int] | None, overrides: Sequence[str]
) -> tuple[Any, Metadata]:
    """The checkpoint as an `onnx.ModelProto`, compared with PyTorch, and its metadata."""
    from detection.export.onnx_file import export_onnx

    prepared = prepare(checkpoint, form=form, batch=batch, size=size, overrides=overrides)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "detector.onnx"
        export_onnx(prepared, path)
        verify(path, prepared)
        import onnx

        model = onnx.load(path)
    metadata = parse_metadata({p.key: p.value for p in model.metadata_props}[KEY], checkpoint)
    return model, metadata


def calibration_frames(config: Config, metadata: Metadata, sources: Sequence[str], count: int) -> list[Frames]:
    """Pictures as the file takes them, resized and put into frames as in detection.

    Args:
        sources: pictures; empty: those of `data.train`.

    Raises:
        UserError: they are not there, or cannot be read.
    """
    if sources:
        paths = find_pictures(sources, count)
    else:
        try:
            index = read_split(config.data, "train")
        except UserError as error:
            raise UserError(
                f"int8 is calibrated on pictures of the training, or name some: --calibration DIR ({error})"
            ) from None
        paths = [str(Path(index.images) / str(index.file_names[i])) for i in spread(len(index), count)]
    # Only for its frames.
    detector = ExportedDetector(lambda images, sizes: {}, metadata)
    frames, step = [], metadata.batch or 1
    bar = tqdm(range(0, len(paths), step), "reading", mininterval=progress_interval(), leave=False)
    for start in bar:
        images = [read_image(path) for path in paths[start : start + step]]
        frames.append(
            detector.put_into_frames([resize(image, metadata.short_side, metadata.long_side)[0] for image in images])
        )
    return frames


class Maker:
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
            "calibration_pictures": sum(len(images) for images, _ in quantizer.frames),
            "layers": [layer for layer in quantizer.layers if layer not in kept],
            "float32_layers": [layer for layer in quantizer.layers if layer in kept],
        }
        metadata = dataclasses.replace(self.metadata, quantized=note)
        if self.file_format == "onnx":
            return self._write_onnx(quantizer.quantized(kept), metadata, path)
        from detection.export.int8_openvino import quantized_openvino

        model = quantized_openvino(self.model, quantizer.units, quantizer.frames, kept)
        return self._write_openvino(model, metadata, path)

    def _openvino(self) -> Any:
        from detection.inference.openvino import import_openvino

        return import_openvino("--format openvino").Core().read_model(self.model.SerializeToString())

    @staticmethod
    def _write_onnx(model: Any, metadata: Metadata, path: Path) -> int:
        import onnx

        del model.metadata_props[:]
        onnx.helper.set_model_props(model, {KEY: metadata.to_json()})
        onnx.checker.check_model(model, full_check=True)
        data = model.SerializeToString()
        write_atomically(path, lambda file: file.write(data))
        return len(data)

    @staticmethod
    def _write_openvino(model: Any, metadata: Metadata, path: Path, fp16: bool = False) -> int:
        from detection.export.openvino import save_openvino

        return save_openvino(model, metadata.to_json(), path, fp16=fp16)


def search_int8(
    maker: Maker, exam: "Exam", path: Path, reference: float, max_loss: float, keep: Sequence[str] = ()
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


class Exam:
    """The pictures of `data.val`, or some of them, on which files are scored."""

    def __init__(self, config: Config, metadata: Metadata, count: int, threads: int) -> None:
        index = read_split(config.data, "val", alone=True)
        self.index = index.part(spread(len(index), count))
        self.category_ids = category_ids_of(Classes(metadata.names, metadata.ids), self.index)
        self.metadata, self.threads = metadata, threads
        dataset = DetectionDataset(
            self.index, index.images, short_side=metadata.short_side, long_side=metadata.long_side
        )
        self.loader = eval_loader(dataset, metadata.batch or 1, config.data.workers, CPU)

    def score(self, path: Path) -> Evaluation:
        """Detect with a file and score what it finds."""
        run, metadata = open_exported(path, CPU, self.threads)
        detector = ExportedDetector(run, metadata, path)
        return evaluate_results(self.index, detect_dataset(detector, self.loader, self.category_ids, CPU))

    def frame(self) -> Frames:
        """The first pictures, as a file takes them."""
        images, _ = next(iter(self.loader))
        detector = ExportedDetector(lambda images, sizes: {}, self.metadata)
        return detector.put_into_frames([image.permute(1, 2, 0).numpy() for image in images])


def spread(total: int, count: int) -> list[int]:
    """At most `count` of the first `total` numbers, spread evenly."""
    chosen = min(count, total)
    return [i * total // chosen for i in range(chosen)]


def latencies(paths: Sequence[Path], frame: Frames, threads: int, rounds: int = 30) -> list[float]:
    """Median milliseconds of each file for the same pictures; they take turns, so that what else the machine does hits
    all of them."""
    runs: list[Callable[..., Any]] = [open_exported(path, CPU, threads)[0] for path in paths]
    seconds: list[list[float]] = [[] for _ in paths]
    for number in tqdm(range(rounds + 3), "timing", mininterval=progress_interval(), leave=False):
        for run, own in zip(runs, seconds, strict=True):
            run(*frame)  # The others have had the caches.
            start = time.perf_counter()
            run(*frame)
            if number >= 3:
                own.append(time.perf_counter() - start)
    return [1000 * statistics.median(own) for own in seconds]


def report(rows: Sequence[Row], pictures: int, shape: Sequence[int], threads: int) -> str:
    """The table, and what it was measured on."""
    plain = {row.file_format: row for row in rows if row.precision == "float32"}
    cells = []
    for row in rows:
        other = plain[row.file_format]
        cells.append(
            (
                row.path.name,
                f"{row.size / 1e6:.1f}",
                f"{row.size / other.size:.0%}",
                f"{row.numbers['AP']:.4f}",
                "" if row is other else f"{row.numbers['AP'] - other.numbers['AP']:+.4f}",
                f"{row.numbers['AP50']:.4f}",
                f"{row.milliseconds:.1f}",
                f"{other.milliseconds / row.milliseconds:.2f}",
                "" if row.left is None else f"{row.left[0]} of {row.left[1]}",
            )
        )
    lines = [
        markdown(HEADER, cells, left=1),
        "",
        f"AP on {pictures} pictures of data.val. Time: median of batches of {shape[0]} in frames of "
        f"{shape[1]}x{shape[2]}, {threads} thread{'s' if threads > 1 else ''}, the files by turns.",
        processor(),
    ]
    return "\n".join(lines)


def processor() -> str:
    """Whether this processor adds up products of 8 bits in one instruction, on which the speed of int8 hangs."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return f"Processor: {platform.processor() or platform.machine()}."
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    name = fields.get("model name", platform.machine())
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    found = sorted(flags & {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"})
    has = f"has {', '.join(found)}" if found else "has no instructions for int8 (VNNI): int8 gains little speed on it"
    return f"Processor: {name}; {has}."
