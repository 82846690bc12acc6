"""Counts parameters, multiply-adds, activations and training memory of each module.

Papers on light networks call the multiply-adds of convolutions and matrix products "FLOPs". torch's FlopCounterMode
counts each multiply-add as two operations.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from backbones.hooks import forward_hooks


@dataclass(frozen=True)
class Cost:
    """The cost of one module, over all its calls in one forward pass.

    Attributes:
        parameters: number of parameters, shared ones counted once.
        macs: multiply-adds.
        activations: output elements of its convolutions and linear layers (arXiv 2003.13678); they predict the speed on
            a GPU better than multiply-adds.
    """

    parameters: int
    macs: int
    activations: int


def measure_cost(model: nn.Module, *inputs: Any) -> dict[str, Cost]:
    """Run `model(*inputs)` once and return the cost of every module by its name; "" is the whole model.

    With the model and the inputs on the meta device it is fast and allocates no memory.
    """
    activations = {name: 0 for name, _ in model.named_modules()}

    def count(name: str, args: tuple, output: torch.Tensor) -> None:
        for module in _with_parents(name):
            activations[module] += output.numel()

    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter, forward_hooks(layers, count):
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
    """Run `model(*inputs)` once and return the bytes of activations that training keeps, by module name; "" is the
    whole model.

    It counts the tensors that autograd saves for the backward pass, each storage once and in the module that saves it
    first, without parameters and buffers. Gradients and optimizer state are not included. In-place activations add
    nothing; `torch.cat` and each output that a batch norm or a convolution needs again do. The model runs in evaluation
    mode, because a batch norm cannot train on a single 1x1 map; dropout masks are therefore missing.
    """
    fixed = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[torch.UntypedStorage, str]] = {}
    inside = [""]

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in fixed:
            # Keep a reference to the storage so that its address is not reused.
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
    """The names of a module and its parents, "" (the whole model) first."""
    parts = name.split(".") if name else []
    return [".".join(parts[:end]) for end in range(len(parts) + 1)]
