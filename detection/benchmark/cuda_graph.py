"""Captures parts of a network as CUDA graphs, so that one call launches their hundreds of small kernels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN

Capture = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]


def capture_graphs(model: nn.Module) -> None:
    """Replace the parts of a detector whose shapes depend only on the input size with CUDA graphs, in place.

    These are the backbone with the neck, and the head (in Faster R-CNN that of the RPN). The rest depends on the data
    (the number of boxes) and cannot be captured. The model can then be used for inference only.
    """
    head = model.rpn.head if isinstance(model, FasterRCNN) else model.get_submodule("head")
    for part in (model.get_submodule("backbone"), head):
        part.forward = GraphedCall(part.forward)  # type: ignore[method-assign]


class GraphedCall:
    """A function of a tensor or a list of tensors, captured at the first call with each shape and replayed afterwards.

    The next call with the same shapes overwrites the returned tensors.

    Args:
        function: returns tensors in any structure, which depends only on the shapes, without waiting for the device.
        capture: captures a call without arguments; returns a function that replays it, and its output.
    """

    def __init__(self, function: Callable[[Any], Any], capture: Capture | None = None) -> None:
        self.function = function
        self.capture = capture or capture_cuda
        self._captured: dict[tuple, tuple[list[Tensor], Callable[[], None], Any]] = {}

    def __call__(self, inputs: Tensor | list[Tensor]) -> Any:
        tensors = [inputs] if isinstance(inputs, Tensor) else inputs
        key = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        if key not in self._captured:
            static = [tensor.clone() for tensor in tensors]
            static_inputs = static[0] if isinstance(inputs, Tensor) else static
            self._captured[key] = (static, *self.capture(lambda: self.function(static_inputs)))
        static, replay, output = self._captured[key]
        for static_tensor, tensor in zip(static, tensors, strict=True):
            static_tensor.copy_(tensor)
        replay()
        return output


def capture_cuda(call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """Capture `call` as a CUDA graph on the current device."""
    # Warm-up calls on a side stream, as PyTorch's notes on CUDA graphs require.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    return graph.replay, output
