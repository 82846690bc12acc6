"""ImageProbe-alikes among many images, against a comparison of each with each."""

import os

import cv2
import numpy as np
import pytest

from detection.doctor.near_duplicates import CORRELATION, DISTANCE, difference_hash, find_near_duplicates


def thumbs_of(images):
    return np.stack(
        [cv2.resize(cv2.cvtColor(p, cv2.COLOR_BGR2GRAY), (17, 16), interpolation=cv2.INTER_AREA) for p in images]
    )


def found_in(thumbs, usable=None, sets=None, files=None):
    count = len(thumbs)
    own, across = find_near_duplicates(
        thumbs,
        np.ones(count, bool) if usable is None else usable,
        np.zeros(count, np.int64) if sets is None else np.array(sets),
        np.full(count, -1) if files is None else np.array(files),
    )
    return own.tolist(), across.tolist()


def groups_of(pairs, count):
    """Which rows hang together, by going from neighbour to neighbour."""
    label = list(range(count))
    for left, right in pairs:
        low, high = sorted((label[left], label[right]))
        label = [low if one == high else one for one in label]
    return label


def test_look_alikes_among_many():
    rng = np.random.default_rng(0)
    images = [
        cv2.resize(rng.integers(0, 255, (5, 7, 3), np.uint8), (128, 96), interpolation=cv2.INTER_CUBIC)
        for _ in range(600)
    ]
    small = cv2.resize(images[5], (60, 45), interpolation=cv2.INTER_AREA)
    _, data = cv2.imencode(".jpg", images[9], [cv2.IMWRITE_JPEG_QUALITY, 40])
    bright = np.clip(images[20] * 0.9 + 12, 0, 255).astype(np.uint8)
    extra = [small, cv2.imdecode(data, cv2.IMREAD_COLOR), bright, images[30][:, ::-1]]
    thumbs = thumbs_of(images + extra)
    assert found_in(thumbs) == ([[5, 600], [9, 601], [20, 602]], [])
    assert found_in(thumbs, sets=[0] * 601 + [1] * 3) == ([[5, 600]], [[9, 601], [20, 602]])
    usable = np.ones(len(thumbs), bool)
    usable[600] = False
    assert found_in(thumbs, usable) == ([[9, 601], [20, 602]], [])
    # Plain ones, all alike, are none.
    assert found_in(np.full((300, 16, 17), 90, np.uint8)) == ([], [])
    assert found_in(thumbs[:0]) == ([], [])


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_those_of_comparing_each_with_each(seed):
    """Images in several versions that are ever less alike, over two sets, some of them one file."""
    rng = np.random.default_rng(seed)
    scenes = thumbs_of([cv2.resize(rng.integers(0, 255, (5, 7, 3), np.uint8), (64, 48)) for _ in range(12)])
    thumbs = scenes[rng.integers(0, 12, 150)].astype(float)
    thumbs = np.clip(thumbs + rng.normal(0, 1, thumbs.shape) * rng.integers(0, 8, (150, 1, 1)), 0, 255).astype(np.uint8)
    sets = np.repeat([0, 1], [100, 50])
    files = np.full(150, -1)
    copies = [rng.choice(150, 4, replace=False) for _ in range(6)]
    for number, rows in enumerate(copies):
        thumbs[rows], files[rows] = thumbs[rows[0]], number
    hashes = difference_hash(thumbs)
    bits = np.unpackbits(hashes, axis=1).astype(int)
    bands = hashes.reshape(150, 16, 2)
    share = (bands[:, None] == bands[None]).all(axis=3).any(axis=2)
    flat = thumbs.reshape(150, -1).astype(float)
    close = (np.abs(bits[:, None] - bits[None]).sum(axis=2) <= DISTANCE) & (np.corrcoef(flat) >= CORRELATION) & share
    same = (files[:, None] == files[None]) & (files >= 0)
    alike = [(i, j) for i, j in zip(*np.nonzero(np.triu(close, 1)), strict=True) if not same[i, j]]
    copied = [(i, j) for i, j in zip(*np.nonzero(np.triu(same, 1)), strict=True) if sets[i] == sets[j]]

    own, across = find_near_duplicates(thumbs, np.ones(150, bool), sets, files)
    inside = [(i, j) for i, j in alike if sets[i] == sets[j]]
    assert len(inside) > 50 and {tuple(pair) for pair in own.tolist()} <= set(inside)
    assert groups_of([*own.tolist(), *copied], 150) == groups_of([*inside, *copied], 150)
    # One partner for each image of val that has any, unless train has the file itself.
    assert {tuple(pair) for pair in across.tolist()} <= set(alike)
    leaked = {j for i, j in alike if sets[i] != sets[j]} - {j for j in range(100, 150) if same[:100, j].any()}
    assert len(leaked) > 10 and sorted(across[:, 1].tolist()) == sorted(leaked)


def test_copies_without_end_are_no_pairs_without_end():
    """A set of one video's frames: each looks like hundreds of others, and the pairs would not fit into memory."""
    rng = np.random.default_rng(0)
    scenes = thumbs_of([cv2.resize(rng.integers(0, 255, (5, 7, 3), np.uint8), (64, 48)) for _ in range(3)])
    thumbs = np.repeat(scenes, 2000, axis=0)
    thumbs[:, 0, 0] = rng.integers(0, 255, len(thumbs))
    own, across = find_near_duplicates(thumbs, np.ones(6000, bool), np.repeat([0, 1], [4000, 2000]), np.full(6000, -1))
    assert len(own) < 4 * 6000 and len(across) == 0
    assert np.unique(groups_of(own.tolist(), 6000)).tolist() == [0, 2000, 4000]


@pytest.mark.slow
def test_a_hundred_thousand_images_are_compared_in_seconds():
    rng = np.random.default_rng(0)
    thumbs = rng.integers(0, 255, (100_000, 16, 17), dtype=np.uint8)
    # Half of them have a plain sky: some bits of theirs are the same.
    thumbs[::2, :8] = 200
    thumbs[70_001] = thumbs[11]
    start = os.times()
    assert found_in(thumbs) == ([[11, 70_001]], [])
    assert os.times().user - start.user < 90
