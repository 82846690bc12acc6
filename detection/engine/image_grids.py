"""Training batches and detections as one image, to check augmentation and progress."""

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from torch import Tensor

from detection.data.dataset import DetectionDataset, SampleKey
from detection.data.transforms import FILL
from detection.evaluation.coco_evaluator import Result
from detection.inference.draw import draw_detections


def training_grid(images: Sequence[Tensor], targets: Sequence[Mapping[str, Any]], names: Sequence[str]) -> np.ndarray:
    """Augmented images of a training batch (uint8 [3, H, W]) with their boxes, in one RGB image, uint8 [H', W', 3]."""
    drawn = []
    for image, target in zip(images, targets, strict=True):
        labels = target["labels"].tolist()
        found = {"boxes": target["boxes"].numpy(), "labels": labels, "names": [names[label - 1] for label in labels]}
        drawn.append(draw_detections(_array(image), found))
    return grid(drawn)


def detections_grid(
    dataset: DetectionDataset,
    results: Sequence[Result],
    category_ids: Sequence[int],
    names: Sequence[str],
    *,
    count: int = 8,
    threshold: float = 0.3,
) -> np.ndarray:
    """`count` images, evenly spread over a dataset, with their detections, in one RGB image, uint8 [H', W', 3].

    Args:
        results: COCO results, boxes xywh in pixels of the original.
        threshold: lowest score to draw.
    """
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int)).tolist()
    wanted: dict[int, list[Result]] = {int(dataset.annotations.image_ids[i]): [] for i in chosen}
    for result in results:
        if result["image_id"] in wanted and result["score"] >= threshold:
            wanted[result["image_id"]].append(result)
    label_of = {category_id: label for label, category_id in enumerate(category_ids, 1)}
    drawn = []
    for i in chosen:
        image, target = dataset.load(SampleKey(0, i))
        found = wanted[target["image_id"]]
        boxes = np.array([result["bbox"] for result in found], np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = [label_of[result["category_id"]] for result in found]
        drawn.append(
            draw_detections(
                _array(image),
                {
                    "boxes": boxes * np.array([*target["scale"]] * 2),
                    "labels": labels,
                    "names": [names[label - 1] for label in labels],
                    "scores": np.array([result["score"] for result in found]),
                },
            )
        )
    return grid(drawn)


def grid(images: Sequence[np.ndarray], columns: int = 4, side: int = 320) -> np.ndarray:
    """Images (RGB uint8) in rows, each scaled to fit into a square of `side` pixels."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    canvas = np.empty((rows * side, columns * side, 3), np.uint8)
    canvas[:] = FILL
    for number, image in enumerate(images):
        height, width = image.shape[:2]
        scale = side / max(height, width)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        top, left = number // columns * side, number % columns * side
        canvas[top : top + size[1], left : left + size[0]] = small
    return canvas


def _array(image: Tensor) -> np.ndarray:
    return np.ascontiguousarray(image.numpy().transpose(1, 2, 0))
