"""Labels images with a detector: new annotations for a folder, or the missing classes of a data set."""

import os
import tempfile
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from detection.core import distributed
from detection.core.errors import UserError
from detection.core.files import UNFINISHED, make_folder
from detection.core.outputs import check_outputs
from detection.core.text import text_table
from detection.data.annotations import Annotations
from detection.data.formats.coco import split_of
from detection.data.formats.detect_format import read_annotations
from detection.data.formats.writers import WRITERS
from detection.data.image_io import names_outside
from detection.data.load_split import check_images
from detection.evaluation.journal import Journal, journal_key
from detection.inference.predictor import Predictor
from detection.labelling.detect_into_journal import detect_into_journal, folder_annotations
from detection.labelling.extend_coco import extend_coco
from detection.labelling.merge import CLASS_LISTS, AddedBoxes, MergedClasses, merge_annotations, merge_classes
from detection.labelling.review_page import write_review_page
from detection.zoo.names import find_detector

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class LabelOptions:
    """What to add and how to write it.

    Attributes:
        format: "coco", "voc" or "yolo".
        classes: of the detector's classes; None: all.
        score: boxes with at least this score become annotations.
        ignore_score: boxes between this score and `score` become crowd regions.
        class_list: see `merge_classes`.
        transfer: "copy", "link" (symbolic links), or for COCO "none"; None: "none" for COCO, otherwise "link".
    """

    format: str = "coco"
    classes: Collection[str] | None = None
    score: float = 0.4
    ignore_score: float = 0.15
    class_list: str = CLASS_LISTS[0]
    transfer: str | None = None

    @property
    def image_transfer(self) -> str:
        return self.transfer or ("none" if self.format == "coco" else "link")


@dataclass
class LabelSummary:
    """What was added: for each class that the detector adds (name, boxes, doubtful boxes, images with either)."""

    images: int
    per_class: list[tuple[str, int, int, int]]
    own_boxes: int
    failed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    """Config keys for a training with the result."""

    def __str__(self) -> str:
        used = [line for line in self.per_class if line[3] > 0]
        cells = [(name, *map(str, counts)) for name, *counts in used]
        boxes, doubtful = sum(line[1] for line in self.per_class), sum(line[2] for line in self.per_class)
        cells.append(("all", str(boxes), str(doubtful), ""))
        lines = [
            f"{self.images} images, {self.own_boxes} boxes kept, {boxes} added, {doubtful} doubtful",
            text_table(("added class", "boxes", "doubtful", "images"), cells, left=1),
        ]
        unused = len(self.per_class) - len(used)
        lines += [f"({unused} more classes without a box)"] if unused else []
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, "", "in a config:", *(f"  {key}" for key in self.keys)])


