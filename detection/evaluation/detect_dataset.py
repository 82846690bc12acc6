"""Runs a detector on a dataset; detections have original pixels and original ids."""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import nn
from torch.utils.data import DataLoader

from detection.core import distributed
from detection.core.progress import progress_bar
from detection.data.dataset import DetectionDataset
from detection.data.loader import build_loader, iterate
from detection.data.sampler import EvalBatchSampler
from detection.data.transforms import to_original
from detection.evaluation.coco_evaluator import Result
from detection.runtime.pytorch import predict_batch


def eval_loader(
    dataset: DetectionDataset,
    batch_size: int,
    workers: int,
    device: torch.device,
    done: Collection[int] = (),
) -> DataLoader:
    """Each image once, ordered by shape, except those with ids in `done`; several processes share the images."""
    batches = EvalBatchSampler(
        dataset.annotations.sizes, batch_size, rank=distributed.rank(), world_size=distributed.world_size()
    )
    if done:
        ids = dataset.annotations.image_ids
        left = ([i for i in batch if int(ids[i]) not in done] for batch in batches.batches)
        batches.batches = [batch for batch in left if batch]
    return build_loader(dataset, batches, workers=workers, device=device)


def detect_dataset(
    model: nn.Module,
    loader: DataLoader,
    category_ids: Sequence[int | None],
    device: torch.device,
    *,
    amp: str = "off",
) -> list[Result]:
    """Detections of every image of this process's share, in COCO's results format; see `detect_batches`."""
    return [result for _, found in detect_batches(model, loader, category_ids, device, amp=amp) for result in found]


@torch.inference_mode()
def detect_batches(
    model: nn.Module,
    loader: DataLoader,
    category_ids: Sequence[int | None],
    device: torch.device,
    *,
    amp: str = "off",
) -> Iterator[tuple[list[int], list[Result]]]:
    """Yield for each batch the ids of its images and the detections in them, in COCO's results format.

    Args:
        category_ids: original id of label 1, 2, …; None drops detections of that label.

    The model keeps its mode (training or evaluation). A progress bar is shown.
    """
    training = model.training
    model.eval()
    bar = progress_bar(iterate(loader), "evaluate", len(loader))
    for images, targets in bar:
        results: list[Result] = []
        detections = predict_batch(model, images, device, amp)
        for detection, target in zip(detections, targets, strict=True):
            boxes = to_original(detection["boxes"].float().cpu(), target["scale"], target["size"])
            boxes[:, 2:] -= boxes[:, :2]
            scores, labels = detection["scores"].float().cpu(), detection["labels"].cpu()
            results += [
                {"image_id": target["image_id"], "category_id": category_ids[label - 1], "bbox": box, "score": score}
                for box, score, label in zip(boxes.tolist(), scores.tolist(), labels.tolist(), strict=True)
                if category_ids[label - 1] is not None
            ]
        yield [target["image_id"] for target in targets], results
    model.train(training)
