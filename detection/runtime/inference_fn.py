"""The one signature of what runs an exported detector, whatever the runtime."""

from collections.abc import Callable

import numpy as np

InferenceFn = Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]
"""images uint8 [N, H, W, 3], sizes int64 [N, 2] -> output name -> array; see detection/export/detector_ops.py."""
