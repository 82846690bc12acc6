"""Check whether the anchors and the input size of a detector fit the boxes of a dataset, and search for better ones."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from detection.config import DetectionConfig
from detection.doctor.box_checks import clip_to_image, image_sizes_of_boxes
from detection.doctor.entries import Entries
from detection.doctor.findings import Finding, make_finding

ASPECT_RATIOS = (0.5, 1.0, 2.0)
FINEST_STRIDE = {"retinanet": 8, "faster_rcnn": 4}
ANCHOR_SCALES = {"retinanet": (1.0, 2 ** (1 / 3), 2 ** (2 / 3)), "faster_rcnn": (1.0,)}
DIVISOR = 32
MATCH_IOU = 0.5
MIN_SIDE = 8.0
"""Pixels at the network input: the stride of RetinaNet's finest feature map. Boxes below it count as small."""
MAX_BOXES = 50_000
MAX_SEARCH_BOXES = 3_000
"""Boxes in the searches over anchor sizes and input sizes."""
MIN_GAIN = 0.03
"""Fraction of the boxes that other anchors must match in addition before they are proposed."""
INPUT_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)


@dataclass(frozen=True)
class AnchorConfig:
    """Anchor and input sizes of a detector; `name` is the config or file that they come from."""

    detector: str
    anchor_sizes: tuple[int, ...]
    short_side: int
    long_side: int
    name: str

    def resized(self, factor: float) -> "AnchorConfig":
        """The same anchors at another input size, rounded to multiples of 32 pixels."""
        sides = [max(DIVISOR, round(side * factor / DIVISOR) * DIVISOR) for side in (self.short_side, self.long_side)]
        return replace(self, short_side=sides[0], long_side=sides[1])


DEFAULT_ANCHOR_CONFIG = AnchorConfig("retinanet", (16, 32, 64, 128, 256), 320, 320, "configs/retina_ghost_320.yaml")


@dataclass(frozen=True)
class AnchorCoverage:
    """How well anchors cover the boxes that training uses. All shares are fractions of `boxes`.

    Attributes:
        anchor_config: the anchors and input size that were measured.
        boxes: number of measured boxes (a random sample if there are more than 50 000).
        matched: share whose best anchor reaches IoU 0.5.
        by_level: (stride, anchor size, share that the level matches, share for which it is the best level).
        small: share with a side under 8 pixels at the network input.
        better_anchors, better_matched: anchor sizes that match clearly more boxes, or None, and their `matched`.
        inputs: (short side, long side, matched, small, cost relative to `anchor_config`) at other input sizes.
        better_input: if many boxes are small, the smallest larger input size where few are; otherwise None.
    """

    anchor_config: AnchorConfig
    boxes: int
    matched: float
    by_level: list[tuple[int, int, float, float]]
    small: float
    better_anchors: tuple[int, ...] | None
    better_matched: float
    inputs: list[tuple[int, int, float, float, float]]
    better_input: tuple[int, int] | None


def anchor_config_of(config: DetectionConfig, name: str) -> AnchorConfig:
    """The anchors and input size of a config."""
    model, data = config.model, config.data
    return AnchorConfig(model.detector, tuple(model.anchor_sizes), data.short_side, data.long_side, name)


