"""Which images a mended copy keeps, under which name, in which size."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from detection.doctor.box_checks import clipped
from detection.doctor.examine import CheckedSet
from detection.doctor.image_checks import BAD, similar_names, size_rows

ImageChange = tuple[str, str]


@dataclass
class ImagePlan:
    """For each image of a set.

    Attributes:
        keep: bool [n].
        target: int64 [n]: the row that its boxes go to, or -1.
        names: file names.
        sizes: int64 [n, 2], as they should be.
        scale: float64 [n, 4], by which its boxes are multiplied.
        changes: (what, image).
        left: what could not be mended for certain.
    """

    keep: np.ndarray
    target: np.ndarray
    names: list[str]
    sizes: np.ndarray
    scale: np.ndarray
    changes: list[ImageChange]
    left: list[str]


def plan_images(checked: CheckedSet, leaked: Sequence[int] = ()) -> ImagePlan:
    """Decide on each image; `leaked` ones are left out."""
    entries, seen = checked.original, checked.images
    count = len(entries.image_ids)
    plan = ImagePlan(
        keep=np.ones(count, bool),
        target=np.arange(count),
        names=[str(name) for name in entries.file_names],
        sizes=checked.normalized.sizes.copy(),
        scale=np.ones((count, 4)),
        changes=[],
        left=[],
    )

    def leave_out(row: int, what: str) -> None:
        if plan.keep[row]:
            plan.keep[row], plan.target[row] = False, -1
            plan.changes.append((what, plan.names[row]))

    near = similar_names(entries, seen.rows("missing"))
    for row, name in near.items():
        plan.changes.append((f"image's file name set right ({name})", plan.names[row]))
        plan.names[row] = name
    for row in range(count):
        if entries.image_ids[row] < 0:
            leave_out(row, "image entry without id or file name removed")
        elif row in entries.rows_outside_folder:
            leave_out(row, "image left out with its boxes: its name leads out of the images folder")
        elif seen.looks[row].status in BAD and row not in near:
            leave_out(row, f"image left out with its boxes: it is {seen.looks[row].status}")
        elif (plan.sizes[row] < 1).any():
            leave_out(row, "image left out with its boxes: its size is not known")
        elif (entries.sizes[row] < 1).any():
            plan.changes.append(("image's size written", plan.names[row]))
    _ids(checked, plan, leave_out)
    _listed_twice(plan)
    for row in leaked:
        leave_out(row, "image left out with its boxes: val has it, too")
    for row in size_rows(entries, seen)["image-size"]:
        if plan.keep[row]:
            _mend_size(checked, plan, row, leave_out)
    _copies(checked, plan)
    return plan


def _ids(checked: CheckedSet, plan: ImagePlan, leave_out: Callable[[int, str], None]) -> None:
    """An id that is there twice: one of two equal entries, or both where it cannot be told whose the boxes are."""
    entries = checked.original
    values, counts = np.unique(entries.image_ids, return_counts=True)
    for value in values[(counts > 1) & (values >= 0)].tolist():
        rows = np.flatnonzero(entries.image_ids == value).tolist()
        if len({plan.names[row] for row in rows}) == 1:
            for row in rows[1:]:
                leave_out(row, "second entry of an image removed")
        else:
            for row in rows:
                leave_out(row, f"image left out with its boxes: id {value} stands for several images")


def _listed_twice(plan: ImagePlan) -> None:
    """The same file under several ids becomes one image with the boxes of all."""
    first: dict[str, int] = {}
    for row in np.flatnonzero(plan.keep).tolist():
        name = plan.names[row]
        if name in first:
            plan.keep[row], plan.target[row] = False, first[name]
            plan.changes.append(("image that was listed twice merged into one", name))
        else:
            first[name] = row


def _mend_size(checked: CheckedSet, plan: ImagePlan, row: int, leave_out: Callable[[int, str], None]) -> None:
    """The image's own size, where the boxes tell what they are in pixels of."""
    entries, seen = checked.normalized, checked.images
    said = entries.sizes[row].astype(float)
    true = np.array(seen.upright(row), float)
    boxes = entries.boxes[(entries.image_rows == row) & np.isfinite(entries.boxes).all(axis=1)]
    fits = not len(boxes) or bool((boxes[:, :2] + boxes[:, 2:] <= true + 2).all())
    factor = true / said
    same_shape = abs(factor[0] / factor[1] - 1) < 0.02
    if same_shape and not fits:
        # They fit what the file says and not the image, which has the same shape: it was made smaller.
        plan.scale[row] = [factor[0], factor[1]] * 2
        plan.sizes[row] = seen.upright(row)
        plan.changes.append(("image's size set right and its boxes scaled", plan.names[row]))
    elif not len(boxes) or (fits and not same_shape):
        plan.sizes[row] = seen.upright(row)
        plan.changes.append(("image's size set right", plan.names[row]))
    else:
        leave_out(row, "image left out with its boxes: its size is wrong, and what its boxes are in cannot be told")


def _copies(checked: CheckedSet, plan: ImagePlan) -> None:
    """Of files with the same bytes one is kept, where they have the same boxes."""
    entries, seen = checked.normalized, checked.images
    groups: dict[bytes, list[int]] = {}
    for row in np.flatnonzero(plan.keep).tolist():
        if seen.looks[row].digest:
            groups.setdefault(seen.looks[row].digest, []).append(row)
    groups = {digest: rows for digest, rows in groups.items() if len(rows) > 1}
    wanted = {row for rows in groups.values() for row in rows}
    described: dict[int, list[tuple[float, ...]]] = {row: [] for row in wanted}
    for annotation in np.flatnonzero(np.isin(entries.image_rows, list(wanted))).tolist():
        box = clipped(entries.boxes[annotation : annotation + 1], entries.sizes[entries.image_rows[annotation]][None])[
            0
        ]
        described[int(entries.image_rows[annotation])].append(
            (float(entries.category_rows[annotation]), *box.round(1).tolist())
        )
    for rows in groups.values():
        for row in rows[1:]:
            if sorted(described[row]) == sorted(described[rows[0]]):
                plan.keep[row], plan.target[row] = False, -1
                plan.changes.append((f"copy of {plan.names[rows[0]]} removed", plan.names[row]))
            else:
                plan.left.append(f"{plan.names[rows[0]]} and {plan.names[row]} are one image with different boxes")
