"""Evaluates a checkpoint, an exported file or a results file; prints and writes the metrics."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from detection.checkpoint import Classes
from detection.config import EVAL_BACKENDS, DataConfig, SourceConfig
from detection.core import distributed
from detection.core.errors import UserError
from detection.core.extras import BACKENDS, require, require_for_file
from detection.core.memory import memory_advice
from detection.core.outputs import check_outputs, write_output
from detection.data.annotations import Annotations
from detection.data.dataset import DetectionDataset
from detection.data.formats.detect_format import read_annotations
from detection.data.load_split import read_split
from detection.evaluation.coco_evaluator import Evaluation, check_results, evaluate_results, read_results, write_results
from detection.evaluation.detect_dataset import detect_batches, eval_loader
from detection.evaluation.journal import Journal, journal_key
from detection.runtime.adapter import NO_DATA
from detection.runtime.pytorch import detector_config, load_detector, own_resize
from detection.zoo.names import output_folder

RUN_PREDICTIONS = "predictions.json"
"""Of the last evaluation on the run's own val set, beside its checkpoint."""


def score_checkpoint(
    checkpoint: str | Path,
    *,
    adapter: str | Path | None = None,
    overrides: Sequence[str] = (),
    annotations: str | None = None,
    images: str | None = None,
    json_file: str | None = None,
    predictions_file: str | None = None,
    resume: bool = False,
    force: bool = False,
) -> Evaluation | None:
    """Detect on every image of the annotations (default: the checkpoint's `data.val`, of a list its first set), score,
    print the table.

    Under torchrun the processes share the images, and the first one scores.

    Args:
        adapter: of an ONNX file of another project, see `detection.runtime.adapter.find_adapter`; `annotations` are
            then required.
        predictions_file: where the detections are written; see `predictions_path` for the default.
        resume: continue an interrupted evaluation of the same checkpoint and data.
        force: overwrite files that this toolkit did not write.

    Returns:
        The evaluation, None in all processes but the first.

    Raises:
        UserError: unreadable input, classes that the model does not know, or an output that must not be overwritten.
    """
    require_for_file(checkpoint)
    config = detector_config(checkpoint, overrides, adapter)
    require(f"eval.backend={config.eval.backend}", *BACKENDS.get(config.eval.backend, ()))
    own_val = config.data.val_sources()[0]
    if annotations is None and own_val.annotations == NO_DATA:
        raise UserError(f"{checkpoint} is a file of another project, without a val set: name the data with --data")
    source = _source(annotations, images, own_val)
    ground_truth = read_split(config.data.model_copy(update={"val": source}), "val", alone=True)
    # Without overrides the config is the checkpoint's own: large files are not read twice.
    own = config if not overrides or predictions_file else detector_config(checkpoint, adapter=adapter)
    path = Path(predictions_file) if predictions_file else predictions_path(checkpoint, source, own.data)
    part = path.with_name(f"{path.name}.part{os.environ.get('RANK', '0')}")
    outputs: list[str | Path] = [path, part, *([json_file] if json_file else [])]
    inputs = [
        checkpoint,
        Path(checkpoint).with_suffix(".bin"),
        ground_truth.source,
        source.annotations,
        ground_truth.images,
    ]
    check_outputs(outputs, inputs, force=force)
    with distributed.session(config.device) as device, memory_advice(config, training=False):
        if distributed.is_main():
            print(ground_truth.report())
        model, config, classes = load_detector(checkpoint, device, overrides=overrides, adapter=adapter)
        category_ids = category_ids_of(classes, ground_truth)
        data = config.data
        dataset = DetectionDataset(
            ground_truth,
            ground_truth.images,
            short_side=data.short_side,
            long_side=data.long_side,
            resize=own_resize(model),
        )
        journal = Journal(part, journal_key(checkpoint, adapter, config, ground_truth), resume)
        if journal.images:
            print(f"{len(journal.images)} images were done before")
        batch_size = config.eval.batch_size or data.batch_size
        loader = eval_loader(dataset, batch_size, data.workers, device, journal.images)
        for done, found in detect_batches(model, loader, category_ids, device, amp=config.train.amp):
            journal.add(done, found)
        results = [result for share in distributed.gather(journal.results) for result in share]
        evaluation = None
        if distributed.is_main():
            write_results(path, results)
            evaluation = evaluate_results(ground_truth, results, config.eval.backend)
            print(f"\n{evaluation.table()}\n\n{len(results)} detections written to {path}")
            if not predictions_file and path.name != RUN_PREDICTIONS and own_val.annotations != NO_DATA:
                print(f"(not to {RUN_PREDICTIONS}, which is of the val set that {checkpoint} was trained with)")
            _write_numbers(evaluation, json_file)
        journal.remove()
        return evaluation


