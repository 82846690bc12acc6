"""Run a detector over a data set: detections in original pixels and original ids."""

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
    """Each image once, ordered by shape, but those with ids in `done`; of several processes each has a share."""
    batches = EvalBatchSampler(
        dataset.index.sizes, batch_size, rank=distributed.rank(), world_size=distributed.world_size()
    )
    if done:
        ids = dataset.index.image_ids
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
    """Batch by batch the ids of its images and what was found in them, in COCO's results format, with progress.

    Args:
        category_ids: original id of label 1, 2, …; None leaves detections of that label out.

    The model is left in the mode it was in.
    """
    training = model.training
    model.eval()
    # Of several processes the first one tells how far its share is; theirs are as large.
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
