"""`Predictor`: detects objects in images with a checkpoint or an exported file."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import PIL.Image
import torch

from detection.core.device import pick_device
from detection.core.errors import UserError
from detection.core.text import did_you_mean
from detection.data.image_io import decode_image, read_image
from detection.data.transforms import resize, to_original, to_tensor
from detection.runtime.pytorch import load_detector, own_resize, predict_batch
from detection.zoo.names import find_detector

Detections = dict[str, Any]
DIRECT_MODES = ("1", "L", "LA", "RGB", "RGBA")
"""PIL modes that Pillow converts to the same RGB as `read_image` does for a PNG or JPEG; alpha is dropped."""


@dataclass(frozen=True)
class PreparedImage:
    """An input of the network: uint8 [3, H', W'] RGB, resized by `scale` (x, y).

    `size` is (height, width) of the original image.
    """

    image: torch.Tensor
    scale: tuple[float, float]
    size: tuple[int, int]


class Detector(Protocol):
    """Protocol of `Predictor` and `TiledPredictor`.

    Reader threads call `prepare`; up to `num_streams` threads at the same time call `detect` with its results.
    """

    num_streams: int

    def prepare(self, image: np.ndarray, *, bgr: bool = False) -> Any: ...

    def detect(self, prepared: Sequence[Any]) -> list[Detections]: ...


class Predictor:
    """Detects objects in images.

    >>> predictor = Predictor("runs/demo/best.pt")
    >>> found = predictor.predict("photo.jpg")
    >>> found["names"], found["boxes"]

    Args:
        path: a checkpoint (best.pt or last.pt), an exported file, the name of a detector that comes with the toolkit
            (`tools/models.py` lists them), or hf:OWNER/NAME.
        device: "cpu", "cuda", "cuda:N", or None for CUDA if it is available.
        score_threshold: in [0, 1]; detections below it are not returned.
        classes: names of the classes to return; None: all.
        num_streams: number of threads that may call `detect` at the same time. They share the threads of the CPU
            (`torch.set_num_threads`, for the whole process). Two streams of one thread each process more images per
            second than one stream of two threads, which returns sooner for a single image.
        adapter: for an ONNX file of another project: "yolox", "yolov8", … or a YAML file (docs/labelling.md).

    Raises:
        UserError: unreadable file, missing device, unknown class name, or a threshold outside [0, 1].
    """

    def __init__(
        self,
        path: str | Path,
        device: str | None = None,
        *,
        score_threshold: float = 0.3,
        classes: Iterable[str] | None = None,
        num_streams: int = 1,
        adapter: str | Path | None = None,
    ) -> None:
        if not isinstance(score_threshold, int | float) or not 0 <= score_threshold <= 1:
            raise UserError(f"score_threshold must be a number between 0 and 1, not {score_threshold!r}")
        if num_streams < 1:
            raise UserError(f"num_streams must be at least 1, not {num_streams}")
        self.num_streams = num_streams
        if num_streams > 1:
            torch.set_num_threads(max(1, torch.get_num_threads() // num_streams))
        self.device = pick_device(device or "auto")
        self.model, self.config, self.classes = load_detector(
            find_detector(path), self.device, score_threshold=score_threshold, adapter=adapter
        )
        self._resize = own_resize(self.model)
        self.labels = None if classes is None else {self._label(name) for name in classes}

    def predict(self, image: Any) -> Detections:
        """Detect objects in one image.

        Args:
            image: a path, an RGB uint8 array [H, W, 3] (or gray [H, W]), a uint8 tensor [3, H, W], or a PIL image of
                any mode that files can have. Files are rotated by their EXIF orientation, PIL images are not. OpenCV's
                arrays are BGR: convert them with `cv2.cvtColor(image, cv2.COLOR_BGR2RGB)`.

        Returns:
            boxes   float32 [n, 4], xyxy in pixels of the given image
            labels  int64 [n], 1…number of classes
            names   list of n class names
            scores  float32 [n], descending

        Raises:
            UserError: the file is missing or not an image; the array has another shape or dtype.
        """
        return self.predict_batch([image])[0]

    def predict_batch(self, images: Sequence[Any]) -> list[Detections]:
        """As `predict`, for several images of any sizes in one forward pass; [] for no images."""
        return self.detect([self.prepare(as_rgb(image)) for image in images])

    def prepare(self, image: np.ndarray, *, bgr: bool = False) -> PreparedImage:
        """Resize a uint8 [H, W, 3] image, RGB or BGR, for `detect`. Can run while `detect` processes other images."""
        if self._resize is None:
            resized, scale = resize(image, self.config.data.short_side, self.config.data.long_side)
        else:
            resized = self._resize(image)
            scale = resized.shape[1] / image.shape[1], resized.shape[0] / image.shape[0]
        if bgr:
            resized = cv2.cvtColor(resized, cv2.COLOR_BGR2RGB)
        return PreparedImage(to_tensor(resized), scale, (image.shape[0], image.shape[1]))

    @torch.inference_mode()
    def detect(self, prepared: Sequence[PreparedImage]) -> list[Detections]:
        """Detect objects in prepared images in one forward pass; results are on the CPU, in pixels of the originals."""
        if not prepared:
            return []
        amp = self.config.train.amp if self.device.type == "cuda" else "off"
        outputs = predict_batch(self.model, [one.image for one in prepared], self.device, amp)
        found = []
        for output, one in zip(outputs, prepared, strict=True):
            boxes = to_original(output["boxes"].float().cpu(), one.scale, one.size)
            labels, scores = output["labels"].cpu().numpy(), output["scores"].float().cpu().numpy()
            order = np.argsort(-scores, kind="stable")
            if self.labels is not None:
                order = order[np.isin(labels[order], list(self.labels))]
            found.append(
                {
                    "boxes": boxes.numpy()[order],
                    "labels": labels[order],
                    "names": [self.classes.names[label - 1] for label in labels[order]],
                    "scores": scores[order],
                }
            )
        return found

    def _label(self, name: str) -> int:
        if name in self.classes.names:
            return self.classes.names.index(name) + 1
        hint = did_you_mean(name, self.classes.names)
        raise UserError(f"unknown class {name!r}{hint}; classes of this model: {', '.join(self.classes.names)}")


def as_rgb(image: Any) -> np.ndarray:
    """Path, array, tensor or PIL image -> RGB uint8 [H, W, 3]. Raises UserError for anything else."""
    if isinstance(image, str | Path):
        return read_image(image)
    if isinstance(image, torch.Tensor):
        if image.dim() != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
            raise UserError(f"an image tensor must be uint8 [3, H, W], not {image.dtype} {list(image.shape)}")
        return image.cpu().numpy().transpose(1, 2, 0)
    if isinstance(image, PIL.Image.Image):
        return _pil_to_rgb(image)
    array = np.asarray(image)
    if array.dtype != np.uint8:
        hint = "; convert 16 bits with (image >> 8).astype(np.uint8)" if array.dtype == np.uint16 else ""
        raise UserError(f"an image array must be uint8 in [0, 255], not {array.dtype}{hint}")
    if array.ndim == 2:
        array = np.repeat(array[:, :, None], 3, axis=2)
    if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise UserError(f"an image array must be [H, W, 3] (RGB) or [H, W], not {list(array.shape)}")
    return array


def _pil_to_rgb(image: PIL.Image.Image) -> np.ndarray:
    """Convert a PIL image to RGB as `read_image` does for a file, but without the EXIF rotation."""
    if image.mode in DIRECT_MODES and image.format != "TIFF":
        return np.asarray(image.convert("RGB"))
    # Libraries convert 16 bits, other color spaces and the transparency of a TIFF differently; use the one for files.
    file = io.BytesIO()
    try:
        image.save(file, "TIFF", compression="raw")
    except (OSError, KeyError, ValueError):  # a mode that TIFF does not support
        array = None
    else:
        array = decode_image(file.getvalue(), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if array is None:
        raise UserError(f"PIL mode {image.mode} is not supported; convert the image to 8 bits and mode L or RGB")
    return array