def predictions_path(checkpoint: str | Path, source: SourceConfig, own: DataConfig) -> Path:
    """predictions.json beside the checkpoint, for the (first) val set of `own` that it was trained with;
    predictions_DATA.json for other data, so that the detections that the training left stay."""
    names = [(os.path.realpath(one.annotations), one.split or "val") for one in (source, own.val_sources()[0])]
    folder = output_folder(checkpoint)
    if names[0] == names[1]:
        return folder / RUN_PREDICTIONS
    split = f"_{source.split}" if source.split else ""
    return folder / f"predictions_{Path(source.annotations).resolve().stem}{split}.json"


def score_file(
    predictions: str,
    annotations: str | None,
    *,
    checkpoint: str | None = None,
    json_file: str | None = None,
    backend: str = EVAL_BACKENDS[0],
    force: bool = False,
) -> Evaluation:
    """Score a COCO results file without a model; `checkpoint` is only used for the annotations where none are given.

    Raises:
        UserError: unreadable input, or `json_file` must not be overwritten (see `check_outputs`, also for `force`).
    """
    require(f"eval.backend={backend}", *BACKENDS.get(backend, ()))
    if annotations is None:
        assert checkpoint is not None
        ground_truth = read_split(detector_config(checkpoint).data, "val", alone=True, images=False)
    else:
        ground_truth = read_annotations(annotations, split="val")
    inputs = [predictions, checkpoint, annotations, ground_truth.source, ground_truth.images]
    check_outputs([json_file] if json_file else [], inputs, force=force)
    print(ground_truth.report())
    results = read_results(predictions)
    check_results(ground_truth, results, predictions)
    evaluation = evaluate_results(ground_truth, results, backend)
    print(f"\n{evaluation.table()}")
    _write_numbers(evaluation, json_file)
    return evaluation


def category_ids_of(classes: Classes, ground_truth: Annotations) -> list[int | None]:
    """The data's category id for each label of the model, by class name; None where the data lack the class.

    Ids may differ (COCO's official 1–90 with gaps, or 1–80), names may not.

    Raises:
        UserError: the data have a class that the model was not trained on.
    """
    if classes.names == ground_truth.class_names:
        return ground_truth.category_ids.tolist()
    id_of = dict(zip(ground_truth.class_names, ground_truth.category_ids.tolist(), strict=True))
    unknown = [name for name in ground_truth.class_names if name not in classes.names]
    if unknown:
        raise UserError(
            f"{ground_truth.source} has classes that the model does not know: {', '.join(unknown[:5])}"
            f"{', …' if len(unknown) > 5 else ''}; it knows {', '.join(classes.names[:10])}"
            f"{', …' if len(classes.names) > 10 else ''}"
        )
    return [id_of.get(name) for name in classes.names]


def _source(annotations: str | None, images: str | None, default: SourceConfig) -> SourceConfig:
    if annotations is None:
        return default.model_copy(update={"images": images} if images else {})
    return SourceConfig(annotations=annotations, images=images)


def _write_numbers(evaluation: Evaluation, json_file: str | None) -> None:
    if json_file is not None:
        text = json.dumps(evaluation.to_json(), indent=1)
        write_output(Path(json_file), lambda file: file.write(text.encode()))
        print(f"numbers written to {json_file}")
