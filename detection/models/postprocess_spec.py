"""How raw outputs become detections. Imports no torch, so that metadata can be read without."""

from dataclasses import dataclass

from detection.config import EvalConfig


@dataclass(frozen=True)
class PostprocessSpec:
    """How raw outputs become detections. The model holds it, and exported files carry it in their metadata.

    Attributes:
        score_threshold: detections have a higher score.
        nms_threshold: of two boxes of a class with a higher IoU, only the one with the higher score is kept.
        max_detections: of an image.
        pre_nms_top_k: (box, class) pairs that enter NMS: of each level (RetinaNet; Faster R-CNN's proposals) or of an
            image (GhostDet, whose head passes all levels as one).
    """

    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    max_detections: int = 100
    pre_nms_top_k: int = 1000

    @staticmethod
    def of(config: EvalConfig) -> "PostprocessSpec":
        return PostprocessSpec(
            config.score_threshold, config.nms_threshold, config.max_detections, config.pre_nms_top_k
        )
