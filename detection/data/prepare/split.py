"""Split a data set by image, stratified by class, without leakage: similar images stay on one side.

Classes are spread by iterative stratification (Sechidis, Tsoumakas, Vlahavas 2011): the rarest class first, each of
its images to the side that still lacks most of that class.
"""

import hashlib
import os
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from detection.core.errors import UserError
from detection.core.files import file_digest, open_regular_file
from detection.data.annotations import Annotations


def split_images(
    annotations: Annotations, share: float, *, seed: int = 0, group_by: str | None = None
) -> tuple[np.ndarray, list[str]]:
    """Choose the training images. Returns bool [n], and a text about the groups that were kept together.

    A function of the file names, the boxes, the images' bytes and the arguments alone, whatever the order of the
    file. Images of the same bytes are never on both sides. Of a class that two images (or groups) have, each
    side gets one.

    Args:
        share: of the images that are for training, between 0 and 1.
        group_by: regular expression that is searched for in each file name; names in which it finds the same (its
            groups, if it has any, else the match) are kept together: frames of one video, tiles of one scene.

    Raises:
        UserError: one side would have no images, the pattern is not a regular expression, or an image cannot be read.
    """
    if not 0 < share < 1:
        raise UserError(f"--split {share:g}: expected is the share of the training images, between 0 and 1, like 0.8")
    groups, notes = _groups(annotations, group_by)
    if len(groups) < 2:
        raise UserError(
            f"{annotations.source} has {len(groups)} image(s) or group(s) of images: nothing can be divided"
        )
    presence = _presence(annotations)
    # The order depends only on names and seed.
    names = [min(str(annotations.file_names[i]) for i in group) for group in groups]
    order = sorted(range(len(groups)), key=lambda g: hashlib.sha1(f"{seed} {names[g]}".encode()).digest())
    counts = np.array([presence[groups[g]].sum(axis=0) for g in order])
    in_train = _stratify(counts, share)
    train = np.zeros(len(annotations), bool)
    for g, is_train in zip(order, in_train, strict=True):
        train[groups[g]] = is_train
    return train, notes


def _stratify(counts: np.ndarray, share: float) -> np.ndarray:
    """Choose the groups for training; returns bool [g].

    Args:
        counts: int [g, c], images of each group that have class c; the last column counts all of them.
    """
    total = counts.sum(axis=0).astype(float)
    holders = (counts > 0).sum(axis=0)
    # A class on one side only can be trained but not evaluated, or evaluated but not trained.
    lacking_val = np.where(holders >= 2, np.maximum(total * (1 - share), 1), 0)
    lacking = np.stack([total - lacking_val, lacking_val])  # [side, class]: 0 is training, 1 validation
    side = np.full(len(counts), -1)
    left = counts[:, :-1].sum(axis=0)
    while (side < 0).any():
        rare = int(np.where(left > 0, left, np.iinfo(np.int64).max).argmin()) if left.any() else counts.shape[1] - 1
        for g in np.flatnonzero((counts[:, rare] > 0) & (side < 0)):
            need = lacking[:, rare]
            # If both sides miss the same number of boxes, the side that misses more images.
            wanted = int(need[1] > need[0]) if need[0] != need[1] else int(lacking[1, -1] > lacking[0, -1])
            side[g] = wanted
            lacking[wanted] -= counts[g]
            left -= counts[g, :-1]
    if (side == side[0]).all():
        # Few images or an extreme share: the group that removes the fewest classes, and of those the smallest.
        alone = (counts[:, :-1] > 0) & (holders[:-1] == 1)
        moved = min(range(len(counts)), key=lambda g: (int(alone[g].sum()), int(counts[g, -1]), g))
        side[moved] = 1 - side[moved]
    return side == 0


def _presence(annotations: Annotations) -> np.ndarray:
    """int [n, k + 2]: whether each image has each class, whether it has no box at all, and 1."""
    table = np.zeros((len(annotations), len(annotations.class_names) + 2), np.int64)
    image_of_box = np.repeat(np.arange(len(annotations)), np.diff(annotations.offsets))
    table[image_of_box, annotations.labels - 1] = 1
    table[:, -2] = np.diff(annotations.offsets) == 0
    table[:, -1] = 1
    return table


def _groups(annotations: Annotations, group_by: str | None) -> tuple[list[list[int]], list[str]]:
    """Images that must stay together, and notes on them."""
    parent = list(range(len(annotations)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    def join(members: list[int]) -> None:
        for other in members[1:]:
            parent[root(other)] = root(members[0])

    notes = []
    if group_by is not None:
        named, unmatched = _by_pattern(annotations, group_by)
        for members in named.values():
            join(members)
        notes.append(f"{len(annotations) - unmatched} images are in {len(named)} groups by name")
        if unmatched:
            notes.append(f"{unmatched} images whose names do not match {group_by!r} are each a group")
    same = _identical(annotations)
    for members in same:
        join(members)
    if same:
        count = sum(map(len, same))
        shown = ", ".join(str(annotations.file_names[i]) for i in same[0][:3])
        notes.append(f"{count} images that are there more than once stay together ({shown}{', …' * (count > 3)})")
    groups: dict[int, list[int]] = defaultdict(list)
    for i in range(len(annotations)):
        groups[root(i)].append(i)
    return list(groups.values()), notes


def _by_pattern(annotations: Annotations, pattern: str) -> tuple[dict[tuple[str, ...], list[int]], int]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"--group-by {pattern!r} is not a regular expression: {error}") from None
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, name in enumerate(annotations.file_names):
        match = compiled.search(str(name))
        if match is not None:
            groups[tuple(map(str, match.groups() or (match[0],)))].append(i)
    unmatched = len(annotations) - sum(map(len, groups.values()))
    if unmatched == len(annotations):
        raise UserError(f"--group-by {pattern!r} matches no file name; they are like {annotations.file_names[0]}")
    return groups, unmatched


def _identical(annotations: Annotations) -> list[list[int]]:
    """Images whose files have the same bytes; only files of the same size are read."""
    paths = [Path(annotations.images) / str(name) for name in annotations.file_names]
    by_size: dict[int, list[int]] = defaultdict(list)
    same: dict[bytes, list[int]] = defaultdict(list)
    for i, path in enumerate(paths):
        with open_regular_file(path, "image") as file:
            by_size[os.fstat(file.fileno()).st_size].append(i)
    for members in by_size.values():
        if len(members) > 1:
            for i in members:
                same[file_digest(paths[i], "image")].append(i)
    return [members for members in same.values() if len(members) > 1]
