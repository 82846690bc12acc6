"""Context managers for evaluation mode and forward hooks; both restore the network afterwards."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients. Restores the mode of each module, as frozen layers differ from the rest."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def forward_hooks(modules: Mapping[str, nn.Module], callback: Callable[[str, tuple, Any], None]) -> Iterator[None]:
    """Call `callback(name, arguments, output)` after each forward pass of one of the modules.

    A callback that stores an output must copy it, because the next layer may work in place.
    """

    def hook(name: str) -> Callable[..., None]:
        return lambda module, arguments, output: callback(name, arguments, output)

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