def label_images(
    detector: str | Path,
    out: str | Path,
    *,
    source: str | Path | None = None,
    data: str | Path | None = None,
    split: str | None = None,
    adapter: str | Path | None = None,
    options: LabelOptions | None = None,
    page: str | Path | None = None,
    device: str = "auto",
    batch_size: int = 4,
    resume: bool = False,
    force: bool = False,
) -> LabelSummary | None:
    """Detect on every image and write a data set into the folder `out`, which appears when it is complete.

    Annotations of `data` stay as they are; boxes are added for the classes that it lacks. An image that cannot be read
    is left out, since objects without annotation would count as background. Under torchrun the processes share the
    images.

    Args:
        source: the folder of the images; with `data` it may be None for the usual place of the format.
        split: "train", "val" or "test" of a folder or data.yaml that holds several.
        page: an HTML page with images to review.
        resume: continue a call that was interrupted, with the same detector, data and options.
        force: overwrite a `page` that this toolkit did not write.

    Returns:
        The summary; None in all processes but the first.

    Raises:
        UserError: unreadable input, `out` is not empty, or nothing is to be added.
    """
    options = options or LabelOptions()
    detector, out = find_detector(detector), Path(out)
    _check(out, data, source, options)
    if data is None:
        annotations, unreadable = folder_annotations(source or "")
    else:
        annotations, unreadable = read_annotations(data, images=source, split=split), []
        check_images(annotations, annotations.images)
    if names_outside(annotations.file_names.tolist(), annotations.images) and options.image_transfer == "none":
        raise UserError(
            f"images of {annotations.source} do not all lie below {annotations.images}: --transfer must be copy or link"
        )
    part = out.absolute().with_name(f"{out.absolute().name}.part{os.environ.get('RANK', '0')}")
    # A page in the new folder overwrites nothing.
    outside = [page] if page and out.absolute() not in Path(page).absolute().parents else []
    check_outputs([part, *outside], [detector, annotations.source, annotations.images], force=force)
    with distributed.session(device) as place:
        streams = min(4, torch.get_num_threads()) if place.type == "cpu" else 1
        predictor = Predictor(
            detector,
            str(place),
            score_threshold=options.ignore_score,
            num_streams=streams,
            adapter=adapter,
        )
        classes = merge_classes(annotations, predictor.classes, options.classes, options.class_list)
        key = journal_key(detector, adapter, predictor.config, annotations)
        key |= {"classes": classes.id_of_added, "ignore_score": options.ignore_score}
        journal = Journal(part, key, resume)
        rows = range(len(annotations))[distributed.rank() :: distributed.world_size()]
        failed = detect_into_journal(predictor, annotations, rows, classes.id_of_added, journal, batch_size=batch_size)
        shares = distributed.gather((journal.images, journal.results, failed))
        summary = None
        if distributed.is_main():
            done = {image_id for images, _, _ in shares for image_id in images}
            results = [result for _, share, _ in shares for result in share]
            added = AddedBoxes.of(results, annotations, options.score, Path(detector).name)
            annotations = annotations.part(np.flatnonzero(np.isin(annotations.image_ids, list(done))))
            summary = _write(annotations, classes, added, out, options)
            if page is not None:
                Path(page).parent.mkdir(parents=True, exist_ok=True)
                write_review_page(page, annotations, classes, added, options.score)
            summary.failed = [*unreadable, *(reason for _, _, reasons in shares for reason in reasons)]
        distributed.barrier()
        journal.remove()
        return summary


def _check(out: Path, data: str | Path | None, source: str | Path | None, options: LabelOptions) -> None:
    if data is None and source is None:
        raise UserError("name a folder of images, or a data set with --data")
    if not 0 <= options.ignore_score <= options.score <= 1:
        raise UserError(
            f"expected: 0 <= --ignore-score <= --score <= 1, got: --ignore-score {options.ignore_score:g} and --score "
            f"{options.score:g}"
        )
    if options.format != "coco" and options.transfer == "none":
        raise UserError(f"{options.format} needs the images beside the annotations: --transfer must be copy or link")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already and not empty; give another --out, or remove it")
    make_folder(out.absolute().parent, "the folder of --out")


def _write(
    annotations: Annotations, classes: MergedClasses, added: AddedBoxes, out: Path, options: LabelOptions
) -> LabelSummary:
    """Write the data set into a new folder, which then becomes `out`."""
    if not len(annotations):
        raise UserError(f"no image of {annotations.source} could be processed")
    split = split_of(Path(annotations.source)) if annotations.format == "coco" else "train"
    split = split if split in SPLITS else "train"
    place = out.absolute()
    with tempfile.TemporaryDirectory(
        dir=place.parent, prefix=f".{place.name}.", suffix=UNFINISHED, ignore_cleanup_errors=True
    ) as folder:
        unfinished = Path(folder) / place.name
        unfinished.mkdir()
        if options.format == "coco":
            notes = WRITERS["coco"]({split: annotations}, unfinished, options.image_transfer)
            extend_coco(unfinished / f"{split}.json", classes, added)
        else:
            merged = merge_annotations(annotations, classes, added)
            notes = WRITERS[options.format]({split: merged}, unfinished, options.image_transfer)
        os.replace(unfinished, place)
    file = {"coco": f"{split}.json", "voc": f"ImageSets/Main/{split}.txt", "yolo": "data.yaml"}[options.format]
    keys = [f"data.{'val' if split == 'val' else 'train'}.annotations={out / file}"]
    if options.image_transfer == "none":
        keys.append(f"data.{'val' if split == 'val' else 'train'}.images={annotations.images}")
    return LabelSummary(len(annotations), added.counts(classes), len(annotations.boxes), notes=notes, keys=keys)
