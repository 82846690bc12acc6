"""What the network will see: batches after augmentation with their boxes, and what a checkpoint finds in them."""

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
TRUTH = (255, 255, 255)
JPEG_QUALITY = 90


@dataclass(frozen=True)
class Shown:
    """An image of a batch as it goes into the network, RGB uint8 [H, W, 3] with its boxes, and what to say of it."""

    pixels: np.ndarray
    name: str
    caption: str


class Finder:
    """A checkpoint or an exported file that detects in images that are resized already."""

    def __init__(self, path: str, device: str, threshold: float) -> None:
        self.device = pick_device(device)
        self.model, self.config, self.classes = load_detector(path, self.device, score_threshold=threshold)
        self.path = path

    @torch.inference_mode()
    def find(self, images: Sequence[Tensor]) -> list[dict[str, Any]]:
        """Of each image uint8 [3, H, W]: boxes xyxy in its pixels, labels, names, scores."""
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


class Browser:
    """The batches of a split, in the order and with the chances that a training would meet them.

    Args:
        split: "train" (augmented) or "val".
        finder: what detects in them, or None.
    """

    def __init__(self, config: DetectionConfig, split: str, finder: Finder | None = None) -> None:
        self.dataset: DetectionDataset = build_dataset(config, split)
        self.split, self.finder = split, finder
        sizes, data = self.dataset.index.sizes, config.data
        self.batches: TrainBatchSampler | EvalBatchSampler
        if split == "train":
            self.batches = TrainBatchSampler(
                sizes, data.batch_size, config.seed, data.group_by_aspect, short_sides=data.multi_scale
            )
        else:
            self.batches = EvalBatchSampler(sizes, config.eval.batch_size or data.batch_size)

    def keys(self, number: int) -> list[SampleKey]:
        """What batch `number` holds, counted from 0 over all epochs; the val set is one epoch, over and over."""
        epoch, within = divmod(number, len(self.batches))
        if isinstance(self.batches, TrainBatchSampler):
            self.batches.set_epoch(epoch)
        return list(self.batches)[within]

    def batch(self, number: int) -> list[Shown]:
        """The images of a batch, each in the frame that all of them share, padded as for the network."""
        samples = [(key, self.dataset[key]) for key in self.keys(number)]
        good = [(key, *sample) for key, sample in samples if not isinstance(sample, UserError)]
        found = self.finder.find([image for _, image, _ in good]) if self.finder and good else None
        frame = [
            -(-max((image.shape[side] for _, image, _ in good), default=1) // DIVISOR) * DIVISOR for side in (1, 2)
        ]
        names = self.dataset.index.class_names
        shown = []
        for i, (key, image, target) in enumerate(good):
            canvas = _framed(image, frame[0], frame[1])
            detections = found[i] if found is not None else None
            _draw(canvas, target, names, detections)
            file_name = str(self.dataset.index.file_names[key.image])
            shown.append(Shown(canvas, file_name, _caption(file_name, image, target, names, detections)))
        for key, sample in samples:
            if isinstance(sample, UserError):
                empty = np.full((DIVISOR, DIVISOR, 3), FILL, np.uint8)
                shown.append(Shown(empty, str(self.dataset.index.file_names[key.image]), str(sample)))
        return shown

    def title(self, number: int) -> str:
        epoch, within = divmod(number, len(self.batches))
        of_epoch = f"epoch {epoch + 1}, " if self.split == "train" else ""
        return f"{of_epoch}batch {within + 1} of {len(self.batches)}"

    def section(self, number: int, album: html.Album) -> tuple[html.Section, list[Shown]]:
        """The part of a page for a batch."""
        shown = self.batch(number)
        for one in shown:
            album.add(one.pixels, one.caption, max_side=640)
        height, width = shown[0].pixels.shape[:2]
        lead = f"{len(shown)} images in a frame of {width}x{height} pixels."
        return html.Section(self.title(number), [album.gallery(300)], lead), shown

    def subtitle(self) -> str:
        source = self.dataset.index.source
        if self.finder is None:
            return f"{self.split}: {source}; grey is padding"
        return f"{self.split}: {source}; white: annotated, colored: detected by {self.finder.path}; grey is padding"


def browse(browser: Browser, out: Path, *, first: int, count: int, force: bool = False) -> Path:
    """Write out/index.html and a JPEG of each image of `count` batches; returns the page.

    Args:
        force: overwrite files that this toolkit did not write.

    Raises:
        UserError: the folder cannot be written to, or a file must not be overwritten.
    """

    def file_of(number: int, place: int) -> Path:
        return out / f"batch_{number:04d}_{place:02d}.jpg"

    numbers = range(first, first + count)
    outputs = [file_of(number, place) for number in numbers for place in range(len(browser.keys(number)))]
    index = browser.dataset.index
    inputs = [index.source, index.images, browser.finder and browser.finder.path]
    check_outputs([out / "index.html", *outputs], inputs, force=force)
    album = html.Album(max_bytes=20_000_000)
    sections = []
    for number in numbers:
        section, shown = browser.section(number, album)
        sections.append(section)
        for place, one in enumerate(shown):
            _, data = cv2.imencode(".jpg", one.pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
            write_output(file_of(number, place), lambda file, data=data: file.write(data.tobytes()))
    html.write_page(out / "index.html", "What the network sees", sections, subtitle=browser.subtitle())
    return out / "index.html"


def serve_links(number: int) -> Markup:
    """To the batches before and after, for a page that is served."""
    link = Markup('<a href="/{}" accesskey="{}">{}</a>')
    before = link.format(number - 1, "p", "← previous batch") + Markup(" &nbsp; ") if number > 0 else Markup("")
    return Markup("<p>{}{}</p>").format(before, link.format(number + 1, "n", "next batch →"))


def _framed(image: Tensor, height: int, width: int) -> np.ndarray:
    """uint8 [3, h, w] -> [height, width, 3] with the padding's colour to the right and below."""
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
        cv2.rectangle(pixels, (x1, y1), (x2, y2), TRUTH, 1)
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
    passed = f"; in place of a bad image: {target['skipped'][0]}" if target.get("skipped") else ""
    return f"{file_name}, {image.shape[2]}x{image.shape[1]}: {boxes}{more}{found}{passed}"
