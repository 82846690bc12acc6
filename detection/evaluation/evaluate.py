"""Run a detector over a data set: detections in original pixels and original ids."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from detection import distributed
from detection.data.dataset import DetectionDataset
from detection.data.loader import EvalBatches, build_loader, iterate
from detection.data.transforms import to_original
from detection.device import autocast, progress_interval
from detection.evaluation.coco import Result


def eval_loader(dataset: DetectionDataset, batch_size: int, workers: int, device: torch.device) -> DataLoader:
    """Each image once, ordered by shape; of several processes each has a share."""
    batches = EvalBatches(dataset.index.sizes, batch_size, rank=distributed.rank(), world_size=distributed.world_size())
    return build_loader(dataset, batches, workers=workers, device=device)


@torch.inference_mode()
def detect_dataset(
    model: nn.Module,
    loader: DataLoader,
    category_ids: Sequence[int | None],
    device: torch.device,
    *,
    amp: str = "off",
    title: str = "evaluate",
) -> list[Result]:
    """Detections of every image in COCO's results format, with progress.

    Args:
        category_ids: original id of label 1, 2, …; None leaves detections of that label out.

    The model is left in the mode it was in.
    """
    training = model.training
    model.eval()
    results: list[Result] = []
    for images, targets in tqdm(iterate(loader), title, len(loader), leave=False, mininterval=progress_interval()):
        with autocast(device, amp):
            detections = model([image.to(device, non_blocking=True) for image in images])
        for detection, target in zip(detections, targets, strict=True):
            boxes = to_original(detection["boxes"].float().cpu(), target["scale"], target["size"])
            boxes[:, 2:] -= boxes[:, :2]
            scores, labels = detection["scores"].float().cpu(), detection["labels"].cpu()
            results += [
                {"image_id": target["image_id"], "category_id": category_ids[label - 1], "bbox": box, "score": score}
                for box, score, label in zip(boxes.tolist(), scores.tolist(), labels.tolist(), strict=True)
                if category_ids[label - 1] is not None
            ]
    model.train(training)
    return results
