"""What a report is made of: a run's folder, or a file of detections; found, read, and seen to belong together."""

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
from detection.core.environment import read_environments
from detection.core.errors import UserError
from detection.core.outputs import check_outputs
from detection.data.annotations import Annotations
from detection.data.formats.detect_format import read_annotations
from detection.data.load_split import check_images, read_split
from detection.engine.run_folder import read_metrics
from detection.evaluation.analyze import Analysis, analyze
from detection.evaluation.coco_evaluator import Result, check_results, read_results

PREDICTIONS = ("best_predictions.json", "predictions.json")
"""Where a run's detections are, the first one that fits its checkpoint: the latter are of the last evaluation."""
DECISIVE = ("eval.", "model.", "data.short_side", "data.long_side")
"""Keys of a config that other detections hang on."""
Curve = list[tuple[int, float]]
"""(step, value)"""


@dataclass(frozen=True)
class Source:
    """One run, or one file of detections, analysed.

    Attributes:
        name: for people.
        images: the folder of the images; None where it is not to be had.
        came_from: where the detections came from, in words.
        folder, checkpoint, config: of a run; None for a file of detections.
        history: the lines of metrics.jsonl, by epoch.
        trained_with: machine, versions and commit, once for each time that the training was started.
        curves: training loss, its parts and lr by TensorBoard's tags ("train/loss"); see `read_curves`.
    """

    name: str
    index: Annotations
    images: Path | None
    analysis: Analysis
    came_from: str
    folder: Path | None = None
    checkpoint: Path | None = None
    config: DetectionConfig | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    curves: dict[str, Curve] = field(default_factory=dict)
    trained_with: list[dict[str, str]] = field(default_factory=list)


def read_file(
    predictions: str | Path,
    data: str | Path,
    images: str | Path | None,
    *,
    outputs: Sequence[Path] = (),
    force: bool = False,
) -> Source:
    """Detections in a COCO results file, and their annotations; no model.

    Args:
        images: None: images/ beside the annotations, if it is there.
        outputs: what will be written of it, see `check_outputs`, also for `force`.

    Raises:
        UserError: a file that is absent or malformed, or detections of other data.
    """
    index, folder = _named_data(data, images)
    check_outputs(outputs, [predictions, data, index.source, folder], force=force)
    results = read_results(predictions)
    check_results(index, results, str(predictions))
    return Source(Path(predictions).name, index, folder, analyze(index, results), f"{predictions}")


def read_run(
    path: str | Path,
    *,
    data: str | Path | None = None,
    images: str | Path | None = None,
    overrides: Sequence[str] = (),
    detect: bool = True,
    outputs: Sequence[Path] = (),
    force: bool = False,
) -> Source:
    """A run's folder or checkpoint.

    Its detections are those that the training left, if they give the AP that best.pt claims. Otherwise the network
    is run on the val set, or on `data`.

    Args:
        data, images: score on these annotations in place of the config's `data.val`.
        overrides: of the config, like data.val.annotations=… or eval.nms_threshold=….
        detect: False: never run the network.
        outputs: what will be written of it, see `check_outputs`, also for `force`.

    Raises:
        UserError: there is no such run; no checkpoint and no detections in it; anything wrong with its files.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: name a run's folder (output_dir) or its best.pt")
    folder, checkpoint = (path, path / "best.pt") if path.is_dir() else (path.parent, path)
    if not checkpoint.is_file() and not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is no run of tools/train.py: it has neither best.pt nor config.yaml")
    config, numbers = _config_of(folder, checkpoint, overrides)
    index, image_folder = _val_data(config, images) if data is None else _named_data(data, images)
    own = [folder / name for name in ("config.yaml", "metrics.jsonl", "environment.json", *PREDICTIONS)]
    check_outputs(outputs, [checkpoint, *own, data, index.source, image_folder], force=force)
    analysis, came_from = None, ""
    if not any(override.startswith(DECISIVE) for override in overrides):
        analysis, came_from = _left_by_training(folder, index, numbers)
    if analysis is None:
        if not checkpoint.is_file():
            raise UserError(
                f"{folder} has neither best.pt nor detections of {index.source} "
                f"({' or '.join(PREDICTIONS)}): there is nothing to report on"
            )
        if not detect:
            raise UserError(f"{folder} has no detections that give the AP of {checkpoint}")
        analysis, came_from = (
            analyze(index, _detect(checkpoint, index, image_folder, overrides)),
            f"{checkpoint}, run now",
        )
    return Source(
        name=folder.name or str(folder.resolve().name),
        index=index,
        images=image_folder,
        analysis=analysis,
        came_from=came_from,
        folder=folder,
        checkpoint=checkpoint if checkpoint.is_file() else None,
        config=config,
        history=read_metrics(folder),
        curves=read_curves(folder),
        trained_with=read_environments(folder),
    )


def read_curves(folder: Path) -> dict[str, Curve]:
    """What TensorBoard's events say of the training (tags "train/…"); {} where there are none, or no readable ones."""
    if not any(folder.glob("events.out.tfevents.*")):
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 1000, "images": 1, "tensors": 1})
    # The curves are worth no report: a damaged file is as good as none.
    with contextlib.suppress(Exception):
        events.Reload()
        tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("train/")]
        return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
    return {}


