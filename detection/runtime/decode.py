"""From the outputs of a raw export to boxes. Needs NumPy alone: this file can be copied into any program.

    metadata = json.loads(session.get_modelmeta().custom_metadata_map["ghostnet_detection"])
    logits, regression = session.run(None, {"images": frames, "sizes": sizes})
    found = decode(logits, regression, sizes, frames.shape[1:3], metadata)

What it does, for whoever writes it in another language, of a RetinaNet. The A anchors lie on maps of `strides`, level
by level, row by row, column by column, and within a place in the order of `cells` (boxes x1, y1, x2, y2 around 0). A
map has ceil(frame / stride) rows and columns; they are floor(frame / rows) and floor(frame / columns) pixels apart.

1. Of each level the `candidates` highest logits (over its anchors and classes) are looked at. Their score is
   1 / (1 + exp(-logit)); those not above the threshold are dropped.
2. A regression (dx, dy, dw, dh), divided by `weights`, moves and scales its anchor: x = dx * width + centre x,
   width' = exp(min(dw, limit)) * width. Boxes are clipped to the image.
3. Within each class, the best box suppresses those whose intersection over union with it is above the NMS threshold,
   then the next best that is left, and so on. The `max_detections` best of all classes are the result; labels are 1…C.

A GhostDet has points in place of anchors ("anchors" holds no `cells`): one in the middle of each place, at
(column + 0.5, row + 0.5) * stride. In step 1 the levels are one: `candidates` are chosen of all. In step 2 a regression
is the distances from the point to the left, upper, right and lower side of its box, in strides.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def decode(
    cls_logits: np.ndarray,
    bbox_regression: np.ndarray,
    sizes: np.ndarray,
    frame: Sequence[int],
    metadata: Mapping[str, Any],
    *,
    score_threshold: float | None = None,
    nms_threshold: float | None = None,
    max_detections: int | None = None,
) -> list[dict[str, np.ndarray]]:
    """Decode a batch.

    Args:
        cls_logits: float32 [N, A, C].
        bbox_regression: float32 [N, A, 4].
        sizes: int [N, 2], (height, width) of each image in its frame.
        frame: (height, width) of the frames.
        metadata: the JSON object that the file holds under "ghostnet_detection".
        score_threshold, nms_threshold, max_detections: in place of the metadata's.

    Returns:
        For each image boxes float32 [n, 4] (xyxy in pixels of the frame), labels int64 [n] (1…C), scores float32 [n],
        descending.
    """
    least = metadata["score_threshold"] if score_threshold is None else score_threshold
    overlap = metadata["nms_threshold"] if nms_threshold is None else nms_threshold
    most = metadata["max_detections"] if max_detections is None else max_detections
    spec = metadata["anchors"]
    boxes_at = _boxes if "cells" in spec else _boxes_around
    levels = anchors_of(spec, frame) if "cells" in spec else [points_of(spec, frame)]
    if sum(map(len, levels)) != cls_logits.shape[1]:
        raise ValueError(f"{cls_logits.shape[1]} rows of logits for {sum(map(len, levels))} anchors")
    found = []
    for logits, regression, (height, width) in zip(cls_logits, bbox_regression, sizes, strict=True):
        anchor, label, score = _candidates(logits, [len(level) for level in levels], spec["candidates"], least)
        boxes = boxes_at(regression[anchor], np.concatenate(levels)[anchor], spec)
        boxes = np.clip(boxes, 0, np.array([width, height, width, height], np.float32))
        order = np.argsort(-score, kind="stable")
        boxes, label, score = boxes[order], label[order], score[order]
        kept = np.sort(np.concatenate([np.zeros(0, np.int64), *_kept_by_class(boxes, label, overlap, most)]))[:most]
        found.append({"boxes": boxes[kept], "labels": label[kept] + 1, "scores": score[kept]})
    return found


def anchors_of(spec: Mapping[str, Any], frame: Sequence[int]) -> list[np.ndarray]:
    """Of each level the anchors, float32 [n, 4] xyxy, in a frame of (height, width)."""
    levels = []
    for stride, cells in zip(spec["strides"], spec["cells"], strict=True):
        rows, columns = (-(-int(side) // stride) for side in frame)
        y = np.arange(rows) * (int(frame[0]) // rows)
        x = np.arange(columns) * (int(frame[1]) // columns)
        x, y = np.broadcast_arrays(x[None, :], y[:, None])
        shifts = np.stack([x, y, x, y], axis=-1)[:, :, None]
        levels.append((shifts + np.array(cells)).reshape(-1, 4).astype(np.float32))
    return levels


def points_of(spec: Mapping[str, Any], frame: Sequence[int]) -> np.ndarray:
    """float32 [A, 3]: x, y and stride of each point in a frame of (height, width)."""
    levels = []
    for stride in spec["strides"]:
        rows, columns = (-(-int(side) // stride) for side in frame)
        y, x = np.meshgrid(np.arange(rows) + 0.5, np.arange(columns) + 0.5, indexing="ij")
        levels.append(np.stack([x * stride, y * stride, np.full_like(x, stride)], axis=-1).reshape(-1, 3))
    return np.concatenate(levels).astype(np.float32)


def _candidates(
    logits: np.ndarray, counts: Sequence[int], most: int, least: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits [A, C] -> anchor [k], label from 0 [k], score [k] of the best of each level."""
    chosen, start = [], 0
    for count in counts:
        level = logits[start : start + count].reshape(-1)
        best = np.argpartition(-level, most)[:most] if len(level) > most else np.arange(len(level))
        chosen.append(best + start * logits.shape[1])
        start += count
    places = np.concatenate(chosen)
    with np.errstate(over="ignore"):
        scores = 1 / (1 + np.exp(-logits.reshape(-1)[places]))
    places, scores = places[scores > least], scores[scores > least]
    return places // logits.shape[1], places % logits.shape[1], scores


def _boxes(codes: np.ndarray, anchors: np.ndarray, spec: Mapping[str, Any]) -> np.ndarray:
    codes = codes / np.array(spec["weights"], np.float32)
    extent = anchors[:, 2:] - anchors[:, :2]
    centre = codes[:, :2] * extent + anchors[:, :2] + np.float32(0.5) * extent
    half = np.float32(0.5) * np.exp(np.minimum(codes[:, 2:], np.float32(spec["limit"]))) * extent
    return np.concatenate([centre - half, centre + half], axis=1)


def _boxes_around(distances: np.ndarray, points: np.ndarray, spec: Mapping[str, Any]) -> np.ndarray:
    sides = distances * points[:, 2:]
    return np.concatenate([points[:, :2] - sides[:, :2], points[:, :2] + sides[:, 2:]], axis=1)


def _kept_by_class(boxes: np.ndarray, labels: np.ndarray, overlap: float, most: int) -> list[np.ndarray]:
    """Of each class the places of the boxes that are not suppressed; boxes come in descending order of their scores."""
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept = []
    for label in np.unique(labels):
        left = np.flatnonzero(labels == label)
        chosen: list[int] = []
        while len(left) and len(chosen) < most:
            best, left = left[0], left[1:]
            chosen.append(best)
            corner = np.maximum(boxes[best, :2], boxes[left, :2])
            sides = np.maximum(np.minimum(boxes[best, 2:], boxes[left, 2:]) - corner, 0)
            shared = sides[:, 0] * sides[:, 1]
            # Without a division: two boxes without any area do not suppress each other.
            left = left[shared <= overlap * (areas[best] + areas[left] - shared)]
        kept.append(np.array(chosen, np.int64))
    return kept
