"""Measures the AP of exported files on images of the val set, and their latency, all files in turns."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from detection.checkpoint import Classes
from detection.config import DetectionConfig
from detection.core.device import cpu_fields, processor_name
from detection.core.interleave import interleave
from detection.core.progress import progress_bar
from detection.core.text import markdown_table
from detection.data.dataset import DetectionDataset
from detection.data.load_split import read_split
from detection.evaluation.coco_evaluator import Evaluation, evaluate_results
from detection.evaluation.detect_dataset import detect_dataset, eval_loader
from detection.evaluation.score import category_ids_of
from detection.quantization.onnx import CanvasBatch
from detection.runtime.exported import ExportedDetector, open_exported
from detection.runtime.metadata import Metadata

CPU = torch.device("cpu")
HEADER = ("file", "MB", "of float32", "AP", "change", "AP50", "ms", "times as fast", "layers left in float32")


@dataclass
class AccuracyRow:
    """A file and its measurements.

    Attributes:
        precision: float32, fp16 or int8.
        size: bytes; for OpenVINO of both files.
        metrics: COCO metrics on the val images.
        float32_layers: number of layers in float32 and number of all layers; None for files that are not int8.
        milliseconds: median time of a batch.
    """

    path: Path
    file_format: str
    precision: str
    size: int
    metrics: dict[str, float]
    float32_layers: tuple[int, int] | None = None
    milliseconds: float = 0.0


class AccuracyEvaluator:
    """Scores files on the images of `data.val`, or on some of them."""

    def __init__(self, config: DetectionConfig, metadata: Metadata, count: int, threads: int) -> None:
        annotations = read_split(config.data, "val", alone=True)
        self.annotations = annotations.part(evenly_spaced(len(annotations), count))
        self.category_ids = category_ids_of(Classes(metadata.names, metadata.ids), self.annotations)
        self.metadata, self.threads = metadata, threads
        dataset = DetectionDataset(
            self.annotations, annotations.images, short_side=metadata.short_side, long_side=metadata.long_side
        )
        self.loader = eval_loader(dataset, metadata.batch or 1, config.data.workers, CPU)

    def score(self, path: Path) -> Evaluation:
        """Detect objects with a file and evaluate the results."""
        run, metadata = open_exported(path, CPU, self.threads)
        detector = ExportedDetector(run, metadata, path)
        return evaluate_results(self.annotations, detect_dataset(detector, self.loader, self.category_ids, CPU))

    def first_batch(self) -> CanvasBatch:
        """The first images, as inputs of a file."""
        images, _ = next(iter(self.loader))
        detector = ExportedDetector(lambda images, sizes: {}, self.metadata)
        return detector.pad_to_canvas([image.permute(1, 2, 0).numpy() for image in images])


def evenly_spaced(total: int, count: int) -> list[int]:
    """At most `count` of the numbers 0 … `total` - 1, spread evenly."""
    chosen = min(count, total)
    return [i * total // chosen for i in range(chosen)]


def measure_latencies(paths: Sequence[Path], batch: CanvasBatch, threads: int, runs: int = 30) -> list[float]:
    """Median milliseconds of each file for the same batch, in turns."""
    calls = [partial(open_exported(path, CPU, threads)[0], *batch) for path in paths]
    with progress_bar(None, "timing", len(paths) * runs) as bar:
        return [1000 * statistics.median(own) for own in interleave(calls, runs, progress=bar.update)]


def format_report(rows: Sequence[AccuracyRow], images: int, shape: Sequence[int], threads: int) -> str:
    """The table as Markdown, and the conditions of the measurement."""
    float32 = {row.file_format: row for row in rows if row.precision == "float32"}
    cells = []
    for row in rows:
        other = float32[row.file_format]
        cells.append(
            (
                row.path.name,
                f"{row.size / 1e6:.1f}",
                f"{row.size / other.size:.0%}",
                f"{row.metrics['AP']:.4f}",
                "" if row is other else f"{row.metrics['AP'] - other.metrics['AP']:+.4f}",
                f"{row.metrics['AP50']:.4f}",
                f"{row.milliseconds:.1f}",
                f"{other.milliseconds / row.milliseconds:.2f}",
                "" if row.float32_layers is None else f"{row.float32_layers[0]} of {row.float32_layers[1]}",
            )
        )
    lines = [
        markdown_table(HEADER, cells, left=1),
        "",
        f"AP on {images} images of data.val. Time: median of batches of {shape[0]} on a canvas of "
        f"{shape[1]}x{shape[2]}, {threads} thread{'s' if threads > 1 else ''}, the files in turns.",
        describe_int8_support(),
    ]
    return "\n".join(lines)


def describe_int8_support() -> str:
    """Whether this processor has instructions for int8 dot products, which determine the speed of int8."""
    fields = cpu_fields()
    if not fields:
        return f"Processor: {processor_name()}."
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    found = sorted(flags & {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"})
    has = f"has {', '.join(found)}" if found else "has no instructions for int8 (VNNI), so int8 is hardly faster"
    return f"Processor: {processor_name()}; {has}."
