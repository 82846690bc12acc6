"""Normalizes and batches a list of images on the device."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList


class NormalizeAndBatch(nn.Module):
    """Replaces torchvision's `GeneralizedRCNNTransform`, without its resize.

    Images are resized once, in the data pipeline, by the function that training, evaluation and
    prediction share (`detection.data.transforms.resize`). torchvision's `_skip_resize` holds in training only,
    and its `normalize` refuses uint8, which would send four times the bytes to the device.

    Args:
        mean, std: of RGB in [0, 1], the backbone's own.
        size_divisible: sides of the batch are padded (right and bottom, with the mean colour, i.e. zeros
            after normalisation) to a multiple of this.

    Attributes:
        canvas_size: (height, width) of every batch, as in a file exported with a fixed size. None: the smallest that
            holds the images of the batch.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], size_divisible: int = 32) -> None:
        super().__init__()
        self.size_divisible = size_divisible
        self.canvas_size: tuple[int, int] | None = None
        mean_, std_ = torch.tensor(mean), torch.tensor(std)
        self.register_buffer("scale", (1 / std_).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", (-mean_ / std_).view(3, 1, 1), persistent=False)

    def forward(
        self, images: Sequence[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[ImageList, list[dict[str, Tensor]] | None]:
        """Images [3, H, W], uint8 in [0, 255] or floating in [0, 1] -> ImageList of [N, 3, H', W'] float32."""
        sizes = []
        for image in images:
            if image.dim() != 3 or image.shape[0] != 3:
                raise ValueError(f"images must be [3, H, W], got {list(image.shape)}")
            sizes.append((image.shape[1], image.shape[2]))
        divisor = self.size_divisible
        height, width = self.canvas_size or (-(-max(side) // divisor) * divisor for side in zip(*sizes, strict=True))
        scale, shift = self.scale, self.shift
        batch = torch.zeros(len(sizes), 3, height, width, device=scale.device, dtype=scale.dtype)
        for slot, image, (h, w) in zip(batch, images, sizes, strict=True):
            unit = image.to(slot.device, slot.dtype, non_blocking=True)
            factor = scale / 255 if image.dtype == torch.uint8 else scale
            torch.addcmul(shift, unit, factor, out=slot[:, :h, :w])
        return ImageList(batch, sizes), targets

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """torchvision calls this to undo its resize. Here sizes are kept, so there is nothing to undo."""
        return result
