"""Near-duplicates among many images, compared with the result of comparing all pairs."""

import os

import cv2
import numpy as np
import pytest

from detection.doctor.near_duplicates import (
    MAX_HAMMING_DISTANCE,
    MIN_CORRELATION,
    difference_hash,
    find_near_duplicates,
)


def thumbnails_of(images):
    return np.stack(
        [cv2.resize(cv2.cvtColor(p, cv2.COLOR_BGR2GRAY), (17, 16), interpolation=cv2.INTER_AREA) for p in images]
    )


def near_duplicates_in(thumbnails, decoded=None, sets=None, files=None):
    count = len(thumbnails)
    within, across = find_near_duplicates(
        thumbnails,
        np.ones(count, bool) if decoded is None else decoded,
        np.zeros(count, np.int64) if sets is None else np.array(sets),
        np.full(count, -1) if files is None else np.array(files),
    )
    return within.tolist(), across.tolist()


def groups_of(pairs, count):
    """Label connected rows by merging the labels of each pair."""
    label = list(range(count))
    for left, right in pairs:
        low, high = sorted((label[left], label[right]))
        label = [low if one == high else one for one in label]
    return label


def test_near_duplicates_among_many_images():
    rng = np.random.default_rng(0)
    images = [
        cv2.resize(rng.integers(0, 255, (5, 7, 3), np.uint8), (128, 96), interpolation=cv2.INTER_CUBIC)
        for _ in range(600)
    ]
    small = cv2.resize(images[5], (60, 45), interpolation=cv2.INTER_AREA)
    _, data = cv2.imencode(".jpg", images[9], [cv2.IMWRITE_JPEG_QUALITY, 40])
    bright = np.clip(images[20] * 0.9 + 12, 0, 255).astype(np.uint8)
    extra = [small, cv2.imdecode(data, cv2.IMREAD_COLOR), bright, images[30][:, ::-1]]
    thumbnails = thumbnails_of(images + extra)
    assert near_duplicates_in(thumbnails) == ([[5, 600], [9, 601], [20, 602]], [])
    assert near_duplicates_in(thumbnails, sets=[0] * 601 + [1] * 3) == ([[5, 600]], [[9, 601], [20, 602]])
    decoded = np.ones(len(thumbnails), bool)
    decoded[600] = False
    assert near_duplicates_in(thumbnails, decoded) == ([[9, 601], [20, 602]], [])
    # Images of a single color are not near-duplicates.
    assert near_duplicates_in(np.full((300, 16, 17), 90, np.uint8)) == ([], [])
    assert near_duplicates_in(thumbnails[:0]) == ([], [])


@pytest.mark.parametrize("seed", range(5))
def test_groups_match_a_comparison_of_all_pairs(seed):
    """Versions of images with increasing noise in two sets, some of them identical files."""
    rng = np.random.default_rng(seed)
    scenes = thumbnails_of([cv2.resize(rng.integers(0, 255, (5, 7, 3), np.uint8), (64, 48)) for _ in range(12)])
    thumbnails = scenes[rng.integers(0, 12, 150)].astype(float)
    thumbnails = np.clip(
        thumbnails + rng.normal(0, 1, thumbnails.shape) * rng.integers(0, 8, (150, 1, 1)), 0, 255
    ).astype(np.uint8)
    sets = np.repeat([0, 1], [100, 50])
    files = np.full(150, -1)
    copies = [rng.choice(150, 4, replace=False) for _ in range(6)]
    for number, rows in enumerate(copies):
        thumbnails[rows], files[rows] = thumbnails[rows[0]], number
    hashes = difference_hash(thumbnails)
    bits = np.unpackbits(hashes, axis=1).astype(int)
    bands = hashes.reshape(150, 16, 2)
    share = (bands[:, None] == bands[None]).all(axis=3).any(axis=2)
    flat = thumbnails.reshape(150, -1).astype(float)
    close = (
        (np.abs(bits[:, None] - bits[None]).sum(axis=2) <= MAX_HAMMING_DISTANCE)
        & (np.corrcoef(flat) >= MIN_CORRELATION)
        & share
    )
    same = (files[:, None] == files[None]) & (files >= 0)
    alike = [(i, j) for i, j in zip(*np.nonzero(np.triu(close, 1)), strict=True) if not same[i, j]]
    copied = [(i, j) for i, j in zip(*np.nonzero(np.triu(same, 1)), strict=True) if sets[i] == sets[j]]

    within, across = find_near_duplicates(thumbnails, np.ones(150, bool), sets, files)
    inside = [(i, j) for i, j in alike if sets[i] == sets[j]]
    assert len(inside) > 50 and {tuple(pair) for pair in within.tolist()} <= set(inside)
    assert groups_of([*within.tolist(), *copied], 150) == groups_of([*inside, *copied], 150)
    # One partner for each val image that has any, unless train has the identical file.
    assert {tuple(pair) for pair in across.tolist()} <= set(alike)
    leaked = {j for i, j in alike if sets[i] != sets[j]} - {j for j in range(100, 150) if same[:100, j].any()}
    assert len(leaked) > 10 and sorted(across[:, 1].tolist()) == sorted(leaked)


def test_many_near_duplicates_give_few_pairs():
    """All pairs of the frames of one video would not fit into memory."""
    rng = np.random.default_rng(0)
    scenes = thumbnails_of([cv2.resize(rng.integers(0, 255, (5, 7, 3), np.uint8), (64, 48)) for _ in range(3)])
    thumbnails = np.repeat(scenes, 2000, axis=0)
    thumbnails[:, 0, 0] = rng.integers(0, 255, len(thumbnails))
    within, across = find_near_duplicates(
        thumbnails, np.ones(6000, bool), np.repeat([0, 1], [4000, 2000]), np.full(6000, -1)
    )
    assert len(within) < 4 * 6000 and len(across) == 0
    assert np.unique(groups_of(within.tolist(), 6000)).tolist() == [0, 2000, 4000]


@pytest.mark.slow
def test_a_hundred_thousand_images():
    rng = np.random.default_rng(0)
    thumbnails = rng.integers(0, 255, (100_000, 16, 17), dtype=np.uint8)
    # Half of the images share a plain sky, and with it some bits of their hashes.
    thumbnails[::2, :8] = 200
    thumbnails[70_001] = thumbnails[11]
    start = os.times()
    assert near_duplicates_in(thumbnails) == ([[11, 70_001]], [])
    assert os.times().user - start.user < 90
