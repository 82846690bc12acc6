"""What a network costs: parameters, multiply-adds and activations, module by module.

"FLOPs" in the papers of light networks are multiply-adds of convolutions and matrix products; so are they here.
torch's own counter counts each as two operations.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Cost:
    """Of one module, over all its calls in one forward pass.

    Attributes:
        parameters: learned numbers, each counted once.
        macs: multiply-adds.
        activations: numbers that its convolutions and linear layers put out (arXiv 2003.13678), which
            tell speed on a GPU better than multiply-adds do.
    """

    parameters: int
    macs: int
    activations: int


def measure_cost(model: nn.Module, *inputs: Any) -> dict[str, Cost]:
    """Run `model(*inputs)` once and return the cost of every module by its name; "" is the whole model.

    Model and inputs on the meta device make it a matter of moments, without memory or arithmetic.
    """
    activations: dict[str, int] = {}
    handles = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            parts = name.split(".") if name else []
            for end in range(len(parts) + 1):
                parent = ".".join(parts[:end])
                activations[parent] = activations.get(parent, 0) + output.numel()

        return hook

    for name, module in model.named_modules():
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            handles.append(module.register_forward_hook(watch(name)))
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter:
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    root = type(model).__name__
    flops = {name: sum(operators.values()) for name, operators in counter.get_flop_counts().items()}
    return {
        name: Cost(
            parameters=sum(p.numel() for p in module.parameters()),
            macs=flops.get(f"{root}.{name}" if name else "Global", 0) // 2,
            activations=activations.get(name, 0),
        )
        for name, module in model.named_modules()
    }