def measure_anchor_coverage(entries: Entries, anchor_config: AnchorConfig) -> AnchorCoverage | None:
    """Measure the anchors on all boxes of at least one pixel; None if there are none.

    Also searches for better anchor sizes and measures other input sizes.
    """
    sizes = image_sizes_of_boxes(entries)
    inner = clip_to_image(entries.boxes, sizes)
    with np.errstate(invalid="ignore"):
        rows = np.flatnonzero(entries.valid & ((inner[:, 2:] - inner[:, :2]) >= 1).all(axis=1))
    if not len(rows):
        return None
    if len(rows) > MAX_BOXES:
        rows = np.sort(np.random.default_rng(0).choice(rows, MAX_BOXES, replace=False))
    boxes, sizes = inner[rows], sizes[rows]
    best = best_anchor_ious(boxes, sizes, anchor_config)
    matched = float((best.max(axis=1) >= MATCH_IOU).mean())
    level = best.argmax(axis=1)
    strides = [FINEST_STRIDE[anchor_config.detector] << i for i in range(len(anchor_config.anchor_sizes))]
    by_level = [
        (stride, size, float((best[:, i] >= MATCH_IOU).mean()), float((level == i).mean()))
        for i, (stride, size) in enumerate(zip(strides, anchor_config.anchor_sizes, strict=True))
    ]
    sample = np.random.default_rng(0).permutation(len(boxes))[:MAX_SEARCH_BOXES]
    # Skip the search if no anchors could gain MIN_GAIN.
    anchors = (
        _search_anchors(boxes[sample], sizes[sample], anchor_config)
        if matched <= 1 - MIN_GAIN
        else anchor_config.anchor_sizes
    )
    better_ious = best_anchor_ious(boxes, sizes, replace(anchor_config, anchor_sizes=anchors)).max(axis=1)
    better = float((better_ious >= MATCH_IOU).mean())
    inputs = []
    for factor in INPUT_SCALES:
        other = anchor_config.resized(factor) if factor != 1 else anchor_config
        share = float((best_anchor_ious(boxes[sample], sizes[sample], other).max(axis=1) >= MATCH_IOU).mean())
        cost = other.short_side * other.long_side / (anchor_config.short_side * anchor_config.long_side)
        inputs.append((other.short_side, other.long_side, share, small_fraction(boxes, sizes, other), cost))
    small = small_fraction(boxes, sizes, anchor_config)
    larger = [entry for entry in inputs if entry[4] > 1 and (entry[3] <= 0.1 or entry is inputs[-1])]
    return AnchorCoverage(
        anchor_config=anchor_config,
        boxes=len(boxes),
        matched=matched,
        by_level=by_level,
        small=small,
        better_anchors=anchors if better >= matched + MIN_GAIN else None,
        better_matched=better,
        inputs=inputs,
        better_input=(larger[0][0], larger[0][1]) if small > 0.1 else None,
    )


def check_anchor_coverage(coverage: AnchorCoverage, split: str) -> list[Finding]:
    """Findings if more than 10 % of the boxes are unmatched or small."""
    findings = []
    missed = 1 - coverage.matched
    if missed > 0.1:
        advice = "other anchor sizes help little: the boxes are too small, or too long and thin"
        if coverage.better_anchors:
            sizes = ", ".join(map(str, coverage.better_anchors))
            advice = f"model.anchor_sizes=[{sizes}] would match {coverage.better_matched:.0%}"
        where = (
            f"at {coverage.anchor_config.short_side}x{coverage.anchor_config.long_side} ({coverage.anchor_config.name})"
        )
        findings.append(
            make_finding(
                "anchors-miss", split, round(missed * coverage.boxes), total=coverage.boxes, detail=f"{where}; {advice}"
            )
        )
    if coverage.small > 0.1 and coverage.better_input:
        short, long = coverage.better_input
        _, _, _, small, cost = next(entry for entry in coverage.inputs if entry[:2] == coverage.better_input)
        detail = f"data.short_side={short} data.long_side={long} leaves {small:.0%}, at {cost:.1f} times the cost"
        findings.append(
            make_finding(
                "boxes-small", split, round(coverage.small * coverage.boxes), total=coverage.boxes, detail=detail
            )
        )
    return findings


def resize_boxes(boxes: np.ndarray, sizes: np.ndarray, anchor_config: AnchorConfig) -> tuple[np.ndarray, np.ndarray]:
    """Scale boxes like the network's resize.

    Args:
        boxes: [m, 4] xyxy in pixels of the original image.
        sizes: [m, 2], width and height of each box's image.

    Returns:
        boxes [m, 4] xyxy in pixels of the resized image, and the padded width and height [m, 2] of each image.
    """
    scale = np.minimum(anchor_config.short_side / sizes.min(axis=1), anchor_config.long_side / sizes.max(axis=1))
    resized = np.maximum(1, np.round(sizes * scale[:, None]))
    factor = resized / sizes
    return boxes * np.concatenate([factor, factor], axis=1), np.ceil(resized / DIVISOR) * DIVISOR


