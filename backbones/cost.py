"""What a network costs: parameters, multiply-adds and activations, module by module.

"FLOPs" in the papers of light networks are multiply-adds of convolutions and matrix products; so are they here.
torch's own counter counts each as two operations.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from backbones.hooks import watched


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
    activations = {name: 0 for name, _ in model.named_modules()}

    def count(name: str, args: tuple, output: torch.Tensor) -> None:
        for module in _with_parents(name):
            activations[module] += output.numel()

    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter, watched(layers, count):
        model(*inputs)
    root = type(model).__name__
    flops = {name: sum(operators.values()) for name, operators in counter.get_flop_counts().items()}
    return {
        name: Cost(
            parameters=sum(p.numel() for p in module.parameters()),
            macs=flops.get(f"{root}.{name}" if name else "Global", 0) // 2,
            activations=activations[name],
        )
        for name, module in model.named_modules()
    }


def measure_memory(model: nn.Module, *inputs: Any) -> dict[str, int]:
    """Run `model(*inputs)` once and return the bytes that training would keep of it, by module name; "" is the whole.

    Counted is what autograd saves for the backward pass: inputs and outputs of layers, each storage once and
    in the module that saves it first, without parameters and buffers. In-place activations cost nothing here, a
    `torch.cat` does, and so does each output that a batch norm or a convolution needs again. Gradients and the
    optimizer come on top. The model is run in evaluation mode, as a batch norm cannot train on a single 1x1 map;
    dropout's masks are therefore missing.
    """
    fixed = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[torch.UntypedStorage, str]] = {}
    inside = [""]

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in fixed:
            # The storage itself is held so that no later one can be mistaken for it.
            kept.setdefault(storage._cdata, (storage, inside[-1]))
        return tensor

    def enter(name: str) -> Any:
        return lambda module, args: inside.append(name)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        inside.pop()

    handles = []
    for name, module in model.named_modules():
        handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
    training = model.training
    model.eval()
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            model(*inputs)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    memory = {name: 0 for name, _ in model.named_modules()}
    for storage, name in kept.values():
        for module_name in _with_parents(name):
            memory[module_name] += storage.nbytes()
    return memory


def _with_parents(name: str) -> list[str]:
    """A module's name and those of the modules that it is in, "" (the whole model) first."""
    parts = name.split(".") if name else []
    return [".".join(parts[:end]) for end in range(len(parts) + 1)]
