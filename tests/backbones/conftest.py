import pytest
import torch
from torch import nn


@pytest.fixture()
def as_trained():
    """Make a network's norms and scales like a trained one's: freshly built, some make whole blocks do nothing."""

    def randomize(network: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(0)
        for name, value in network.named_parameters():
            if value.dim() == 1:
                nn.init.uniform_(value, *((-0.2, 0.2) if name.endswith("bias") else (0.5, 1.5)), generator=generator)
        norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            network.train()(torch.randn(2, 3, 97, 131, generator=generator))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        return network.eval()

    return randomize
