"""A detector that is ready for export."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from detection.runtime.metadata import OUTPUTS, Metadata


@dataclass
class ExportSpec:
    """A detector ready to be exported.

    Attributes:
        model: the PyTorch detector, on the CPU, in evaluation mode, fused.
        network: (images uint8 [N, H, W, 3], sizes int64 [N, 2]) -> the outputs of the form, as a tuple. The attribute
            `nms` of the end-to-end form is its NMS function, which an exporter may replace.
        metadata: of the file.
        example: example inputs for tracing.
    """

    model: Any
    network: nn.Module
    metadata: Metadata
    example: tuple[Tensor, Tensor]

    @property
    def outputs(self) -> tuple[str, ...]:
        return OUTPUTS[self.metadata.form]
