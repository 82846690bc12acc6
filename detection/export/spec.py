"""A detector made ready for an exporter."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from detection.runtime.metadata import OUTPUTS, Metadata


@dataclass
class ExportSpec:
    """A detector ready to be exported.

    Attributes:
        model: the PyTorch detector, on the CPU, in evaluation mode, fused.
        network: (images uint8 [N, H, W, 3], sizes int64 [N, 2]) -> the outputs of the form, as a tuple. The end-to-end
            form's attribute `nms` is how it suppresses boxes; a format may put its own in its place.
        metadata: of the file to be.
        example: inputs of a size and number that fit.
    """

    model: Any
    network: nn.Module
    metadata: Metadata
    example: tuple[Tensor, Tensor]

    @property
    def outputs(self) -> tuple[str, ...]:
        return OUTPUTS[self.metadata.form]
