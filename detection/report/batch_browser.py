"""Show batches as the network gets them: augmented and padded, with ground truth and optionally detections."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from markupsafe import Markup
from torch import Tensor

from detection.config import DetectionConfig
from detection.core import html
from detection.core.device import pick_device
from detection.core.errors import UserError
from detection.core.outputs import check_outputs, write_output
from detection.data.dataset import DetectionDataset, SampleKey, build_dataset
from detection.data.sampler import EvalBatchSampler, TrainBatchSampler
from detection.data.transforms import FILL
from detection.inference.draw import draw_on
from detection.runtime.pytorch import load_detector, predict_batch

DIVISOR = 32
GROUND_TRUTH_COLOR = (255, 255, 255)
JPEG_QUALITY = 90


@dataclass(frozen=True)
class BatchImage:
    """An image of a batch as the network gets it: RGB uint8 [H, W, 3] with drawn boxes, and its caption."""

    pixels: np.ndarray
    name: str
    caption: str


class BatchDetector:
    """A detector from a checkpoint or an exported file, for images that are already resized."""

    def __init__(self, path: str, device: str, threshold: float) -> None:
        self.device = pick_device(device)
        self.model, self.config, self.classes = load_detector(path, self.device, score_threshold=threshold)
        self.path = path

    @torch.inference_mode()
    def detect(self, images: Sequence[Tensor]) -> list[dict[str, Any]]:
        """Detect in images uint8 [3, H, W]: for each a dict of boxes (xyxy, pixels), labels, names and scores."""
        amp = self.config.train.amp if self.device.type == "cuda" else "off"
        outputs = predict_batch(self.model, images, self.device, amp)
        found = []
        for output in outputs:
            labels = output["labels"].cpu().tolist()
            found.append(
                {
                    "boxes": output["boxes"].float().cpu().numpy(),
                    "labels": labels,
                    "names": [self.classes.names[label - 1] for label in labels],
                    "scores": output["scores"].float().cpu().numpy(),
                }
            )
        return found


class BatchBrowser:
    """The batches of a split, in the same order and with the same augmentation as in training.

    Args:
        split: "train" (augmented) or "val".
        detector: draws detections on the images, or None.
    """

    def __init__(self, config: DetectionConfig, split: str, detector: BatchDetector | None = None) -> None:
        self.dataset: DetectionDataset = build_dataset(config, split)
        self.split, self.detector = split, detector
        sizes, data = self.dataset.annotations.sizes, config.data
        self.batches: TrainBatchSampler | EvalBatchSampler
        if split == "train":
            self.batches = TrainBatchSampler(
                sizes, data.batch_size, config.seed, data.group_by_aspect, short_sides=data.multi_scale
            )
        else:
            self.batches = EvalBatchSampler(sizes, config.eval.batch_size or data.batch_size)

    def sample_keys(self, number: int) -> list[SampleKey]:
        """Sampler keys of batch `number`, counted from 0 over all epochs; for val, every epoch is the same."""
        epoch, within = divmod(number, len(self.batches))
        if isinstance(self.batches, TrainBatchSampler):
            self.batches.set_epoch(epoch)
        return list(self.batches)[within]

    def batch(self, number: int) -> list[BatchImage]:
        """The images of a batch, padded to a common canvas as for the network."""
        samples = [(key, self.dataset[key]) for key in self.sample_keys(number)]
        good = [(key, *sample) for key, sample in samples if not isinstance(sample, UserError)]
        found = self.detector.detect([image for _, image, _ in good]) if self.detector and good else None
        canvas_size = [
            -(-max((image.shape[side] for _, image, _ in good), default=1) // DIVISOR) * DIVISOR for side in (1, 2)
        ]
        names = self.dataset.annotations.class_names
        shown = []
        for i, (key, image, target) in enumerate(good):
            canvas = _pad(image, canvas_size[0], canvas_size[1])
            detections = found[i] if found is not None else None
            _draw(canvas, target, names, detections)
            file_name = str(self.dataset.annotations.file_names[key.image])
            shown.append(BatchImage(canvas, file_name, _caption(file_name, image, target, names, detections)))
        for key, sample in samples:
            if isinstance(sample, UserError):
                empty = np.full((DIVISOR, DIVISOR, 3), FILL, np.uint8)
                shown.append(BatchImage(empty, str(self.dataset.annotations.file_names[key.image]), str(sample)))
        return shown

    def title(self, number: int) -> str:
        """For example "epoch 1, batch 2 of 30"."""
        epoch, within = divmod(number, len(self.batches))
        of_epoch = f"epoch {epoch + 1}, " if self.split == "train" else ""
        return f"{of_epoch}batch {within + 1} of {len(self.batches)}"

    def section(self, number: int, album: html.Album) -> tuple[html.Section, list[BatchImage]]:
        """The section of a page for one batch, and its images."""
        shown = self.batch(number)
        for shown_image in shown:
            album.add(shown_image.pixels, shown_image.caption, max_side=640)
        height, width = shown[0].pixels.shape[:2]
        lead = f"{len(shown)} images on a canvas of {width}x{height} pixels."
        return html.Section(self.title(number), [album.gallery(300)], lead), shown

    def subtitle(self) -> str:
        """Dataset and meaning of the colors."""
        source = self.dataset.annotations.source
        if self.detector is None:
            return f"{self.split}: {source}; gray: padding"
        return (
            f"{self.split}: {source}; white: ground truth, colored: detections of {self.detector.path}, gray: padding"
        )


def write_batches(browser: BatchBrowser, out: Path, *, first: int, count: int, force: bool = False) -> Path:
    """Write out/index.html and a JPEG file for each image of `count` batches; returns the path of the page.

    Args:
        force: overwrite files that this toolkit did not write.

    Raises:
        UserError: the folder cannot be written to, or a file exists that this toolkit did not write.
    """

    def jpeg_path(number: int, place: int) -> Path:
        return out / f"batch_{number:04d}_{place:02d}.jpg"

    numbers = range(first, first + count)
    outputs = [jpeg_path(number, place) for number in numbers for place in range(len(browser.sample_keys(number)))]
    annotations = browser.dataset.annotations
    inputs = [annotations.source, annotations.images, browser.detector and browser.detector.path]
    check_outputs([out / "index.html", *outputs], inputs, force=force)
    album = html.Album(max_bytes=20_000_000)
    sections = []
    for number in numbers:
        section, shown = browser.section(number, album)
        sections.append(section)
        for place, shown_image in enumerate(shown):
            _, data = cv2.imencode(".jpg", shown_image.pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
            write_output(jpeg_path(number, place), lambda file, data=data: file.write(data.tobytes()))
    html.write_page(out / "index.html", "Network input", sections, subtitle=browser.subtitle())
    return out / "index.html"


def navigation_links(number: int) -> Markup:
    """Links to the previous and the next batch, for the pages of `BatchServer`."""
    link = Markup('<a href="/{}" accesskey="{}">{}</a>')
    previous = link.format(number - 1, "p", "← previous batch") + Markup(" &nbsp; ") if number > 0 else Markup("")
    return Markup("<p>{}{}</p>").format(previous, link.format(number + 1, "n", "next batch →"))


def _pad(image: Tensor, height: int, width: int) -> np.ndarray:
    """uint8 [3, h, w] -> [height, width, 3], padded at the right and at the bottom."""
    canvas = np.empty((height, width, 3), np.uint8)
    canvas[:] = FILL
    canvas[: image.shape[1], : image.shape[2]] = image.numpy().transpose(1, 2, 0)
    return canvas


def _draw(
    pixels: np.ndarray, target: Mapping[str, Any], names: Sequence[str], detections: Mapping[str, Any] | None
) -> None:
    labels = target["labels"].tolist()
    if detections is None:
        boxes = target["boxes"].numpy()
        draw_on(pixels, {"boxes": boxes, "labels": labels, "names": [names[label - 1] for label in labels]})
        return
    for x1, y1, x2, y2 in target["boxes"].round().int().tolist():
        cv2.rectangle(pixels, (x1, y1), (x2, y2), GROUND_TRUTH_COLOR, 1)
    draw_on(pixels, detections)


def _caption(
    file_name: str,
    image: Tensor,
    target: Mapping[str, Any],
    names: Sequence[str],
    detections: Mapping[str, Any] | None,
) -> str:
    counts = Counter(names[label - 1] for label in target["labels"].tolist())
    boxes = ", ".join(f"{count} {name}" for name, count in counts.most_common(6)) or "no boxes"
    more = ", …" if len(counts) > 6 else ""
    found = f"; {len(detections['labels'])} detections" if detections is not None else ""
    replaced = f"; replaces an unreadable image: {target['skipped'][0]}" if target.get("skipped") else ""
    return f"{file_name}, {image.shape[2]}x{image.shape[1]}: {boxes}{more}{found}{replaced}"