def _config_of(folder: Path, checkpoint: Path, overrides: Sequence[str]) -> tuple[DetectionConfig, dict[str, Any]]:
    """The config, and the numbers that the checkpoint claims."""
    if not checkpoint.is_file():
        return load_config(folder / "config.yaml", overrides), {}
    from detection.runtime.exported import is_exported
    from detection.runtime.pytorch import detector_config

    numbers = {} if is_exported(checkpoint) else read_checkpoint(checkpoint).get("numbers") or {}
    return detector_config(checkpoint, overrides), numbers


def _left_by_training(folder: Path, index: Annotations, numbers: dict[str, Any]) -> tuple[Analysis | None, str]:
    """The analysis of the first file of detections that gives the AP of `numbers`, and its name."""
    for name in PREDICTIONS:
        path = folder / name
        if not path.is_file():
            continue
        results = read_results(path)
        try:
            check_results(index, results, str(path))
        except UserError:
            # Of other data: the user may have named others now.
            if numbers:
                continue
            raise
        analysis = analyze(index, results)
        ap, claimed = analysis.matches.evaluation.numbers["AP"], numbers.get("AP")
        if not numbers or (math.isnan(ap) and claimed is None) or (claimed is not None and abs(ap - claimed) < 1e-6):
            return analysis, str(path)
    return None, ""


def _detect(checkpoint: Path, index: Annotations, images: Path | None, overrides: Sequence[str]) -> list[Result]:
    from detection.core.device import pick_device
    from detection.data.dataset import DetectionDataset
    from detection.evaluation.detect_dataset import detect_dataset, eval_loader
    from detection.evaluation.score import category_ids_of
    from detection.runtime.pytorch import detector_config, load_detector

    if images is None:
        raise UserError(f"the images of {index.source} are needed to run {checkpoint} on them: name --images DIR")
    check_images(index, images)
    device = pick_device(detector_config(checkpoint, overrides).device)
    model, config, classes = load_detector(checkpoint, device, overrides=overrides)
    dataset = DetectionDataset(index, images, short_side=config.data.short_side, long_side=config.data.long_side)
    loader = eval_loader(dataset, config.eval.batch_size or config.data.batch_size, config.data.workers, device)
    return detect_dataset(model, loader, category_ids_of(classes, index), device, amp=config.train.amp)


def _val_data(config: DetectionConfig, images: str | Path | None) -> tuple[Annotations, Path | None]:
    """The val set of a config, and the folder of its images, if it is there."""
    index = read_split(config.data, "val", alone=True, images=False)
    return index, _folder(images, index.images)


def _named_data(data: str | Path, images: str | Path | None) -> tuple[Annotations, Path | None]:
    """Annotations that the user named, and the folder of their images, if it is there."""
    index = read_annotations(data, images=images)
    return index, _folder(images, index.images)


def _folder(named: str | Path | None, default: str | Path) -> Path | None:
    if named is None:
        return Path(default) if Path(default).is_dir() else None
    if not Path(named).is_dir():
        raise UserError(f"images folder {named} does not exist")
    return Path(named)


def resolved_config(config: DetectionConfig) -> str:
    """As YAML."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)
