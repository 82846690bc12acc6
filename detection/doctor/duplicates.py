"""The same image twice, by its bytes or by its looks."""

from collections.abc import Sequence

import numpy as np

from detection.doctor.entries import Entries
from detection.doctor.findings import Example, Finding, make_finding
from detection.doctor.image_checks import Looks
from detection.doctor.near_duplicates import find_near_duplicates, parts_of


def same_files(looks: Looks, paths: Sequence[str]) -> np.ndarray:
    """int64 [n]: number of the group of files with equal bytes (where not read: of one path); -1 for one by itself."""
    groups: dict[bytes | str, list[int]] = {}
    for row, found in enumerate(looks.looks):
        if found.digest or (found.status == "unseen" and paths[row] != "None"):
            groups.setdefault(found.digest or paths[row], []).append(row)
    result = np.full(len(looks.looks), -1, np.int64)
    for number, rows in enumerate(rows for rows in groups.values() if len(rows) > 1):
        result[rows] = number
    return result


def check_duplicates(all_entries: Sequence[Entries], seen: Sequence[Looks]) -> list[Finding]:
    """The same image twice in a set, and in both of two sets (train first)."""
    together = Looks(
        [one for looks in seen for one in looks.looks],
        np.concatenate([looks.thumbs for looks in seen]),
        0.0,
        all(looks.decoded for looks in seen),
    )
    names = np.concatenate([entries.file_names for entries in all_entries])
    ids = np.concatenate([entries.image_ids for entries in all_entries])
    paths = [str(entries.path(row)) for entries in all_entries for row in range(len(entries.file_names))]
    owner = np.repeat(np.arange(len(all_entries)), [len(entries.file_names) for entries in all_entries])
    files = same_files(together, paths)
    same = _edges(files)
    usable = np.array([one.status == "ok" for one in together.looks], bool)
    similar = find_near_duplicates(together.thumbs, usable, owner, files)
    found = []

    def example(pair: np.ndarray) -> Example:
        first, second = pair.tolist()
        return Example(str(names[second]), int(ids[second]), text=f"and {names[first]}", other=str(names[first]))

    for number, entries in enumerate(all_entries):
        for code, edges in (("image-twice", same), ("image-alike", similar.own)):
            own = edges[(owner[edges] == number).all(axis=1)]
            # An image that is listed twice is one file.
            own = own[[paths[a] != paths[b] for a, b in own.tolist()]] if len(own) else own
            if len(own):
                groups = _groups(own)
                count = int(sum(len(group) - 1 for group in groups))
                firsts = [example(np.array([group[0], group[1]])) for group in groups]
                detail = f"{len(groups)} groups" if count > len(groups) else ""
                found.append(
                    make_finding(code, entries.split, count, firsts, detail=detail, total=len(entries.file_names))
                )
    if len(all_entries) == 2:
        for code, edges in (("leak-same", same), ("leak-alike", similar.across)):
            across = edges[owner[edges[:, 0]] != owner[edges[:, 1]]]
            if len(across):
                # The first partner of each image of val; rows of train come first.
                partner = {second: first for first, second in sorted(across.tolist(), reverse=True)}
                examples = [example(np.array([first, second])) for second, first in sorted(partner.items())]
                total = len(all_entries[1].file_names)
                found.append(make_finding(code, "train and val", len(partner), examples, total=total))
    return found


def _edges(groups: np.ndarray) -> np.ndarray:
    """Group numbers -> int64 [p, 2]: pairs that hold each group together, and each pair across its halves.

    Each member is paired with the first one, which is enough for groups; and with the first one of another set,
    rows of sets being in order, by the pairs of neighbours.
    """
    pairs = [np.zeros((0, 2), np.int64)]
    rows = np.flatnonzero(groups >= 0)
    rows = rows[np.argsort(groups[rows], kind="stable")]
    for members in np.split(rows, np.flatnonzero(np.diff(groups[rows])) + 1):
        if len(members) > 1:
            pairs.append(np.stack([np.full(len(members) - 1, members[0]), members[1:]], axis=1))
            pairs.append(np.stack([members[:-1], members[1:]], axis=1))
    return np.unique(np.concatenate(pairs), axis=0)


def _groups(edges: np.ndarray) -> list[list[int]]:
    """Rows that hang together by edges, each group ascending."""
    members, part = parts_of(edges)
    order = np.argsort(part, kind="stable")
    return [group.tolist() for group in np.split(members[order], np.flatnonzero(np.diff(part[order])) + 1)]
