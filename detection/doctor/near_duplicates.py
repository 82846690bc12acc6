"""Images that look the same, among many: perceptual hashes that are compared where a part of them is equal."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

BANDS = 16
"""Of 16 bits each. Images that share no band are not compared: with a hash of 256 bits, those that differ in fewer
than 16 of them are sure to share one."""
DISTANCE = 24
"""Bits of 256 in which hashes of the same image, saved anew or smaller, may differ."""
CORRELATION = 0.985
MOST_IN_BUCKET = 300
FLAT = 6.0
"""Standard deviation of a thumbnail under which its gradients are chance."""


class NearDuplicates(NamedTuple):
    """Rows of images that look the same, the lower row first.

    `own`, int64 [p, 2]: pairs inside a set that hold its groups together – of the frames of a video not each with each,
    which would be too many. `across`, int64 [q, 2]: for each image of a later set at most one of an earlier set.
    """

    own: np.ndarray
    across: np.ndarray


def difference_hash(thumbs: np.ndarray) -> np.ndarray:
    """uint8 [n, 16, 17] -> uint8 [n, 32]: of each pixel whether its right neighbour is brighter (dHash, 256 bits).

    Bits of a band lie all over the image, so that a plain sky does not make many of them alike.
    """
    bits = (thumbs[:, :, 1:] > thumbs[:, :, :-1]).reshape(len(thumbs), thumbs.shape[1] * (thumbs.shape[2] - 1))
    order = np.random.default_rng(0).permutation(bits.shape[1])
    return np.packbits(bits[:, order], axis=1)


def find_near_duplicates(thumbs: np.ndarray, usable: np.ndarray, sets: np.ndarray, files: np.ndarray) -> NearDuplicates:
    """Images that look the same and are different files. Not quadratic (banded hashes).

    Args:
        thumbs: uint8 [n, 16, 17].
        usable: bool [n]; False where nothing was decoded. Images without any structure are left out as well.
        sets: int64 [n], ascending: which set an image is of.
        files: int64 [n]: number of the group of equal files an image is in; -1 for one by itself. What is one file
            is known to be the same already, and not told again.
    """
    values = thumbs.reshape(len(thumbs), thumbs.shape[1] * thumbs.shape[2]).astype(np.float32)
    rows = np.flatnonzero(usable & (values.std(axis=1) > FLAT)) if len(values) else np.zeros(0, np.int64)
    bands = np.ascontiguousarray(difference_hash(thumbs[rows])).view(np.uint16)
    words = bands.view(np.uint64)
    # A hash knows gradients alone. Images that are the same go up and down together.
    unit = values[rows] - values[rows].mean(axis=1, keepdims=True)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    sets, files = sets[rows], files[rows]
    group = _known_groups(sets, files)
    has_partner = _in_earlier_set(sets, files)
    own, across = [np.zeros((0, 2), np.int64)], [np.zeros((0, 2), np.int64)]
    for band in range(BANDS):
        for left, right in _same_key(bands[:, band]):
            inside = sets[left] == sets[right]
            new = np.where(inside, group[left] != group[right], ~has_partner[right])
            left, right, inside = left[new], right[new], inside[new]
            close = _differing_bits(words[left] ^ words[right]) <= DISTANCE
            left, right, inside = left[close], right[close], inside[close]
            same = np.einsum("pk,pk->p", unit[left], unit[right]) >= CORRELATION
            left, right, inside = left[same], right[same], inside[same]
            if len(left):
                own.append(np.stack([left[inside], right[inside]], axis=1))
                group = _joined(group, left[inside], right[inside])
                partners, first = np.unique(right[~inside], return_index=True)
                across.append(np.stack([left[~inside][first], partners], axis=1))
                has_partner[partners] = True
    return NearDuplicates(rows[_in_order(np.concatenate(own))], rows[_in_order(np.concatenate(across))])


def _known_groups(sets: np.ndarray, files: np.ndarray) -> np.ndarray:
    """int64 [n]: a number for each set's copies of a file, and one for each other image."""
    alone = np.arange(len(files)) + files.max(initial=0) + 1
    _, numbers = np.unique(np.stack([sets, np.where(files < 0, alone, files)]), axis=1, return_inverse=True)
    return numbers.reshape(-1)


def _in_earlier_set(sets: np.ndarray, files: np.ndarray) -> np.ndarray:
    """bool [n]: whether a copy of the file is in a set before."""
    first = np.full(files.max(initial=-1) + 2, np.iinfo(np.int64).max)
    np.minimum.at(first, files, sets)
    return (files >= 0) & (first[files] < sets)


def _joined(group: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The groups' numbers after each left image's was joined with its right one's."""
    names, part = parts_of(np.stack([group[left], group[right]], axis=1))
    # Of each part the first name.
    _, first = np.unique(part, return_index=True)
    renamed = np.arange(group.max(initial=0) + 1)
    renamed[names] = names[first[part]]
    return renamed[group]


def parts_of(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What hangs together by pairs [p, 2]: the numbers in them [n], ascending, and of each which part it is in."""
    names, ends = np.unique(pairs.T.reshape(-1), return_inverse=True)
    graph = coo_matrix((np.ones(len(pairs), bool), tuple(ends.reshape(2, -1))), shape=(len(names), len(names)))
    return names, connected_components(graph, directed=False)[1]


def _in_order(pairs: np.ndarray) -> np.ndarray:
    return pairs[np.lexsort(pairs.T[::-1])]


def _same_key(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of rows with equal keys, left below right, in large arrays."""
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(keys[order].astype(np.int64)) != 0]))
    sizes = np.diff(np.concatenate([starts, [len(keys)]]))
    for size in np.unique(sizes[sizes > 1]).tolist():
        # The sort is stable: rows of a bucket are in order. All buckets of a size at once.
        groups = order[starts[sizes == size][:, None] + np.arange(size)]
        # A bucket that large is a kind of image (white ground, say), not one image: neighbours in the file alone.
        for step in range(1, min(size, MOST_IN_BUCKET)):
            yield groups[:, :-step].reshape(-1), groups[:, step:].reshape(-1)


def _differing_bits(words: np.ndarray) -> np.ndarray:
    """uint64 [p, w] -> how many bits are set in each row."""
    if hasattr(np, "bitwise_count"):  # NumPy 2
        return np.bitwise_count(words).sum(axis=1, dtype=np.int64)
    ones = np.array([bin(value).count("1") for value in range(256)], np.uint8)
    return ones[words.view(np.uint8)].sum(axis=1, dtype=np.int64)
