"""Draws a redundancy report: pairs of maps side by side, with the predicted map and the residual."""

from collections.abc import Sequence

import cv2
import numpy as np
from torch import Tensor

from backbones.feature_redundancy import Pair, Redundancy

TILE = 200
GAP = 12
LEFT = 12
TOP = 92
CAPTION = 26
TEXT_WIDTH = 250
RESIDUAL_SCALE = 4
"""On the scale of the maps the residuals of good pairs would be all white."""
INK = (30, 30, 30)
PALE = (120, 120, 120)


def draw_pairs(redundancy: Redundancy, maps: Tensor, image: np.ndarray, *, title: str, pairs: int = 6) -> np.ndarray:
    """Draw one row for each pair: source, target, ghost, residual, the errors for each d, and the filter.

    Colors go from the 0.5th percentile of a map (dark) to the 99.5th; target and ghost have the same scale. The
    residual (target - ghost) is on that scale times four: white is zero, red is positive, blue is negative. Filter
    weights are white for zero, red for the largest positive value, blue for the largest negative one.

    Args:
        maps: [C, H, W] of `image`.
        image: RGB uint8 [H', W', 3], the input; shown in the first column.
        title: network, layer and image.

    Returns:
        BGR uint8, as OpenCV writes it.
    """
    shown = redundancy.pairs[:pairs]
    d = redundancy.ranked_by
    height, width = maps.shape[1:]
    tile = (TILE, max(1, round(TILE * height / width)))
    columns = ["input", "source", "target", f"ghost, d = {d}", f"residual x {RESIDUAL_SCALE}"]
    row_height = tile[1] + CAPTION
    canvas = np.full(
        (TOP + len(shown) * (row_height + GAP), 2 * LEFT + len(columns) * (tile[0] + GAP) + TEXT_WIDTH, 3),
        255,
        np.uint8,
    )
    _text(canvas, title, LEFT, 32, 0.75)
    for column, name in enumerate(columns):
        _text(canvas, name, LEFT + column * (tile[0] + GAP), TOP - 14, 0.55, PALE)
    _text(canvas, "MSE / variance", LEFT + len(columns) * (tile[0] + GAP) + GAP, TOP - 14, 0.55, PALE)
    for row, pair in enumerate(shown):
        top = TOP + row * (row_height + GAP)
        for column, map_image in enumerate(_tiles(pair, maps, d)):
            left = LEFT + (column + 1) * (tile[0] + GAP)
            _paste(canvas, map_image, left, top, tile)
            label = (f"map {pair.source}", f"map {pair.target}", f"{pair.source} > {pair.target}", "")[column]
            _text(canvas, label, left, top + tile[1] + 18, 0.5)
        _errors(canvas, pair, LEFT + len(columns) * (tile[0] + GAP) + GAP, top, tile[1], d)
    _paste(canvas, image[:, :, ::-1], LEFT, TOP, tile)
    return canvas


def _tiles(pair: Pair, maps: Tensor, d: int) -> Sequence[np.ndarray]:
    source, target = (maps[channel].double() for channel in (pair.source, pair.target))
    ghost = pair.predict(source, d)
    low, high = _range(target)
    residual = (target - ghost).numpy() * (RESIDUAL_SCALE / max(high - low, 1e-12))
    return (
        _colored(source.numpy(), *_range(source)),
        _colored(target.numpy(), low, high),
        _colored(ghost.numpy(), low, high),
        _diverging(residual),
    )


def _range(image: Tensor) -> tuple[float, float]:
    # A few extreme values would leave the rest of the map in one color.
    low, high = np.percentile(image.numpy(), (0.5, 99.5))
    return float(low), float(high)


def _colored(image: np.ndarray, low: float, high: float) -> np.ndarray:
    scaled = np.clip((image - low) / max(high - low, 1e-12), 0, 1)
    return cv2.applyColorMap(np.round(255 * scaled).astype(np.uint8), cv2.COLORMAP_VIRIDIS)


def _diverging(share: np.ndarray) -> np.ndarray:
    """Blue – white – red for -1 … 0 … 1."""
    strength = np.clip(np.abs(share), 0, 1)[:, :, None]
    full = np.where(share[:, :, None] > 0, np.array([38.0, 38, 178]), np.array([172.0, 76, 33]))
    return np.round(255 - strength * (255 - full)).astype(np.uint8)


def _errors(canvas: np.ndarray, pair: Pair, left: int, top: int, height: int, ranked_by: int) -> None:
    """A bar and a number for each d."""
    step = min(34, height // max(1, len(pair.errors)))
    for line, (d, error) in enumerate(pair.errors.items()):
        y = top + line * step
        _text(canvas, f"d = {d}", left, y + 17, 0.5, INK if d == ranked_by else PALE)
        _text(canvas, f"{error:.4f}", left + 58, y + 17, 0.5, INK if d == ranked_by else PALE)
        full = TEXT_WIDTH - 140
        cv2.rectangle(canvas, (left + 128, y + 6), (left + 128 + full, y + 18), (235, 235, 235), -1)
        end = left + 128 + round(full * min(1.0, error))
        cv2.rectangle(canvas, (left + 128, y + 6), (end, y + 18), (142, 84, 38), -1)
    below = top + step * len(pair.errors) + 8
    side = top + height - below
    if side >= 24:
        weights = pair.filters[ranked_by].numpy()
        _paste(canvas, _diverging(weights / max(np.abs(weights).max(), 1e-12)), left, below, (side, side))
        _text(canvas, f"filter, d = {ranked_by}", left + side + 10, below + 14, 0.5, PALE)


def _paste(canvas: np.ndarray, image: np.ndarray, left: int, top: int, size: tuple[int, int]) -> None:
    # Maps are enlarged without smoothing: each square is one position of the map.
    smaller = image.shape[1] > size[0]
    method = cv2.INTER_AREA if smaller else cv2.INTER_NEAREST
    canvas[top : top + size[1], left : left + size[0]] = cv2.resize(image, size, interpolation=method)
    cv2.rectangle(canvas, (left - 1, top - 1), (left + size[0], top + size[1]), (200, 200, 200), 1)


def _text(
    canvas: np.ndarray, text: str, left: int, baseline: int, size: float, ink: tuple[int, int, int] = INK
) -> None:
    # OpenCV's font has only ASCII letters.
    text = text.encode("ascii", "replace").decode()
    cv2.putText(canvas, text, (left, baseline), cv2.FONT_HERSHEY_SIMPLEX, size, ink, 1, cv2.LINE_AA)
