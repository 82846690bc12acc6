"""Decodes the outputs of a raw export to boxes. Needs only NumPy: this file can be copied into any program.

    metadata = json.loads(session.get_modelmeta().custom_metadata_map["ghostnet_detection"])
    logits, regression = session.run(None, {"images": images, "sizes": sizes})
    detections = decode(logits, regression, sizes, images.shape[1:3], metadata)

The algorithm for RetinaNet, for implementations in other languages: the A anchors are ordered by level, row and column
of the feature maps, and at each position in the order of `cells` (boxes x1, y1, x2, y2 around 0). A feature map has
ceil(canvas / stride) rows and columns, which are floor(canvas / rows) and floor(canvas / columns) pixels apart.

1. Select the `candidates` highest logits of each level (over its anchors and classes). Their score is
   1 / (1 + exp(-logit)); drop those that are not above the score threshold.
2. Decode boxes: a regression (dx, dy, dw, dh), divided by `weights`, shifts and scales its anchor: x = dx * width +
   center x, width' = exp(min(dw, limit)) * width. Clip boxes to the image.
3. Apply NMS within each class: a box is dropped if its intersection over union with a box of a higher score is above
   the NMS threshold. Keep the `max_detections` highest scores of all classes; labels are 1…C.

GhostDet has anchor points ("anchors" has no `cells`): one in the center of each position, at (column + 0.5, row + 0.5)
* stride. In step 1 the `candidates` are selected from all levels together. In step 2 a regression is the distances from
the point to the left, upper, right and lower side of its box, in strides.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def decode(
    cls_logits: np.ndarray,
    bbox_regression: np.ndarray,
    sizes: np.ndarray,
    canvas_size: Sequence[int],
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
        sizes: int [N, 2], (height, width) of each image on its canvas.
        canvas_size: (height, width) of the canvas.
        metadata: the JSON object that the file holds under "ghostnet_detection".
        score_threshold, nms_threshold, max_detections: replace those of the metadata.

    Returns:
        For each image boxes float32 [n, 4] (xyxy in pixels of the canvas), labels int64 [n] (1…C), scores float32 [n],
        in descending order of scores.
    """
    score_threshold = metadata["score_threshold"] if score_threshold is None else score_threshold
    nms_threshold = metadata["nms_threshold"] if nms_threshold is None else nms_threshold
    max_detections = metadata["max_detections"] if max_detections is None else max_detections
    spec = metadata["anchors"]
    decode_boxes = _decode_deltas if "cells" in spec else _decode_distances
    levels = make_anchors(spec, canvas_size) if "cells" in spec else [make_points(spec, canvas_size)]
    if sum(map(len, levels)) != cls_logits.shape[1]:
        raise ValueError(f"{cls_logits.shape[1]} rows of logits for {sum(map(len, levels))} anchors")
    detections = []
    for logits, regression, (height, width) in zip(cls_logits, bbox_regression, sizes, strict=True):
        counts = [len(level) for level in levels]
        anchor, label, score = _select_candidates(logits, counts, spec["candidates"], score_threshold)
        boxes = decode_boxes(regression[anchor], np.concatenate(levels)[anchor], spec)
        boxes = np.clip(boxes, 0, np.array([width, height, width, height], np.float32))
        order = np.argsort(-score, kind="stable")
        boxes, label, score = boxes[order], label[order], score[order]
        kept = _nms_by_class(boxes, label, nms_threshold, max_detections)
        detections.append({"boxes": boxes[kept], "labels": label[kept] + 1, "scores": score[kept]})
    return detections


def make_anchors(spec: Mapping[str, Any], canvas_size: Sequence[int]) -> list[np.ndarray]:
    """The anchors of each level, float32 [n, 4] xyxy, on a canvas of (height, width)."""
    levels = []
    for stride, cells in zip(spec["strides"], spec["cells"], strict=True):
        rows, columns = (-(-int(side) // stride) for side in canvas_size)
        y = np.arange(rows) * (int(canvas_size[0]) // rows)
        x = np.arange(columns) * (int(canvas_size[1]) // columns)
        x, y = np.broadcast_arrays(x[None, :], y[:, None])
        shifts = np.stack([x, y, x, y], axis=-1)[:, :, None]
        levels.append((shifts + np.array(cells)).reshape(-1, 4).astype(np.float32))
    return levels


def make_points(spec: Mapping[str, Any], canvas_size: Sequence[int]) -> np.ndarray:
    """float32 [A, 3]: x, y and stride of each anchor point on a canvas of (height, width)."""
    levels = []
    for stride in spec["strides"]:
        rows, columns = (-(-int(side) // stride) for side in canvas_size)
        y, x = np.meshgrid(np.arange(rows) + 0.5, np.arange(columns) + 0.5, indexing="ij")
        levels.append(np.stack([x * stride, y * stride, np.full_like(x, stride)], axis=-1).reshape(-1, 3))
    return np.concatenate(levels).astype(np.float32)


def _select_candidates(
    logits: np.ndarray, counts: Sequence[int], top_k: int, score_threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits [A, C] -> anchor [k], label from 0 [k], score [k] of the highest logits of each level."""
    chosen, start = [], 0
    for count in counts:
        level = logits[start : start + count].reshape(-1)
        best = np.argpartition(-level, top_k)[:top_k] if len(level) > top_k else np.arange(len(level))
        chosen.append(best + start * logits.shape[1])
        start += count
    indices = np.concatenate(chosen)
    with np.errstate(over="ignore"):
        scores = 1 / (1 + np.exp(-logits.reshape(-1)[indices]))
    indices, scores = indices[scores > score_threshold], scores[scores > score_threshold]
    return indices // logits.shape[1], indices % logits.shape[1], scores


def _decode_deltas(deltas: np.ndarray, anchors: np.ndarray, spec: Mapping[str, Any]) -> np.ndarray:
    deltas = deltas / np.array(spec["weights"], np.float32)
    extent = anchors[:, 2:] - anchors[:, :2]
    center = deltas[:, :2] * extent + anchors[:, :2] + np.float32(0.5) * extent
    half = np.float32(0.5) * np.exp(np.minimum(deltas[:, 2:], np.float32(spec["limit"]))) * extent
    return np.concatenate([center - half, center + half], axis=1)


def _decode_distances(distances: np.ndarray, points: np.ndarray, spec: Mapping[str, Any]) -> np.ndarray:
    sides = distances * points[:, 2:]
    return np.concatenate([points[:, :2] - sides[:, :2], points[:, :2] + sides[:, 2:]], axis=1)


def _nms_by_class(boxes: np.ndarray, labels: np.ndarray, nms_threshold: float, max_detections: int) -> np.ndarray:
    """Indices of the boxes that class-wise NMS keeps, ascending; boxes are in descending order of scores."""
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept: list[int] = []
    for label in np.unique(labels):
        remaining = np.flatnonzero(labels == label)
        count = 0
        while len(remaining) and count < max_detections:
            best, remaining = remaining[0], remaining[1:]
            kept.append(best)
            count += 1
            corner = np.maximum(boxes[best, :2], boxes[remaining, :2])
            sides = np.maximum(np.minimum(boxes[best, 2:], boxes[remaining, 2:]) - corner, 0)
            intersection = sides[:, 0] * sides[:, 1]
            # Without a division, so that two boxes with zero area do not suppress each other.
            remaining = remaining[intersection <= nms_threshold * (areas[best] + areas[remaining] - intersection)]
    return np.sort(np.array(kept, np.int64))[:max_detections]
