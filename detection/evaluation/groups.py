"""AP of groups of objects: by size, by shape, and by how many others there are in the image."""

from dataclasses import dataclass

import numpy as np

from detection.evaluation.matches import Matches, class_aps, mean_ap


@dataclass(frozen=True)
class Group:
    """One group of objects; AP, AP50 in [0, 1].

    recall: the share found at IoU 0.5 by a detection of any score.
    """

    name: str
    objects: int
    ap: float
    ap50: float
    recall: float


SIZES = (0.0, 16.0**2, 32.0**2, 96.0**2, 192.0**2, np.inf)
SHAPES = (0.0, 1 / 3, 2 / 3, 3 / 2, 3.0, np.inf)
CROWDS = (1, 4, 10, 20, np.inf)


def groups_by_size(matches: Matches) -> list[Group]:
    """By area in pixels of the original image: the annotation's own, and width x height of a detection.

    COCO's own three sizes are 32² and 96²; two of them are halved here.
    """
    boxes = matches.box[:, 2] * matches.box[:, 3]
    names = ["up to 16²", "16² to 32²", "32² to 96²", "96² to 192²", "above 192²"]
    return _groups(matches, names, SIZES, matches.annotations.areas, boxes)


def groups_by_shape(matches: Matches) -> list[Group]:
    """By width / height."""
    names = ["tall, below 1:3", "1:3 to 2:3", "2:3 to 3:2", "3:2 to 3:1", "wide, above 3:1"]
    annotations = matches.annotations
    return _groups(matches, names, SHAPES, _shape(annotations.boxes), _shape(matches.box))


def groups_by_crowdedness(matches: Matches) -> list[Group]:
    """By the number of objects in the image. Detections in images without any are in the first group."""
    annotations = matches.annotations
    counts = np.bincount(matches.image_of_object[matches.counted], minlength=len(annotations))
    counts = np.maximum(counts, 1)
    names = ["1 to 3 objects", "4 to 9", "10 to 19", "20 and more"]
    return _groups(matches, names, CROWDS, counts[matches.image_of_object], counts[matches.image])


def _shape(boxes: np.ndarray) -> np.ndarray:
    return boxes[:, 2] / np.maximum(boxes[:, 3], 1e-9)


def _groups(
    matches: Matches, names: list[str], edges: tuple[float, ...], of_objects: np.ndarray, of_detections: np.ndarray
) -> list[Group]:
    """Groups low <= value < high that have an object."""
    groups = []
    found = matches.found(0)
    for name, low, high in zip(names, edges[:-1], edges[1:], strict=True):
        objects = (of_objects >= low) & (of_objects < high)
        detections = (of_detections >= low) & (of_detections < high)
        count = int((objects & matches.counted).sum())
        if not count:
            continue
        aps = [
            mean_ap(class_aps(matches, t, objects=objects, detections=detections))
            for t in range(len(matches.thresholds))
        ]
        recall = float((found & objects & matches.counted).sum() / count)
        groups.append(Group(name, count, float(np.mean(aps)), aps[0], recall))
    return groups
