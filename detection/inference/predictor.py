"""`Predictor`: a checkpoint or an exported file becomes a function from an image to named boxes."""

import difflib
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
from detection.data.image_io import decode_image, read_image
from detection.data.transforms import resize, to_original, to_tensor
from detection.runtime.pytorch import load_detector, predict_batch

Detections = dict[str, Any]
PLAIN = ("1", "L", "LA", "RGB", "RGBA")
"""PIL's modes of which Pillow makes the same RGB as `read_image` does of a PNG or JPEG; alpha is left out."""


@dataclass(frozen=True)
class PreparedImage:
    """An image as the network takes it: uint8 [3, H', W'] RGB, resized by `scale` (x, y).

    `size` is the original's (height, width).
    """

    image: torch.Tensor
    scale: tuple[float, float]
    size: tuple[int, int]


class Detector(Protocol):
    """What detects in images for tools: `Predictor`, or `TiledPredictor` around one.

    Reading threads prepare images; `detect`, called from `num_streams` threads at the same time, takes what
    `prepare` returned.
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
        path: a checkpoint (best.pt or last.pt), or a file that tools/export.py made of one.
        device: "cpu", "cuda", "cuda:N", or None for CUDA where there is one.
        score_threshold: detections below it are not returned; in [0, 1].
        classes: names to keep; None keeps all.
        num_streams: number of threads that may call `detect` at the same time. They share the threads of the CPU
            (`torch.set_num_threads`, for the whole process). Two streams of one thread each process more images per
            second than one stream of two threads, which returns sooner for a single image.

    Raises:
        UserError: unreadable file, absent device, unknown class name, a threshold outside of [0, 1].
    """

    def __init__(
        self,
        path: str | Path,
        device: str | None = None,
        *,
        score_threshold: float = 0.3,
        classes: Iterable[str] | None = None,
        num_streams: int = 1,
    ) -> None:
        if not isinstance(score_threshold, int | float) or not 0 <= score_threshold <= 1:
            raise UserError(f"score_threshold must be a number between 0 and 1, not {score_threshold!r}")
        if num_streams < 1:
            raise UserError(f"num_streams must be 1 at least, not {num_streams}")
        self.num_streams = num_streams
        if num_streams > 1:
            torch.set_num_threads(max(1, torch.get_num_threads() // num_streams))
        self.device = pick_device(device or "auto")
        self.model, self.config, self.classes = load_detector(path, self.device, score_threshold=score_threshold)
        self.keep = None if classes is None else {self._label(name) for name in classes}

    def predict(self, image: Any) -> Detections:
        """Detect in one image.

        Args:
            image: a path, an RGB uint8 array [H, W, 3] (or grey [H, W]), a uint8 tensor [3, H, W], or a PIL image
                of any mode that can be read from a file (it is not turned by its EXIF orientation, as a file is).
                OpenCV's arrays are BGR: turn them with `cv2.cvtColor(image, cv2.COLOR_BGR2RGB)`.

        Returns:
            boxes   float32 [n, 4], xyxy in pixels of the image as given
            labels  int64 [n], 1…number of classes
            names   list of n class names
            scores  float32 [n], descending

        Raises:
            UserError: the file is absent or no image; the array has another shape or type.
        """
        return self.predict_batch([image])[0]

    def predict_batch(self, images: Sequence[Any]) -> list[Detections]:
        """As `predict`, for several images of any sizes in one pass of the network; none give []."""
        return self.detect([self.prepare(as_rgb(image)) for image in images])

    def prepare(self, image: np.ndarray, *, bgr: bool = False) -> PreparedImage:
        """An uint8 [H, W, 3] image, RGB or BGR, made ready for `detect`; meanwhile others can be detected in."""
        resized, scale = resize(image, self.config.data.short_side, self.config.data.long_side)
        if bgr:
            resized = cv2.cvtColor(resized, cv2.COLOR_BGR2RGB)
        return PreparedImage(to_tensor(resized), scale, (image.shape[0], image.shape[1]))

    @torch.inference_mode()
    def detect(self, prepared: Sequence[PreparedImage]) -> list[Detections]:
        """One pass of the network over prepared images; results are on the host and in pixels of the originals."""
        if not prepared:
            return []
        amp = self.config.train.amp if self.device.type == "cuda" else "off"
        outputs = predict_batch(self.model, [one.image for one in prepared], self.device, amp)
        found = []
        for output, one in zip(outputs, prepared, strict=True):
            boxes = to_original(output["boxes"].float().cpu(), one.scale, one.size)
            labels, scores = output["labels"].cpu().numpy(), output["scores"].float().cpu().numpy()
            order = np.argsort(-scores, kind="stable")
            if self.keep is not None:
                order = order[np.isin(labels[order], list(self.keep))]
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
        close = difflib.get_close_matches(name, self.classes.names, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise UserError(f"unknown class {name!r}{hint}; this model knows: {', '.join(self.classes.names)}")


def as_rgb(image: Any) -> np.ndarray:
    """Path, array, tensor or PIL image -> RGB uint8 [H, W, 3]. Raises UserError for anything else."""
    if isinstance(image, str | Path):
        return read_image(image)
    if isinstance(image, torch.Tensor):
        if image.dim() != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
            raise UserError(f"an image tensor must be uint8 [3, H, W], not {image.dtype} {list(image.shape)}")
        return image.cpu().numpy().transpose(1, 2, 0)
    if isinstance(image, PIL.Image.Image):
        return _of_pil(image)
    array = np.asarray(image)
    if array.dtype != np.uint8:
        hint = "; of 16 bits take (image >> 8).astype(np.uint8)" if array.dtype == np.uint16 else ""
        raise UserError(f"an image array must be uint8 in [0, 255], not {array.dtype}{hint}")
    if array.ndim == 2:
        array = np.repeat(array[:, :, None], 3, axis=2)
    if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise UserError(f"an image array must be [H, W, 3] (RGB) or [H, W], not {list(array.shape)}")
    return array


def _of_pil(image: PIL.Image.Image) -> np.ndarray:
    """As `read_image` makes it of a file, but not turned: whoever opened the image knows it as it is."""
    if image.mode in PLAIN and image.format != "TIFF":
        return np.asarray(image.convert("RGB"))
    # Each library has its own way from 16 bits, other color spaces and a TIFF's transparency to RGB: files' is taken.
    file = io.BytesIO()
    try:
        image.save(file, "TIFF", compression="raw")
    except (OSError, KeyError, ValueError):  # a mode that TIFF has no place for
        array = None
    else:
        array = decode_image(file.getvalue(), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if array is None:
        raise UserError(f"an image of PIL's mode {image.mode} cannot be used: scale it to 8 bits and mode L or RGB")
    return array
