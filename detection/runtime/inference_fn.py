"""The signature of a function that runs an exported detector, for all runtimes."""

from collections.abc import Callable

import numpy as np

InferenceFn = Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]
"""images uint8 [N, H, W, 3], sizes int64 [N, 2] -> output name -> array; see detection/export/detector_ops.py."""
