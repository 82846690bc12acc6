"""Find near-duplicate images with perceptual hashes; only hashes that share a band of bits are compared (LSH)."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

NUM_BANDS = 16
"""Bands of 16 bits. Only images that share a band are compared. Two hashes of 256 bits that differ in fewer than 16
bits always share one."""
MAX_HAMMING_DISTANCE = 24
"""Of 256 bits; allows for resizing and recompression."""
MIN_CORRELATION = 0.985
"""Between the pixels of two thumbnails."""
MAX_BUCKET_SIZE = 300
MIN_STD = 6.0
"""Standard deviation of a thumbnail below which its gradients are noise."""


class NearDuplicates(NamedTuple):
    """Pairs of rows of near-duplicate images, the lower row first.

    Attributes:
        within_sets: int64 [p, 2], pairs in the same set that connect each group of near-duplicates. Not all pairs of a
            group: the frames of a video would give too many.
        across_sets: int64 [q, 2], pairs of an image in an earlier set and one in a later set; at most one pair for each
            image of the later set.
    """

    within_sets: np.ndarray
    across_sets: np.ndarray


def difference_hash(thumbnails: np.ndarray) -> np.ndarray:
    """dHash: whether the right neighbor of each pixel is brighter. uint8 [n, 16, 17] -> uint8 [n, 32] (256 bits).

    The bits are shuffled, so that the bits of a band come from all over the image and a plain sky does not make many
    bands equal.
    """
    bits = (thumbnails[:, :, 1:] > thumbnails[:, :, :-1]).reshape(
        len(thumbnails), thumbnails.shape[1] * (thumbnails.shape[2] - 1)
    )
    order = np.random.default_rng(0).permutation(bits.shape[1])
    return np.packbits(bits[:, order], axis=1)


def find_near_duplicates(
    thumbnails: np.ndarray, decoded: np.ndarray, sets: np.ndarray, file_groups: np.ndarray
) -> NearDuplicates:
    """Find near-duplicates that are different files, in less than quadratic time.

    Args:
        thumbnails: uint8 [n, 16, 17].
        decoded: bool [n]; False for images without a thumbnail. Images with little contrast are ignored as well.
        sets: int64 [n], ascending: number of the set that an image belongs to.
        file_groups: int64 [n], group of identical files of an image, or -1. Identical files are not reported.
    """
    values = thumbnails.reshape(len(thumbnails), thumbnails.shape[1] * thumbnails.shape[2]).astype(np.float32)
    rows = np.flatnonzero(decoded & (values.std(axis=1) > MIN_STD)) if len(values) else np.zeros(0, np.int64)
    bands = np.ascontiguousarray(difference_hash(thumbnails[rows])).view(np.uint16)
    words = bands.view(np.uint64)
    # The hash has gradients only. Near-duplicates also correlate in brightness.
    unit = values[rows] - values[rows].mean(axis=1, keepdims=True)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    sets, file_groups = sets[rows], file_groups[rows]
    group = _initial_groups(sets, file_groups)
    has_partner = _in_earlier_set(sets, file_groups)
    within, across = [np.zeros((0, 2), np.int64)], [np.zeros((0, 2), np.int64)]
    for band in range(NUM_BANDS):
        for left, right in _pairs_with_equal_key(bands[:, band]):
            inside = sets[left] == sets[right]
            new = np.where(inside, group[left] != group[right], ~has_partner[right])
            left, right, inside = left[new], right[new], inside[new]
            close = _count_bits(words[left] ^ words[right]) <= MAX_HAMMING_DISTANCE
            left, right, inside = left[close], right[close], inside[close]
            same = np.einsum("pk,pk->p", unit[left], unit[right]) >= MIN_CORRELATION
            left, right, inside = left[same], right[same], inside[same]
            if len(left):
                within.append(np.stack([left[inside], right[inside]], axis=1))
                group = _merge_groups(group, left[inside], right[inside])
                partners, first = np.unique(right[~inside], return_index=True)
                across.append(np.stack([left[~inside][first], partners], axis=1))
                has_partner[partners] = True
    return NearDuplicates(rows[_sort_pairs(np.concatenate(within))], rows[_sort_pairs(np.concatenate(across))])


def _initial_groups(sets: np.ndarray, file_groups: np.ndarray) -> np.ndarray:
    """int64 [n]: one group number for the identical files of each set, and one for every other image."""
    alone = np.arange(len(file_groups)) + file_groups.max(initial=0) + 1
    _, numbers = np.unique(np.stack([sets, np.where(file_groups < 0, alone, file_groups)]), axis=1, return_inverse=True)
    return numbers.reshape(-1)


def _in_earlier_set(sets: np.ndarray, file_groups: np.ndarray) -> np.ndarray:
    """bool [n]: whether an identical file is in an earlier set."""
    first = np.full(file_groups.max(initial=-1) + 2, np.iinfo(np.int64).max)
    np.minimum.at(first, file_groups, sets)
    return (file_groups >= 0) & (first[file_groups] < sets)


def _merge_groups(group: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Group numbers after merging the groups of each pair (left, right)."""
    numbers, component = connected_groups(np.stack([group[left], group[right]], axis=1))
    # Each component takes the number of its first group.
    _, first = np.unique(component, return_index=True)
    renamed = np.arange(group.max(initial=0) + 1)
    renamed[numbers] = numbers[first[component]]
    return renamed[group]


def connected_groups(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Connected components of a graph with edges `pairs` [p, 2]: its nodes [n], ascending, and their components [n]."""
    nodes, ends = np.unique(pairs.T.reshape(-1), return_inverse=True)
    graph = coo_matrix((np.ones(len(pairs), bool), tuple(ends.reshape(2, -1))), shape=(len(nodes), len(nodes)))
    return nodes, connected_components(graph, directed=False)[1]


def _sort_pairs(pairs: np.ndarray) -> np.ndarray:
    return pairs[np.lexsort(pairs.T[::-1])]


def _pairs_with_equal_key(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield pairs of rows (left < right) with equal keys, in large arrays."""
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(keys[order].astype(np.int64)) != 0]))
    sizes = np.diff(np.concatenate([starts, [len(keys)]]))
    for size in np.unique(sizes[sizes > 1]).tolist():
        # All buckets of one size at once; the stable sort keeps the rows of a bucket in order.
        groups = order[starts[sizes == size][:, None] + np.arange(size)]
        # A very large bucket holds a type of image (white background), not one image: compare close rows only.
        for step in range(1, min(size, MAX_BUCKET_SIZE)):
            yield groups[:, :-step].reshape(-1), groups[:, step:].reshape(-1)


def _count_bits(words: np.ndarray) -> np.ndarray:
    """Number of set bits in each row of uint64 [p, w]."""
    if hasattr(np, "bitwise_count"):  # NumPy 2
        return np.bitwise_count(words).sum(axis=1, dtype=np.int64)
    ones = np.array([bin(value).count("1") for value in range(256)], np.uint8)
    return ones[words.view(np.uint8)].sum(axis=1, dtype=np.int64)
