"""Random seeds."""

import os
import random

import numpy as np
import torch

from detection.core import distributed


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed all random generators; the same in every process, so that all build the same network (see `seed_rank`).

    deterministic: use only algorithms that give the same bits each time; PyTorch warns where CUDA has none.
    """
    if deterministic:
        # cuBLAS reads it when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_rank(seed: int) -> None:
    """Give every process but the main one its own random numbers, for dropout and mixing, once the network is built."""
    if not distributed.is_main():
        seed_everything(seed + 1_000_003 * distributed.rank())
