"""How much AP50 is lost to each kind of mistake, by the definitions of TIDE (arXiv 2008.08115).

The kind of a false positive depends on its largest IoU with objects of its class and of others; the first that fits:

    localisation    0.1 <= IoU < 0.5 with an object of its class
    classification  IoU >= 0.5 with an object of another class
    duplicate       IoU >= 0.5 with an object of its class that a detection of higher score has found
    background      IoU < 0.1 with every object
    both            the rest: 0.1 <= IoU < 0.5 with an object of another class only

An object without a match is missed, unless a localisation or classification error is about it.
(The order is that of the authors' code.) The cost of a kind is the gain in AP50 if only its mistakes are corrected:

    localisation, classification  the best detection of those about an object counts as right, if the object was
                                  not found otherwise; the others are removed. Classification moves it to the class of
                                  the object.
    duplicate, background, both   the detections are removed
    missed                        the objects are removed
    false positives               all false positives are removed
    false negatives               all objects that are not found are removed

The costs do not add up to 1 - AP50: correcting one kind changes the costs of the others.
"""

from dataclasses import dataclass

import numpy as np

from detection.evaluation.matches import Matches, average_precision, class_aps, mean_ap, overlaps

FOREGROUND, BACKGROUND = 0.5, 0.1
KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")
OF_DETECTIONS = KINDS[:5]


@dataclass(frozen=True)
class Breakdown:
    """n detections, m objects.

    Attributes:
        ap50: before any correction, in [0, 1]; NaN where there is no object.
        costs: kind (and "false_positives", "false_negatives") -> loss of AP50.
        counts: kind (and the two others) -> how many there are.
        kind: int64 [n], place in `KINDS` of a false positive's kind; -1 for other detections.
        about: int64 [n], row of the object that the mistake is about (none for background and both: -1).
        missed: bool [m].
    """

    ap50: float
    costs: dict[str, float]
    counts: dict[str, int]
    kind: np.ndarray
    about: np.ndarray
    missed: np.ndarray


def break_down(matches: Matches) -> Breakdown:
    """Classify the mistakes at IoU 0.5 and compute the cost of each kind."""
    kind, about = _kinds(matches)
    found, counted = matches.found(0), matches.counted
    mended = np.isin(kind, [KINDS.index("classification"), KINDS.index("localisation")])
    explained = np.zeros(len(found), bool)
    explained[about[mended]] = True
    missed = counted & ~found & ~explained
    before = mean_ap(class_aps(matches, 0))
    after = {
        "classification": _claimed(matches, kind, about, "classification"),
        "localisation": _claimed(matches, kind, about, "localisation"),
        **{name: _without(matches, kind == KINDS.index(name)) for name in ("both", "duplicate", "background")},
        "missed": _unasked(matches, missed),
        "false_positives": _without(matches, matches.wrong(0)),
        "false_negatives": _unasked(matches, counted & ~found),
    }
    counts = {name: int((kind == i).sum()) for i, name in enumerate(OF_DETECTIONS)}
    counts |= {
        "missed": int(missed.sum()),
        "false_positives": int(matches.wrong(0).sum()),
        "false_negatives": int((counted & ~found).sum()),
    }
    return Breakdown(before, {name: ap - before for name, ap in after.items()}, counts, kind, about, missed)


def _kinds(matches: Matches) -> tuple[np.ndarray, np.ndarray]:
    """Kind and object of each false positive."""
    kind, about = np.full(len(matches), -1), np.full(len(matches), -1)
    wrong, labels = matches.wrong(0), matches.annotations.labels
    for rows, objects, iou in overlaps(matches):
        of_wrong = wrong[rows]
        rows, iou = rows[of_wrong], iou[of_wrong]
        if not len(objects):
            kind[rows] = KINDS.index("background")
            continue
        same = matches.label[rows][:, None] == labels[objects][None, :]
        own, other = np.where(same, iou, -1.0), np.where(same, -1.0, iou)
        best_own, best_other = own.max(axis=1), other.max(axis=1)
        its_own, its_other = objects[own.argmax(axis=1)], objects[other.argmax(axis=1)]
        cases = [
            ("localisation", (best_own >= BACKGROUND) & (best_own < FOREGROUND), its_own),
            ("classification", best_other >= FOREGROUND, its_other),
            ("duplicate", best_own >= FOREGROUND, its_own),
            ("background", np.maximum(best_own, best_other) < BACKGROUND, None),
            ("both", np.ones(len(rows), bool), None),
        ]
        left = np.ones(len(rows), bool)
        for name, fits, its in cases:
            here = left & fits
            kind[rows[here]] = KINDS.index(name)
            if its is not None:
                about[rows[here]] = its[here]
            left &= ~fits
    return kind, about


def _claimed(matches: Matches, kind: np.ndarray, about: np.ndarray, name: str) -> float:
    """AP50 where the best detection with this mistake about each object that was not found is right, the rest gone."""
    these = np.flatnonzero(kind == KINDS.index(name))
    these = these[~matches.found(0)[about[these]]]
    # By falling score; the first one of each object is corrected.
    these = these[np.argsort(-matches.score[these], kind="stable")]
    _, first = np.unique(about[these], return_index=True)
    mended = these[first]
    label, right = matches.label.copy(), matches.right(0)
    label[mended] = matches.annotations.labels[about[mended]]
    right[mended] = True
    wrong = matches.wrong(0) & (kind != KINDS.index(name))
    return _ap50(matches, label, right, wrong, _objects(matches, matches.counted))


def _without(matches: Matches, gone: np.ndarray) -> float:
    return _ap50(matches, matches.label, matches.right(0), matches.wrong(0) & ~gone, _objects(matches, matches.counted))


def _unasked(matches: Matches, unasked: np.ndarray) -> float:
    objects = _objects(matches, matches.counted & ~unasked)
    return _ap50(matches, matches.label, matches.right(0), matches.wrong(0), objects)


def _objects(matches: Matches, counted: np.ndarray) -> np.ndarray:
    return np.bincount(matches.annotations.labels[counted], minlength=len(matches.offsets))[1:]


def _ap50(matches: Matches, label: np.ndarray, right: np.ndarray, wrong: np.ndarray, objects: np.ndarray) -> float:
    """Mean over the classes that have objects in the data."""
    order = np.lexsort((np.arange(len(label)), -matches.score, label))
    bounds = np.searchsorted(label[order], np.arange(1, len(objects) + 2))
    aps = []
    for k in np.flatnonzero(_objects(matches, matches.counted)):
        rows = order[bounds[k] : bounds[k + 1]]
        if objects[k]:
            aps.append(average_precision(right[rows], wrong[rows], objects[k])[0])
        else:
            # No object is left: AP is 1 if no detection is left either.
            aps.append(0.0 if wrong[rows].any() else 1.0)
    return float(np.mean(aps)) if aps else float("nan")
