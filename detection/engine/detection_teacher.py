"""A trained detector that annotates, during a training, what the annotations lack."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_iou

from detection.config import DetectionConfig
from detection.core.boxes import SAME_OBJECT
from detection.core.errors import UserError
from detection.core.text import normalized_name
from detection.inference.predictor import Predictor


class DetectionTeacher:
    """Adds the teacher's boxes to the targets of a batch, with their scores.

    It adds boxes of classes for which the annotations of an image are not complete. Classes that it knows then count as
    complete: what it does not find is background. Classes are matched by name.

    Args:
        device: it runs there, like the network that learns.

    Raises:
        UserError: the teacher cannot be read, or knows none of the classes.
    """

    def __init__(self, config: DetectionConfig, class_names: Sequence[str], device: torch.device) -> None:
        spec = config.train.teacher
        assert spec is not None
        if config.model.detector != "ghostdet":
            raise UserError(
                f"train.teacher: only ghostdet learns from scores of boxes, not {config.model.detector}; let "
                "tools/label.py write the teacher's boxes into the annotations"
            )
        self.predictor = Predictor(
            spec.detector, str(device), score_threshold=spec.score_threshold, adapter=spec.adapter
        )
        number_of = {normalized_name(name): number for number, name in enumerate(class_names)}
        known = [number_of.get(normalized_name(name), -1) for name in self.predictor.classes.names]
        # Class of the data for each label of the teacher, -1 for none; labels count from 1.
        self.class_of_label = torch.tensor([-1, *known])
        self.known = torch.zeros(len(class_names), dtype=torch.bool)
        self.known[self.class_of_label[self.class_of_label >= 0]] = True
        if not self.known.any():
            raise UserError(
                f"train.teacher: {spec.detector} knows none of the classes {', '.join(class_names[:5])}, …; it has "
                f"{', '.join(self.predictor.classes.names[:5])}, …"
            )

    def __call__(self, images: Sequence[Tensor], targets: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Targets with the teacher's boxes.

        Args:
            images: uint8 [3, H, W], augmented, on the CPU.
            targets: as they come from the loader; not changed.
        """
        missing = [i for i, target in enumerate(targets) if "complete_classes" in target]
        found = self.predictor.predict_batch([images[i] for i in missing])
        completed = list(targets)
        for i, detections in zip(missing, found, strict=True):
            completed[i] = self._complete(targets[i], detections)
        return completed

    def _complete(self, target: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
        boxes, scores = torch.from_numpy(found["boxes"]), torch.from_numpy(found["scores"])
        classes = self.class_of_label[torch.from_numpy(found["labels"])]
        complete = target["complete_classes"]
        wanted = (classes >= 0) & ~complete[classes]
        wanted &= (box_iou(boxes, target["boxes"]) <= SAME_OBJECT).all(dim=1)
        boxes, classes, scores = boxes[wanted], classes[wanted], scores[wanted]
        return {
            **target,
            "boxes": torch.cat([target["boxes"], boxes]),
            "labels": torch.cat([target["labels"], classes + 1]),
            "scores": torch.cat([torch.ones(len(target["boxes"])), scores]),
            "complete_classes": complete | self.known,
        }
