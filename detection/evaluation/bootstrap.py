"""The bootstrap: is one set of detections better than another, or is the difference due to the choice of images?

Images are drawn again and again, with replacement, as many as there are; both sets are scored on the same draws.
Nothing is matched again: the matches of an image are counted as often as the image was drawn.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from detection.core.errors import UserError
from detection.evaluation.matches import Matches, average_precision

LEVEL = 0.95
CHUNK = 20_000_000
"""Elements of an intermediate array; resamples of a large set are computed in parts."""


@dataclass(frozen=True)
class Difference:
    """Second minus first, with the interval that holds `LEVEL` of the resampled differences; NaN where undefined.

    The interval is the percentile interval of the bootstrap (Efron and Tibshirani 1993, chapter 13).
    """

    name: str
    first: float
    second: float
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.second - self.first

    @property
    def clear(self) -> bool:
        """Whether zero is outside of the interval."""
        return self.low > 0 or self.high < 0


def compare(
    first: Matches,
    second: Matches,
    *,
    resamples: int = 500,
    seed: int = 0,
    progress: Callable[[int], object] = lambda done: None,
) -> list[Difference]:
    """AP, AP50, AP75 and each class's AP of two sets of detections of the same images.

    Args:
        progress: called after each class.

    Raises:
        UserError: the two sets are of different images or objects.
    """
    check_same(first, second)
    images = len(first.annotations)
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(images, np.full(images, 1 / images), size=resamples)
    # The first row is the data as they are.
    draws = np.concatenate([np.ones((1, images), draws.dtype), draws])
    names = first.annotations.class_names
    # [run, class, threshold, resample]
    aps = np.empty((2, len(names), len(first.thresholds), len(draws)))
    for run, matches in enumerate((first, second)):
        for k in range(len(names)):
            aps[run, k] = resampled_aps(matches, k + 1, draws)
            progress(1)
    thresholds = first.thresholds.round(2).tolist()
    measures = {
        "AP": _mean(aps.mean(axis=2)),
        "AP50": _mean(aps[:, :, thresholds.index(0.5)]),
        "AP75": _mean(aps[:, :, thresholds.index(0.75)]),
    }
    measures |= {f"AP of {name}": aps[:, k].mean(axis=1) for k, name in enumerate(names)}
    return [_difference(name, values) for name, values in measures.items()]


def resampled_aps(matches: Matches, label: int, draws: np.ndarray) -> np.ndarray:
    """AP of a class: float64 [thresholds, resamples].

    draws: int [resamples, images], how often each image counts.
    """
    rows = matches.rows(label)
    image = matches.image[rows]
    of_class = matches.counted & (matches.annotations.labels == label)
    objects = draws @ np.bincount(matches.image_of_object[of_class], minlength=len(matches.annotations))
    # Detections after the last hit at any threshold change nothing.
    hits = np.flatnonzero((matches.truth[:, rows] >= 0).any(axis=0))
    end = int(hits[-1]) + 1 if len(hits) else 0
    aps = np.empty((len(matches.thresholds), len(draws)))
    step = max(1, CHUNK // max(end, 1))
    for start in range(0, len(draws), step):
        part = slice(start, start + step)
        weight = draws[part][:, image[:end]].astype(np.float64)
        for t in range(len(matches.thresholds)):
            right, wrong = matches.right(t)[rows][:end], matches.wrong(t)[rows][:end]
            aps[t, part] = average_precision(right, wrong, objects[part], weight)
    return aps


def check_same(first: Matches, second: Matches) -> None:
    """Raises UserError if the two are not of the same images and objects."""
    a, b = first.annotations, second.annotations
    same = (
        a.class_names == b.class_names
        and np.array_equal(a.image_ids, b.image_ids)
        and np.array_equal(a.labels, b.labels)
        and np.array_equal(a.boxes, b.boxes)
        and np.array_equal(a.crowd, b.crowd)
    )
    if not same:
        raise UserError(
            f"the two runs were evaluated on different data ({a.source}: {len(a)} images, {len(a.boxes)} objects; "
            f"{b.source}: {len(b)} images, {len(b.boxes)} objects): give --data and --images to score both on one set"
        )


def _mean(values: np.ndarray) -> np.ndarray:
    """Over the classes (axis 1) that have objects in a draw."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0.0).sum(axis=1) / known.sum(axis=1)


def _difference(name: str, values: np.ndarray) -> Difference:
    """values [run, 1 + resamples]"""
    change = values[1, 1:] - values[0, 1:]
    change = change[~np.isnan(change)]
    low, high = np.percentile(change, [50 * (1 - LEVEL), 50 * (1 + LEVEL)]) if change.size else (np.nan, np.nan)
    return Difference(name, float(values[0, 0]), float(values[1, 0]), float(low), float(high))
