"""Read the data of a report: the folder of a run, or a file of detections with its annotations."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from detection.checkpoint import read_checkpoint
from detection.config import DetectionConfig
from detection.config_io import load_config
from detection.core.device import pick_device
from detection.core.environment import read_environments
from detection.core.errors import UserError
from detection.core.outputs import check_outputs
from detection.data.annotations import Annotations
from detection.data.dataset import DetectionDataset
from detection.data.formats.detect_format import read_annotations
from detection.data.load_split import check_images, read_split
from detection.engine.run_folder import read_metrics
from detection.evaluation.analyze import Analysis, analyze
from detection.evaluation.coco_evaluator import Result, check_results, read_results
from detection.evaluation.detect_dataset import detect_dataset, eval_loader
from detection.evaluation.score import category_ids_of
from detection.runtime.exported import is_exported
from detection.runtime.pytorch import detector_config, load_detector

PREDICTION_FILES = ("best_predictions.json", "predictions.json")
"""Files with the detections of a run, in the order in which they are tried. The second one is from the last evaluation,
which is not always that of best.pt."""
DETECTION_KEYS = ("eval.", "model.", "data.short_side", "data.long_side")
"""Config keys whose overrides change the detections."""
ScalarCurve = list[tuple[int, float]]
"""(step, value) pairs"""


@dataclass(frozen=True)
class RunData:
    """The detections of one run, or of one file, and their analysis.

    Attributes:
        name: name of the run or file.
        images: image folder; None if it does not exist.
        detections_source: description of where the detections are from.
        folder, checkpoint, config: of the run; None for a file of detections.
        history: records of metrics.jsonl, one per evaluation.
        curves: training losses and learning rate by TensorBoard tag ("train/loss"); see `read_curves`.
        trained_with: machine, versions and commit of each start of the training.
    """

    name: str
    annotations: Annotations
    images: Path | None
    analysis: Analysis
    detections_source: str
    folder: Path | None = None
    checkpoint: Path | None = None
    config: DetectionConfig | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    curves: dict[str, ScalarCurve] = field(default_factory=dict)
    trained_with: list[dict[str, str]] = field(default_factory=list)


def read_file(
    predictions: str | Path,
    data: str | Path,
    images: str | Path | None,
    *,
    outputs: Sequence[Path] = (),
    force: bool = False,
) -> RunData:
    """Read a COCO results file and its annotations.

    Args:
        images: image folder; None: images/ beside the annotations, if it exists.
        outputs, force: files that will be written, see `check_outputs`.

    Raises:
        UserError: a file does not exist or is malformed, or the detections are for other images.
    """
    annotations, folder = _named_data(data, images)
    check_outputs(outputs, [predictions, data, annotations.source, folder], force=force)
    results = read_results(predictions)
    check_results(annotations, results, str(predictions))
    return RunData(Path(predictions).name, annotations, folder, analyze(annotations, results), f"{predictions}")


def read_run(
    path: str | Path,
    *,
    data: str | Path | None = None,
    images: str | Path | None = None,
    overrides: Sequence[str] = (),
    detect: bool = True,
    outputs: Sequence[Path] = (),
    force: bool = False,
) -> RunData:
    """Read a run, given its folder or checkpoint.

    Uses the detections that training saved if their AP is that of best.pt. Otherwise runs the detector on the val
    dataset, or on `data`.

    Args:
        data, images: annotations and image folder to use instead of the config's `data.val`.
        overrides: overrides of the config, like data.val.annotations=… or eval.nms_threshold=….
        detect: if False, raise UserError instead of running the detector.
        outputs, force: files that will be written, see `check_outputs`.

    Raises:
        UserError: the run does not exist, has neither checkpoint nor detections, or one of its files is invalid.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: pass the folder of a run (output_dir) or its best.pt")
    folder, checkpoint = (path, path / "best.pt") if path.is_dir() else (path.parent, path)
    if not checkpoint.is_file() and not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is not the folder of a training run: it has neither best.pt nor config.yaml")
    config, numbers = _config_of(folder, checkpoint, overrides)
    annotations, image_folder = _val_data(config, images) if data is None else _named_data(data, images)
    run_files = [folder / name for name in ("config.yaml", "metrics.jsonl", "environment.json", *PREDICTION_FILES)]
    check_outputs(outputs, [checkpoint, *run_files, data, annotations.source, image_folder], force=force)
    analysis, detections_source = None, ""
    if not any(override.startswith(DETECTION_KEYS) for override in overrides):
        analysis, detections_source = _saved_analysis(folder, annotations, numbers)
    if analysis is None:
        if not checkpoint.is_file():
            raise UserError(
                f"{folder} has neither best.pt nor detections of {annotations.source} "
                f"({' or '.join(PREDICTION_FILES)}): there is nothing to report on"
            )
        if not detect:
            raise UserError(f"{folder} has no detections with the AP of {checkpoint}")
        analysis, detections_source = (
            analyze(annotations, _run_detector(checkpoint, annotations, image_folder, overrides)),
            f"{checkpoint}, run for this report",
        )
    return RunData(
        name=folder.name or str(folder.resolve().name),
        annotations=annotations,
        images=image_folder,
        analysis=analysis,
        detections_source=detections_source,
        folder=folder,
        checkpoint=checkpoint if checkpoint.is_file() else None,
        config=config,
        history=read_metrics(folder),
        curves=read_curves(folder),
        trained_with=read_environments(folder),
    )


