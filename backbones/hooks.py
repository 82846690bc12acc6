"""Looking at a network at work without leaving a trace."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module's own mode comes back (frozen layers differ from the rest)."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def watched(modules: Mapping[str, nn.Module], see: Callable[[str, tuple, Any], None]) -> Iterator[None]:
    """Call see(name, arguments, output) whenever one of the modules has run. Copy what is kept: the layer that follows
    may work in place."""

    def hook(name: str) -> Callable[..., None]:
        return lambda module, arguments, output: see(name, arguments, output)

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