def small_fraction(boxes: np.ndarray, sizes: np.ndarray, anchor_config: AnchorConfig) -> float:
    """Fraction of the boxes with a side under `MIN_SIDE` pixels at the network input."""
    resized, _ = resize_boxes(boxes, sizes, anchor_config)
    return float(((resized[:, 2:] - resized[:, :2]).min(axis=1) < MIN_SIDE).mean())


def best_anchor_ious(boxes: np.ndarray, sizes: np.ndarray, anchor_config: AnchorConfig) -> np.ndarray:
    """The highest IoU between each box and the anchors of each level: float [m, levels].

    Only the anchor position nearest to the box center is computed, since it has the largest overlap.

    Args:
        boxes: [m, 4] xyxy in pixels of the image.
        sizes: [m, 2], width and height of each box's image; each image is padded as in a batch of one.
    """
    resized, padded_sizes = resize_boxes(boxes, sizes, anchor_config)
    center, side = (resized[:, :2] + resized[:, 2:]) / 2, resized[:, 2:] - resized[:, :2]
    result = np.zeros((len(boxes), len(anchor_config.anchor_sizes)))
    map_sizes = padded_sizes / FINEST_STRIDE[anchor_config.detector]
    for level, size in enumerate(anchor_config.anchor_sizes):
        # As in torchvision, the stride is the padded side divided by the side of the feature map, rounded down.
        stride = padded_sizes // map_sizes
        anchor_center = np.clip(np.round(center / stride), 0, map_sizes - 1) * stride
        shapes = anchor_shapes(size, anchor_config.detector)
        low = np.maximum(anchor_center[:, None] - shapes / 2, resized[:, None, :2])
        high = np.minimum(anchor_center[:, None] + shapes / 2, resized[:, None, 2:])
        intersection = np.clip(high - low, 0, None).prod(axis=2)
        union = side.prod(axis=1)[:, None] + shapes.prod(axis=1) - intersection
        result[:, level] = (intersection / union).max(axis=1)
        map_sizes = np.ceil(map_sizes / 2)
    return result


def anchor_shapes(size: int, detector: str) -> np.ndarray:
    """float [a, 2]: widths and heights of a level's anchors, rounded like torchvision's."""
    sizes = [int(size * scale) for scale in ANCHOR_SCALES[detector]] if detector == "retinanet" else [size]
    shapes = [(s / math.sqrt(ratio), s * math.sqrt(ratio)) for ratio in ASPECT_RATIOS for s in sizes]
    return 2 * np.round(np.array(shapes) / 2)


def _search_anchors(boxes: np.ndarray, sizes: np.ndarray, anchor_config: AnchorConfig) -> tuple[int, ...]:
    """The geometric series of anchor sizes that matches most boxes; ties go to the higher mean IoU."""
    best_score, best_anchors = -1.0, anchor_config.anchor_sizes
    levels = range(len(anchor_config.anchor_sizes))
    for start in np.geomspace(6, 128, 19):
        for growth in (1.5, 1.75, 2.0, 2.25):
            anchors = tuple(round(start * growth**level) for level in levels)
            ious = best_anchor_ious(boxes, sizes, replace(anchor_config, anchor_sizes=anchors)).max(axis=1)
            score = float((ious >= MATCH_IOU).mean() + 0.01 * ious.mean())
            if score > best_score:
                best_score, best_anchors = score, anchors
    return best_anchors


def input_size_rows(coverage: AnchorCoverage) -> Sequence[tuple[str, str, str, str]]:
    """Rows of a table as text: input size, matched, small, relative cost."""
    return [
        (f"{short}x{long}", f"{matched:.1%}", f"{small:.1%}", f"{cost:.2g} x")
        for short, long, matched, small, cost in coverage.inputs
    ]
