"""Decide which images a fixed copy keeps, and correct their file names and sizes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from detection.doctor.box_checks import clip_to_image
from detection.doctor.image_checks import UNUSABLE_STATUSES, find_renamed_files, find_size_mismatches
from detection.doctor.run_checks import CheckedDataset

ImageChange = tuple[str, str]


@dataclass
class ImagePlan:
    """What to do with each of n images.

    Attributes:
        keep: bool [n].
        target: int64 [n], the row that the boxes of each image move to, or -1 to remove them.
        names: [n], corrected file names.
        sizes: int64 [n, 2], corrected width and height.
        scale: float64 [n, 4], factors of the boxes of each image.
        changes: (what, image) of each change.
        unfixed: descriptions of faults without an unambiguous correction.
    """

    keep: np.ndarray
    target: np.ndarray
    names: list[str]
    sizes: np.ndarray
    scale: np.ndarray
    changes: list[ImageChange]
    unfixed: list[str]


def plan_images(checked: CheckedDataset, leaked: Sequence[int] = ()) -> ImagePlan:
    """Decide what to do with each image; the rows in `leaked` are removed."""
    entries, images = checked.original, checked.images
    count = len(entries.image_ids)
    plan = ImagePlan(
        keep=np.ones(count, bool),
        target=np.arange(count),
        names=[str(name) for name in entries.file_names],
        sizes=checked.normalized.sizes.copy(),
        scale=np.ones((count, 4)),
        changes=[],
        unfixed=[],
    )

    def drop_image(row: int, what: str) -> None:
        if plan.keep[row]:
            plan.keep[row], plan.target[row] = False, -1
            plan.changes.append((what, plan.names[row]))

    renamed = find_renamed_files(entries, images.rows("missing"))
    for row, name in renamed.items():
        plan.changes.append((f"file name corrected ({name})", plan.names[row]))
        plan.names[row] = name
    for row in range(count):
        if entries.image_ids[row] < 0:
            drop_image(row, "image entry without id or file name removed")
        elif row in entries.rows_outside_folder:
            drop_image(row, "image removed with its boxes: its name points outside the image folder")
        elif images.probes[row].status in UNUSABLE_STATUSES and row not in renamed:
            drop_image(row, f"image removed with its boxes: it is {images.probes[row].status}")
        elif (plan.sizes[row] < 1).any():
            drop_image(row, "image removed with its boxes: its size is unknown")
        elif (entries.sizes[row] < 1).any():
            plan.changes.append(("image size added", plan.names[row]))
    _drop_repeated_ids(checked, plan, drop_image)
    _merge_repeated_files(plan)
    for row in leaked:
        drop_image(row, "image removed with its boxes: it is also in val")
    for row in find_size_mismatches(entries, images)["image-size"]:
        if plan.keep[row]:
            _fix_size(checked, plan, row, drop_image)
    _drop_identical_files(checked, plan)
    return plan


def _drop_repeated_ids(checked: CheckedDataset, plan: ImagePlan, drop_image: Callable[[int, str], None]) -> None:
    """Of images with the same id, keep the first if all have the same file; otherwise remove all of them."""
    entries = checked.original
    values, counts = np.unique(entries.image_ids, return_counts=True)
    for value in values[(counts > 1) & (values >= 0)].tolist():
        rows = np.flatnonzero(entries.image_ids == value).tolist()
        if len({plan.names[row] for row in rows}) == 1:
            for row in rows[1:]:
                drop_image(row, "second entry of an image removed")
        else:
            for row in rows:
                drop_image(row, f"image removed with its boxes: id {value} is used by several images")


def _merge_repeated_files(plan: ImagePlan) -> None:
    """Merge entries with the same file into one image with the boxes of all."""
    first: dict[str, int] = {}
    for row in np.flatnonzero(plan.keep).tolist():
        name = plan.names[row]
        if name in first:
            plan.keep[row], plan.target[row] = False, first[name]
            plan.changes.append(("image listed twice merged into one", name))
        else:
            first[name] = row


def _fix_size(checked: CheckedDataset, plan: ImagePlan, row: int, drop_image: Callable[[int, str], None]) -> None:
    """Replace a wrong annotated size by the size of the image file, if the boxes show which size they refer to."""
    entries, images = checked.normalized, checked.images
    annotated = entries.sizes[row].astype(float)
    actual = np.array(images.upright_size(row), float)
    boxes = entries.boxes[(entries.image_rows == row) & np.isfinite(entries.boxes).all(axis=1)]
    fits = not len(boxes) or bool((boxes[:, :2] + boxes[:, 2:] <= actual + 2).all())
    factor = actual / annotated
    same_shape = abs(factor[0] / factor[1] - 1) < 0.02
    if same_shape and not fits:
        # The boxes fit the annotated size only, and the aspect ratio is the same: the image was resized.
        plan.scale[row] = [factor[0], factor[1]] * 2
        plan.sizes[row] = images.upright_size(row)
        plan.changes.append(("image size corrected and boxes scaled", plan.names[row]))
    elif not len(boxes) or (fits and not same_shape):
        plan.sizes[row] = images.upright_size(row)
        plan.changes.append(("image size corrected", plan.names[row]))
    else:
        drop_image(
            row, "image removed with its boxes: its size is wrong, and its boxes do not show which size they refer to"
        )


def _drop_identical_files(checked: CheckedDataset, plan: ImagePlan) -> None:
    """Of identical files with the same boxes, keep the first."""
    entries, images = checked.normalized, checked.images
    groups: dict[bytes, list[int]] = {}
    for row in np.flatnonzero(plan.keep).tolist():
        if images.probes[row].digest:
            groups.setdefault(images.probes[row].digest, []).append(row)
    groups = {digest: rows for digest, rows in groups.items() if len(rows) > 1}
    in_groups = {row for rows in groups.values() for row in rows}
    boxes_of_row: dict[int, list[tuple[float, ...]]] = {row: [] for row in in_groups}
    for annotation in np.flatnonzero(np.isin(entries.image_rows, list(in_groups))).tolist():
        box = clip_to_image(
            entries.boxes[annotation : annotation + 1], entries.sizes[entries.image_rows[annotation]][None]
        )[0]
        boxes_of_row[int(entries.image_rows[annotation])].append(
            (float(entries.category_rows[annotation]), *box.round(1).tolist())
        )
    for rows in groups.values():
        for row in rows[1:]:
            if sorted(boxes_of_row[row]) == sorted(boxes_of_row[rows[0]]):
                plan.keep[row], plan.target[row] = False, -1
                plan.changes.append((f"copy of {plan.names[rows[0]]} removed", plan.names[row]))
            else:
                plan.unfixed.append(
                    f"{plan.names[rows[0]]} and {plan.names[row]} are identical files with different boxes"
                )
