"""The same picture twice, by its bytes or by its looks."""

from collections.abc import Iterator, Sequence

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from detection.doctor.entries import Entries
from detection.doctor.findings import Example, Finding, finding
from detection.doctor.pictures import Looks

BANDS = 16
"""Of 16 bits each. Pictures that share no band are not compared: with a hash of 256 bits, those that differ in fewer
than 16 of them are sure to share one."""
DISTANCE = 24
"""Bits of 256 in which hashes of the same picture, saved anew or smaller, may differ."""
CORRELATION = 0.985
MOST_IN_BUCKET = 300
FLAT = 6.0
"""Standard deviation of a thumbnail under which its gradients are chance."""


def difference_hash(thumbs: np.ndarray) -> np.ndarray:
    """uint8 [n, 16, 17] -> uint8 [n, 32]: of each pixel whether its right neighbour is brighter (dHash, 256 bits).

    Bits of a band lie all over the picture, so that a plain sky does not make many of them alike.
    """
    bits = (thumbs[:, :, 1:] > thumbs[:, :, :-1]).reshape(len(thumbs), thumbs.shape[1] * (thumbs.shape[2] - 1))
    order = np.random.default_rng(0).permutation(bits.shape[1])
    return np.packbits(bits[:, order], axis=1)


def alike(thumbs: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """int64 [p, 2]: rows of pictures that look the same, first below second. Not quadratic (banded hashes).

    Args:
        thumbs: uint8 [n, 16, 17].
        usable: bool [n]; False where nothing was decoded. Pictures without any structure are left out as well.
    """
    values = thumbs.reshape(len(thumbs), thumbs.shape[1] * thumbs.shape[2]).astype(np.float32)
    rows = np.flatnonzero(usable & (values.std(axis=1) > FLAT)) if len(values) else np.zeros(0, np.int64)
    hashes = difference_hash(thumbs[rows])
    words = np.ascontiguousarray(hashes).view(np.uint64)
    bands = words.view(np.uint16)
    pairs = [np.zeros((0, 2), np.int64)]
    for band in range(BANDS):
        for left, right in _same_key(bands[:, band]):
            close = _differing_bits(words[left] ^ words[right]) <= DISTANCE
            pairs.append(np.stack([left[close], right[close]], axis=1))
    candidates = np.unique(np.concatenate(pairs), axis=0)
    if not len(candidates):
        return candidates
    # A hash knows gradients alone. Pictures that are the same go up and down together.
    unit = values[rows] - values[rows].mean(axis=1, keepdims=True)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    correlation = np.einsum("pk,pk->p", unit[candidates[:, 0]], unit[candidates[:, 1]])
    return rows[candidates[correlation >= CORRELATION]]


def _same_key(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of rows with equal keys, left below right, in large arrays."""
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(keys[order].astype(np.int64)) != 0]))
    sizes = np.diff(np.concatenate([starts, [len(keys)]]))
    for size in np.unique(sizes[sizes > 1]).tolist():
        # The sort is stable: rows of a bucket are in order. All buckets of a size at once.
        groups = order[starts[sizes == size][:, None] + np.arange(size)]
        # A bucket that large is a kind of picture (white ground, say), not one picture: neighbours in the file alone.
        for step in range(1, min(size, MOST_IN_BUCKET)):
            yield groups[:, :-step].reshape(-1), groups[:, step:].reshape(-1)


def _differing_bits(words: np.ndarray) -> np.ndarray:
    """uint64 [p, w] -> how many bits are set in each row."""
    if hasattr(np, "bitwise_count"):  # NumPy 2
        return np.bitwise_count(words).sum(axis=1, dtype=np.int64)
    ones = np.array([bin(value).count("1") for value in range(256)], np.uint8)
    return ones[words.view(np.uint8)].sum(axis=1, dtype=np.int64)


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


def check_duplicates(raws: Sequence[Entries], seen: Sequence[Looks]) -> list[Finding]:
    """The same picture twice in a set, and in both of two sets (train first)."""
    together = Looks(
        [one for looks in seen for one in looks.looks],
        np.concatenate([looks.thumbs for looks in seen]),
        0.0,
        all(looks.decoded for looks in seen),
    )
    names = np.concatenate([raw.file_names for raw in raws])
    ids = np.concatenate([raw.image_ids for raw in raws])
    paths = [str(raw.path(row)) for raw in raws for row in range(len(raw.file_names))]
    owner = np.repeat(np.arange(len(raws)), [len(raw.file_names) for raw in raws])
    same = _edges(same_files(together, paths))
    similar = alike(together.thumbs, np.array([one.status == "ok" for one in together.looks], bool))
    similar = similar[~_in(similar, same)] if len(same) else similar
    found = []

    def example(pair: np.ndarray) -> Example:
        first, second = pair.tolist()
        return Example(str(names[second]), int(ids[second]), text=f"and {names[first]}", other=str(names[first]))

    for number, raw in enumerate(raws):
        for code, edges in (("picture-twice", same), ("picture-alike", similar)):
            own = edges[(owner[edges] == number).all(axis=1)]
            # An image that is listed twice is one file.
            own = own[[paths[a] != paths[b] for a, b in own.tolist()]] if len(own) else own
            if len(own):
                groups = _groups(own, len(names))
                count = int(sum(len(group) - 1 for group in groups))
                firsts = [example(np.array([group[0], group[1]])) for group in groups]
                detail = f"{len(groups)} groups" if count > len(groups) else ""
                found.append(finding(code, raw.split, count, firsts, detail=detail, total=len(raw.file_names)))
    if len(raws) == 2:
        for code, edges in (("leak-same", same), ("leak-alike", similar)):
            across = edges[owner[edges[:, 0]] != owner[edges[:, 1]]]
            if len(across):
                # The first partner of each picture of val; rows of train come first.
                partner = {second: first for first, second in sorted(across.tolist(), reverse=True)}
                examples = [example(np.array([first, second])) for second, first in sorted(partner.items())]
                total = len(raws[1].file_names)
                found.append(finding(code, "train and val", len(partner), examples, total=total))
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


def _groups(edges: np.ndarray, count: int) -> list[list[int]]:
    """Rows that hang together by edges, each group ascending."""
    graph = coo_matrix((np.ones(len(edges), bool), (edges[:, 0], edges[:, 1])), shape=(count, count))
    _, label = connected_components(graph, directed=False)
    members = np.unique(edges)
    members = members[np.argsort(label[members], kind="stable")]
    return [part.tolist() for part in np.split(members, np.flatnonzero(np.diff(label[members])) + 1)]


def _in(pairs: np.ndarray, known: np.ndarray) -> np.ndarray:
    """bool [p]: which pairs are among the known ones."""
    top = int(max(pairs.max(initial=0), known.max(initial=0))) + 1
    return np.isin(pairs[:, 0] * top + pairs[:, 1], known[:, 0] * top + known[:, 1])
