"""Check for duplicate images, exact and near, within a split and between train and val."""

from collections.abc import Sequence

import numpy as np

from detection.doctor.entries import Entries
from detection.doctor.findings import Example, Finding, make_finding
from detection.doctor.image_checks import ProbedImages
from detection.doctor.near_duplicates import connected_groups, find_near_duplicates


def group_identical_files(images: ProbedImages, paths: Sequence[str]) -> np.ndarray:
    """int64 [n]: the group of files with equal bytes (equal paths, if they were not read); -1 for unique files."""
    groups: dict[bytes | str, list[int]] = {}
    for row, probe in enumerate(images.probes):
        if probe.digest or (probe.status == "unprobed" and paths[row] != "None"):
            groups.setdefault(probe.digest or paths[row], []).append(row)
    result = np.full(len(images.probes), -1, np.int64)
    for number, rows in enumerate(rows for rows in groups.values() if len(rows) > 1):
        result[rows] = number
    return result


def check_duplicates(sets: Sequence[Entries], images: Sequence[ProbedImages]) -> list[Finding]:
    """Find duplicate images within each set; with sets of train (first) and of val also between the two."""
    combined = ProbedImages(
        [probe for one_set in images for probe in one_set.probes],
        np.concatenate([one_set.thumbnails for one_set in images]),
        0.0,
        all(one_set.decoded for one_set in images),
    )
    names = np.concatenate([entries.file_names for entries in sets])
    ids = np.concatenate([entries.image_ids for entries in sets])
    paths = [str(entries.path(row)) for entries in sets for row in range(len(entries.file_names))]
    set_of_row = np.repeat(np.arange(len(sets)), [len(entries.file_names) for entries in sets])
    file_groups = group_identical_files(combined, paths)
    identical = _pairs_of_groups(file_groups)
    decoded = np.array([probe.status == "ok" for probe in combined.probes], bool)
    near = find_near_duplicates(combined.thumbnails, decoded, set_of_row, file_groups)
    is_val = np.array([entries.role == "val" for entries in sets])[set_of_row]
    near_across = near.across_sets
    if len(sets) > 2:
        roles = is_val.astype(np.int64)
        near_across = find_near_duplicates(combined.thumbnails, decoded, roles, file_groups).across_sets
    findings = []

    def example(pair: np.ndarray) -> Example:
        first, second = pair.tolist()
        return Example(str(names[second]), int(ids[second]), text=f"and {names[first]}", other=str(names[first]))

    for number, entries in enumerate(sets):
        for code, pairs in (("image-twice", identical), ("image-alike", near.within_sets)):
            within = pairs[(set_of_row[pairs] == number).all(axis=1)]
            # An image listed twice is one file, not a copy.
            within = within[[paths[a] != paths[b] for a, b in within.tolist()]] if len(within) else within
            if len(within):
                groups = _rows_of_groups(within)
                count = int(sum(len(group) - 1 for group in groups))
                examples = [example(np.array([group[0], group[1]])) for group in groups]
                detail = f"{len(groups)} groups" if count > len(groups) else ""
                total = len(entries.file_names)
                findings.append(make_finding(code, entries.split, count, examples, detail=detail, total=total))
    if len(sets) > 1:
        for code, pairs in (("leak-same", identical), ("leak-alike", near_across)):
            across = pairs[is_val[pairs[:, 0]] != is_val[pairs[:, 1]]]
            if len(across):
                # The first partner of each val image; rows of train come first.
                partner = {second: first for first, second in sorted(across.tolist(), reverse=True)}
                examples = [example(np.array([first, second])) for second, first in sorted(partner.items())]
                total = int(is_val.sum())
                findings.append(make_finding(code, "train and val", len(partner), examples, total=total))
    return findings


def _pairs_of_groups(groups: np.ndarray) -> np.ndarray:
    """Group numbers [n] -> int64 [p, 2]: pairs of rows that connect each group, within and across sets.

    The rows of a group are in the order of the sets. Pairing each row with the first one connects the group; pairing
    neighbors also connects the rows of the second set with each other, and with the first set.
    """
    pairs = [np.zeros((0, 2), np.int64)]
    rows = np.flatnonzero(groups >= 0)
    rows = rows[np.argsort(groups[rows], kind="stable")]
    for members in np.split(rows, np.flatnonzero(np.diff(groups[rows])) + 1):
        if len(members) > 1:
            pairs.append(np.stack([np.full(len(members) - 1, members[0]), members[1:]], axis=1))
            pairs.append(np.stack([members[:-1], members[1:]], axis=1))
    return np.unique(np.concatenate(pairs), axis=0)


def _rows_of_groups(pairs: np.ndarray) -> list[list[int]]:
    """The rows of each connected group of pairs, ascending."""
    rows, group = connected_groups(pairs)
    order = np.argsort(group, kind="stable")
    return [members.tolist() for members in np.split(rows[order], np.flatnonzero(np.diff(group[order])) + 1)]