def read_curves(folder: Path) -> dict[str, ScalarCurve]:
    """Scalars "train/…" of the TensorBoard events; {} if there are none, or if they cannot be read."""
    if not any(folder.glob("events.out.tfevents.*")):
        return {}
    # TensorBoard is slow to import.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 1000, "images": 1, "tensors": 1})
    # A damaged event file must not prevent the report.
    with contextlib.suppress(Exception):
        events.Reload()
        tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("train/")]
        return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
    return {}


def _config_of(folder: Path, checkpoint: Path, overrides: Sequence[str]) -> tuple[DetectionConfig, dict[str, Any]]:
    """The config, and the metrics stored in the checkpoint ({} if there are none)."""
    if not checkpoint.is_file():
        return load_config(folder / "config.yaml", overrides), {}
    numbers = {} if is_exported(checkpoint) else read_checkpoint(checkpoint).get("numbers") or {}
    return detector_config(checkpoint, overrides), numbers


def _saved_analysis(folder: Path, annotations: Annotations, numbers: dict[str, Any]) -> tuple[Analysis | None, str]:
    """The analysis of the first saved detections whose AP equals that of `numbers`, and the path of their file."""
    for name in PREDICTION_FILES:
        path = folder / name
        if not path.is_file():
            continue
        results = read_results(path)
        try:
            check_results(annotations, results, str(path))
        except UserError:
            # The detections are for other images, if the user passed another dataset.
            if numbers:
                continue
            raise
        analysis = analyze(annotations, results)
        # Of several val sets, the report is about the first one.
        of_set = next(iter(numbers["sets"].values())) if numbers.get("sets") else numbers
        ap, expected = analysis.matches.evaluation.numbers["AP"], of_set.get("AP")
        if not numbers or (math.isnan(ap) and expected is None) or (expected is not None and abs(ap - expected) < 1e-6):
            return analysis, str(path)
    return None, ""


def _run_detector(
    checkpoint: Path, annotations: Annotations, images: Path | None, overrides: Sequence[str]
) -> list[Result]:
    """Run the detector on the images; returns COCO results."""
    if images is None:
        raise UserError(
            f"the images of {annotations.source} are needed to run {checkpoint}: set their folder with --images DIR"
        )
    check_images(annotations, images)
    device = pick_device(detector_config(checkpoint, overrides).device)
    model, config, classes = load_detector(checkpoint, device, overrides=overrides)
    dataset = DetectionDataset(annotations, images, short_side=config.data.short_side, long_side=config.data.long_side)
    loader = eval_loader(dataset, config.eval.batch_size or config.data.batch_size, config.data.workers, device)
    return detect_dataset(model, loader, category_ids_of(classes, annotations), device, amp=config.train.amp)


def _val_data(config: DetectionConfig, images: str | Path | None) -> tuple[Annotations, Path | None]:
    """The val annotations of a config, and their image folder if it exists."""
    annotations = read_split(config.data, "val", alone=True, images=False)
    return annotations, _existing_folder(images, annotations.images)


def _named_data(data: str | Path, images: str | Path | None) -> tuple[Annotations, Path | None]:
    """Annotations from a path of the user, and their image folder if it exists."""
    annotations = read_annotations(data, images=images)
    return annotations, _existing_folder(images, annotations.images)


def _existing_folder(named: str | Path | None, default: str | Path) -> Path | None:
    if named is None:
        return Path(default) if Path(default).is_dir() else None
    if not Path(named).is_dir():
        raise UserError(f"image folder {named} does not exist")
    return Path(named)


def config_to_yaml(config: DetectionConfig) -> str:
    """The resolved config as YAML."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)
