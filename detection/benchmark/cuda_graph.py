"""Parts of a network recorded as CUDA graphs: their hundreds of small kernels are started by one call."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN

Capture = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]


def record_graphs(model: nn.Module) -> None:
    """Let the parts of a detector whose shapes are fixed by the image's be replayed; in place, for inference alone.

    They are backbone with neck and, of a RetinaNet, the head; of a Faster R-CNN, that of the proposals. What comes
    after depends on the numbers (how many boxes pass) and cannot be recorded.
    """
    head = model.rpn.head if isinstance(model, FasterRCNN) else model.get_submodule("head")
    for part in (model.get_submodule("backbone"), head):
        part.forward = GraphedCall(part.forward)  # type: ignore[method-assign]


class GraphedCall:
    """A function of a tensor or a list of tensors, recorded at the first call with each shape and replayed after.

    What it returns is overwritten by the next call with the same shapes.

    Args:
        function: gives tensors in any structure, the same for the same shapes, without waiting for the device.
        capture: records a call without arguments; returns what replays it, and its output.
    """

    def __init__(self, function: Callable[[Any], Any], capture: Capture | None = None) -> None:
        self.function = function
        self.capture = capture or capture_cuda
        self._recorded: dict[tuple, tuple[list[Tensor], Callable[[], None], Any]] = {}

    def __call__(self, inputs: Tensor | list[Tensor]) -> Any:
        given = [inputs] if isinstance(inputs, Tensor) else inputs
        key = tuple((tensor.shape, tensor.dtype) for tensor in given)
        if key not in self._recorded:
            held = [tensor.clone() for tensor in given]
            held_inputs = held[0] if isinstance(inputs, Tensor) else held
            self._recorded[key] = (held, *self.capture(lambda: self.function(held_inputs)))
        held, replay, output = self._recorded[key]
        for slot, tensor in zip(held, given, strict=True):
            slot.copy_(tensor)
        replay()
        return output


def capture_cuda(call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """Record what `call` does on the current CUDA device."""
    # As PyTorch's notes on CUDA graphs ask: some calls on a side stream first, so that libraries set themselves up.
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
