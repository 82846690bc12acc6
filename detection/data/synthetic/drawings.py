"""Draws the parts of the demo's scenes: six classes as polygons, backgrounds, and distractors."""

import colorsys
from collections.abc import Callable
from itertools import pairwise

import cv2
import numpy as np

Colour = tuple[int, int, int]
Region = tuple[slice, slice]
Part = tuple[np.ndarray, Colour]  # a filled polygon: (n, 2) points in [-1, 1] with y downwards, and its RGB

_SUPERSAMPLE = 4

# ---------------------------------------------------------------- shapes: polygons in the unit square


def _colour(rng: np.random.Generator, hue: float, sat: float, val: float, jitter: float = 0.03) -> Colour:
    """RGB near the given HSV (hue in turns). The hue varies by `jitter`, saturation and value by three times that."""
    h = (hue + rng.uniform(-jitter, jitter)) % 1.0
    s, v = (float(np.clip(c + rng.uniform(-3, 3) * jitter, 0, 1)) for c in (sat, val))
    r, g, b = colorsys.hsv_to_rgb(h, s, v)
    return int(255 * r), int(255 * g), int(255 * b)


def _tone(colour: Colour, factor: float) -> Colour:
    r, g, b = (min(255, int(c * factor)) for c in colour)
    return r, g, b


def _oval(cx: float, cy: float, rx: float, ry: float, start: float = 0, stop: float = 360) -> np.ndarray:
    """Points on an ellipse from angle `start` to `stop` in degrees; 270 is its top."""
    t = np.radians(np.linspace(start, stop, 40))
    return np.stack([cx + rx * np.cos(t), cy + ry * np.sin(t)], axis=1)


def _bend(a: np.ndarray, control: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Points on the quadratic Bézier curve from a to b with the control point `control`."""
    t = np.linspace(0, 1, 12)[:, None]
    return (1 - t) ** 2 * a + 2 * t * (1 - t) * control + t**2 * b


def _poly(*points: tuple[float, float]) -> np.ndarray:
    return np.array(points, dtype=float)


def _ghost(rng: np.random.Generator) -> list[Part]:
    body, dark = _colour(rng, 0.6, 0.1, 0.94), _colour(rng, 0.68, 0.5, 0.17)
    waves, depth, t = int(rng.integers(3, 5)), rng.uniform(0.16, 0.28), np.linspace(0, 1, 60)
    hem = np.abs(np.sin(np.pi * waves * t)) ** rng.choice([1.0, 2.0])  # pointed or soft waves
    hem_line = np.stack([0.8 - 1.6 * t, 0.97 - depth * hem], axis=1)
    outline = np.concatenate([_oval(0, -0.25, 0.68, 0.75, 180, 360), hem_line])
    outline[:, 0] += rng.uniform(-0.25, 0.25) * np.maximum(0, outline[:, 1] + 0.2) ** 2  # the hem sways to one side
    lift, parts = rng.uniform(-0.15, 0.15), []
    for side in (-1, 1):
        parts.append((_oval(0.74 * side, 0.12 + side * lift, 0.22, 0.14), _tone(body, 0.93)))
    parts.append((outline, body))
    look, eye_h, mouth = rng.uniform(-0.1, 0.1), rng.uniform(0.14, 0.21), rng.uniform(0.07, 0.2)
    for side in (-1, 1):
        x = 0.26 * side + look
        parts.append((_oval(x + 0.2 * side, -0.08, 0.11, 0.07), (246, 176, 190)))
        parts.append((_oval(x, -0.35, 0.13, eye_h), dark))
        parts.append((_oval(x + 0.04, -0.42, 0.045, 0.06), (255, 255, 255)))
    parts.append((_oval(look, 0.07, rng.uniform(0.1, 0.18), mouth), dark))
    return parts


def _pumpkin(rng: np.random.Generator) -> list[Part]:
    skin = _colour(rng, 0.07, 0.88, 0.95, 0.02)
    lit = (255, 226, 96) if rng.random() < 0.6 else (62, 26, 12)
    tip = rng.uniform(-0.35, 0.35)
    left = _bend(np.array([-0.15, -0.45]), np.array([-0.12, -0.75]), np.array([tip - 0.1, -0.95]))
    right = _bend(np.array([tip + 0.1, -0.9]), np.array([0.1, -0.7]), np.array([0.17, -0.45]))
    parts: list[Part] = [(np.concatenate([left, right]), _colour(rng, 0.27, 0.6, 0.45))]
    for x, rx, ry, tone in ((0.56, 0.42, 0.62, 0.74), (0.3, 0.44, 0.69, 0.87), (0.0, 0.36, 0.72, 1.0)):
        parts += [(_oval(side * x, 0.17, rx, ry), _tone(skin, tone)) for side in (-1, 1)]
    eye, smile = rng.uniform(0.14, 0.2), rng.uniform(0.12, 0.3)
    for side in (-1, 1):
        x = 0.34 * side
        parts.append((_poly((x - eye, 0.08), (x + eye, 0.08), (x + 0.06 * side, 0.08 - 1.9 * eye)), lit))
    parts.append((_poly((-0.08, 0.28), (0.08, 0.28), (0, 0.14)), lit))
    along = np.linspace(-0.58, 0.58, 13)
    arc = 1 - (along / 0.58) ** 2
    upper = np.stack([along, 0.38 + 0.35 * smile * arc], axis=1)
    lower = np.stack([along, 0.38 + 0.32 * arc + 0.3 * smile], axis=1)
    lower[0], lower[-1] = upper[0], upper[-1]
    upper[[3, 9], 1] += 0.12  # teeth
    lower[6, 1] -= 0.14
    parts.append((np.concatenate([upper, lower[::-1]]), lit))
    return parts


def _bat(rng: np.random.Generator) -> list[Part]:
    fur = _colour(rng, 0.76, 0.45, rng.uniform(0.2, 0.38), 0.04)
    eye = (255, 214, 70) if rng.random() < 0.6 else (240, 70, 60)
    parts: list[Part] = []
    for side in (-1, 1):
        lift = rng.uniform(-0.12, 0.2)
        wrist, tip = np.array([0.5, -0.38 - lift]), np.array([1.0, -0.12 - lift])
        toes = [tip, np.array([0.7, 0.26 - 0.5 * lift]), np.array([0.38, 0.34]), np.array([0.06, 0.3])]
        scallops = [_bend(a, (a + b) / 2 + [0, -0.22], b) for a, b in pairwise(toes)]
        lead = _bend(np.array([0.05, -0.2]), np.array([0.3, -0.15]), wrist)
        edge = _bend(wrist, np.array([0.85, -0.42 - lift]), tip)
        mirror = np.array([side, 1.0])
        parts.append((np.concatenate([lead, edge, *scallops]) * mirror, fur))
        for toe in toes[1:3]:  # the fingers in the wing
            finger = np.stack([wrist, np.add(wrist, (0.04, 0.03)), toe])
            parts.append((finger * mirror, _tone(fur, 1.45)))
    for side in (-1, 1):
        parts.append((_poly((0.04 * side, -0.4), (0.22 * side, -0.3), (0.19 * side, -0.66)), fur))
    parts += [(_oval(0, 0.1, 0.17, 0.36), _tone(fur, 1.1)), (_oval(0, -0.27, 0.21, 0.19), _tone(fur, 1.15))]
    for side in (-1, 1):
        parts.append((_oval(0.085 * side, -0.3, 0.055, 0.06), eye))
        fang = _poly((0.025, -0.17), (0.075, -0.17), (0.05, -0.09)) * [side, 1]
        parts.append((fang, (250, 245, 240)))
    return parts


def _moon(rng: np.random.Generator) -> list[Part]:
    glow = _colour(rng, 0.14, 0.5, 0.96, 0.025)
    thick = rng.uniform(0.95, 1.2)
    shift = thick * rng.uniform(0.6, 0.75)
    bite = 1 + shift - thick  # radius of the circle that is cut out, its centre at (shift, 0)
    x = (1 + shift**2 - bite**2) / (2 * shift)  # where the two circles meet
    y = np.sqrt(1 - x**2)
    outer, inner = np.degrees(np.arctan2(y, x)), np.degrees(np.arctan2(y, x - shift))
    back = _oval(shift, 0, bite, bite, 360 - inner, inner)
    parts: list[Part] = [(np.concatenate([_oval(0, 0, 1, 1, outer, 360 - outer), back]), glow)]
    for angle in rng.permutation(np.arange(135, 230, 22))[: rng.integers(2, 5)]:
        a, r = np.radians(angle), rng.uniform(0.05, 0.1)
        at = 1 - thick * rng.uniform(0.25, 0.55)
        parts.append((_oval(at * np.cos(a), at * np.sin(a), r, r), _tone(glow, 0.84)))
    return parts


def _candle(rng: np.random.Generator) -> list[Part]:
    wax, r, top = _colour(rng, 0.57, 0.65, 0.85), rng.uniform(0.25, 0.36), rng.uniform(-0.35, 0.0)
    parts: list[Part] = []
    if rng.random() < 0.4:  # a dish
        brass = _colour(rng, 0.11, 0.55, 0.6)
        parts += [(_oval(0, 0.86, 0.62, 0.14), _tone(brass, 0.75)), (_oval(0, 0.82, 0.62, 0.12), brass)]
    parts.append((np.concatenate([_oval(0, top, r, 0.08, 180, 360), _oval(0, 0.86, r, 0.1, 0, 180)]), wax))
    parts.append((_poly((0.45 * r, top), (r, top), (r, 0.86), (0.45 * r, 0.93)), _tone(wax, 0.78)))
    if rng.random() < 0.35:  # stripes around it
        for y in np.arange(top + 0.2, 0.75, 0.28):
            parts.append((_poly((-r, y), (r, y + 0.1), (r, y + 0.2), (-r, y + 0.1)), _tone(wax, 0.62)))
    for x in (-0.7, 0.1, 0.75):  # wax that ran down
        drip = rng.uniform(0.1, 0.35)
        parts.append((_oval(x * r, top + drip / 2, 0.26 * r, drip / 2 + 0.05), _tone(wax, 1.12)))
    parts += [(_oval(0, top, r, 0.08), _tone(wax, 1.18))]
    parts.append((_poly((-0.03, top), (0.03, top), (0.03, top - 0.16), (-0.03, top - 0.16)), (50, 36, 30)))
    t, lean = np.linspace(0, 2 * np.pi, 40), rng.uniform(-0.1, 0.1)
    for size, flame in ((1.0, (255, 150, 40)), (0.68, (255, 218, 90)), (0.36, (255, 250, 215))):
        length = size * (top + 0.9)
        half_width = 0.24 * size * np.sin(t) * np.sin(t / 2) ** 1.5
        drop = np.stack([half_width, (0.5 + 0.5 * np.cos(t)) * -length], axis=1)
        drop[:, 0] += lean * (drop[:, 1] / length) ** 2 * size
        parts.append((np.add(drop, (0, top - 0.08)), flame))
    return parts


def _star(rng: np.random.Generator) -> list[Part]:
    paint, inner = _colour(rng, 0.93, 0.6, 0.95), rng.uniform(0.43, 0.54)
    angle = np.radians(np.arange(10) * 36 - 90)
    radius = np.where(np.arange(10) % 2 == 0, 1.0, inner)
    rim = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    parts: list[Part] = [(rim, paint)]
    for i in range(0, 10, 2):  # the right half of each point is darker: a faceted star
        parts.append((np.stack([rim[i], rim[i + 1], np.zeros(2)]), _tone(paint, 0.78)))
    return parts


Painter = Callable[[np.random.Generator], list[Part]]
PAINTERS: tuple[Painter, ...] = (_ghost, _pumpkin, _bat, _moon, _candle, _star)  # in the order of CLASSES


# ---------------------------------------------------------------- from polygons to pixels


def random_transform(rng: np.random.Generator, any_angle: bool) -> np.ndarray:
    """A random matrix [2, 2] of a left-right flip, a stretch by up to 15 % and a rotation; it preserves areas."""
    limit, stretch = 180 if any_angle else 20, rng.uniform(0.87, 1.15)
    a = np.radians(rng.uniform(-limit, limit))
    turn = np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
    return turn @ np.diag([stretch * rng.choice([-1.0, 1.0]), 1 / stretch])


def fill(parts: list[Part], matrix: np.ndarray, factor: int) -> np.ndarray:
    """Fill the polygons in order on a tight canvas, enlarged by `factor`; returns uint8 [h, w, 4] RGBA."""
    placed = [points @ matrix.T for points, _ in parts]
    stacked = np.concatenate(placed)
    low = np.floor(stacked.min(0)) - 1
    width, height = (np.ceil(stacked.max(0)) + 1 - low).astype(int)
    canvas = np.zeros((height * factor, width * factor, 4), np.uint8)
    for points, (_, colour) in zip(placed, parts, strict=True):
        fixed = np.round((points - low) * factor * 16).astype(np.int32)  # 4 fractional bits
        cv2.fillPoly(canvas, [fixed], (*colour, 255), shift=4)
    return canvas


def render(parts: list[Part], matrix: np.ndarray, shade: float) -> np.ndarray:
    """A tile float32 [h, w, 4], lit from above left: RGB (0 to 255) multiplied by alpha, and alpha (0 to 1)."""
    large, scale = fill(parts, matrix, _SUPERSAMPLE), 1 / _SUPERSAMPLE
    tile = cv2.resize(large, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA).astype(np.float32)
    tile[..., 3] /= 255
    h, w = tile.shape[:2]
    ramp = (np.linspace(0, 1, h)[:, None] + np.linspace(0, 1, w)[None]) / 2
    depth = cv2.GaussianBlur(tile[..., 3], (0, 0), max(1.0, (h + w) / 30))  # small near the outline
    light = (1 + shade * (0.35 - ramp)) * (1 - shade * (1 - depth))
    tile[..., :3] = np.minimum(tile[..., :3] * light[..., None], 255 * tile[..., 3:])
    return tile


def _window(tile: np.ndarray, x: int, y: int, shape: tuple[int, ...]) -> tuple[Region, Region]:
    """Slices of the image and of the tile for a tile whose top left corner is at (x, y)."""
    x0, y0 = max(x, 0), max(y, 0)
    x1, y1 = max(x0, min(x + tile.shape[1], shape[1])), max(y0, min(y + tile.shape[0], shape[0]))
    return (slice(y0, y1), slice(x0, x1)), (slice(y0 - y, y1 - y), slice(x0 - x, x1 - x))


def mask_on(tile: np.ndarray, x: int, y: int, shape: tuple[int, ...]) -> np.ndarray:
    """The pixels of the image that the tile covers, bool [H, W]."""
    mask = np.zeros(shape[:2], bool)
    at, part = _window(tile, x, y, shape)
    mask[at] = tile[part][..., 3] > 0.5
    return mask


def paste(image: np.ndarray, tile: np.ndarray, x: int, y: int) -> None:
    """Blend a tile into the float RGB image, in place.

    If object and surroundings are of similar brightness, a soft halo changes the surroundings, so that every object is
    visible on any background.
    """
    reach = max(3, round(0.12 * max(tile.shape[:2])))
    wide = np.pad(tile, ((reach, reach), (reach, reach), (0, 0)))
    at, part = _window(wide, x - reach, y - reach, image.shape)
    wide, region = wide[part], image[at]
    alpha = wide[..., 3:]
    around = cv2.GaussianBlur(wide[..., 3], (0, 0), reach / 2)[..., None] * (1 - alpha)
    if alpha.any() and around.any():
        own, others = wide[..., :3].sum() / alpha.sum() / 3, (region * around).sum() / around.sum() / 3
        strength = float(np.clip(1.1 - abs(own - others) / 90, 0.0, 0.8))
        target = 20.0 if own > others and own > 95 else 215.0  # a dark bat at night gets a bright halo
        region = region + (target - region) * np.minimum(1, 1.6 * around) * strength
        image[at] = region * (1 - alpha) + wide[..., :3]


# ---------------------------------------------------------------- backgrounds

_SKIES: tuple[tuple[Colour, Colour], ...] = (
    ((14, 16, 46), (52, 42, 98)),  # night
    ((44, 34, 92), (222, 120, 78)),  # dusk
    ((22, 42, 44), (60, 96, 82)),  # forest
    ((112, 128, 150), (176, 182, 190)),  # fog
    ((96, 70, 60), (132, 98, 78)),  # a brown wall
    ((72, 62, 92), (104, 92, 124)),  # a violet wall
)
# Colours of the classes for distractors: ghost, pumpkin, bat, moon, candle, star.
_PLAIN_HSV = (
    (0.6, 0.1, 0.94), (0.07, 0.88, 0.95), (0.76, 0.45, 0.3), (0.14, 0.5, 0.96), (0.57, 0.65, 0.85), (0.93, 0.6, 0.95),
)  # fmt: skip


def _noise(rng: np.random.Generator, shape: tuple[int, int], cell: float) -> np.ndarray:
    small = rng.normal(size=(int(shape[0] / cell) + 2, int(shape[1] / cell) + 2)).astype(np.float32)
    return cv2.resize(small, shape[::-1], interpolation=cv2.INTER_CUBIC)[..., None]


def background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Sky or wall, hills, branches, windows and distractors; returns float32 [height, width, 3] RGB."""
    kind = int(rng.integers(len(_SKIES)))
    top, bottom = (np.array(c) + rng.uniform(-14, 14, 3) for c in _SKIES[kind])
    ramp = np.linspace(0, 1, height)[:, None, None] ** rng.uniform(0.7, 1.5)
    image: np.ndarray = np.broadcast_to(top * (1 - ramp) + bottom * ramp, (height, width, 3))
    for cell, amplitude in ((48, 9), (14, 5), (5, 3)):
        image = image + amplitude * rng.uniform(0.3, 1.2) * _noise(rng, (height, width), cell)
    image = np.ascontiguousarray(np.clip(image, 0, 255).astype(np.uint8))  # cv2 draws smooth lines only on 8 bits
    mean = image.mean((0, 1))

    def shade(low: float, high: float) -> Colour:
        r, g, b = (int(c) for c in np.clip(mean * rng.uniform(low, high), 0, 255))
        return r, g, b

    if kind >= 4:  # walls: bricks or panels
        line, step = shade(0.72, 0.85), int(rng.integers(22, 44))
        for row, y in enumerate(range(0, height, step)):
            cv2.line(image, (0, y), (width, y), line, 1, cv2.LINE_AA)
            for x in range((row % 2) * step, width, 2 * step):
                cv2.line(image, (x, y), (x, y + step), line, 1, cv2.LINE_AA)
    else:
        for _ in range(int(rng.integers(0, 60)) if kind < 2 else 0):  # distant stars: single pixels
            image[rng.integers(height // 2), rng.integers(width)] = (214, 214, 220)
        xs = np.arange(-8, width + 9, 8)
        for layer in range(int(rng.integers(0, 4))):  # hills; nearer ones are darker
            waves = 0.09 * np.sin(xs / rng.uniform(20, 70) + rng.uniform(0, 6))
            waves += 0.04 * np.sin(xs / rng.uniform(10, 30))
            crest = np.stack([xs, height * (0.62 + 0.12 * layer + waves)], axis=1)
            ridge = np.concatenate([crest, [[width + 9, height + 9], [-9, height + 9]]])
            tone = 0.82 - 0.14 * layer
            cv2.fillPoly(image, [ridge.astype(np.int32)], shade(tone - 0.04, tone + 0.04), cv2.LINE_AA)
    for _ in range(int(rng.integers(0, 3)) if rng.random() < 0.5 else 0):  # lit windows
        w, h = int(rng.integers(24, 50)), int(rng.integers(30, 64))
        x0, y0 = int(rng.integers(-10, width - 10)), int(rng.integers(-10, height - 10))
        cv2.rectangle(image, (x0, y0), (x0 + w, y0 + h), _colour(rng, 0.12, 0.55, 0.75), -1)
        frame = shade(0.3, 0.5)
        cv2.rectangle(image, (x0, y0), (x0 + w, y0 + h), frame, 2)
        cv2.line(image, (x0 + w // 2, y0), (x0 + w // 2, y0 + h), frame, 2)
        cv2.line(image, (x0, y0 + h // 2), (x0 + w, y0 + h // 2), frame, 2)
    for _ in range(int(rng.integers(1, 4)) if rng.random() < 0.5 else 0):  # branches from the sides
        at = np.array([rng.choice([0.0, width]), rng.uniform(0, height)])
        heading = rng.uniform(-0.6, 0.6) + (np.pi if at[0] else 0)
        bark = shade(0.3, 0.6)
        for thick in range(5, 0, -1):
            end = at + rng.uniform(14, 34) * np.array([np.cos(heading), np.sin(heading)])
            twig = at + rng.uniform(12, 30) * np.array([np.cos(heading + 0.8), np.sin(heading + 0.8)])
            for to, size in ((end, thick), (twig, max(1, thick // 2))):
                cv2.line(image, at.astype(int).tolist(), to.astype(int).tolist(), bark, size, cv2.LINE_AA)
            at, heading = end, heading + rng.uniform(-0.5, 0.5)
    image = image.astype(np.float32)
    for _ in range(int(rng.integers(0, 3))):
        tile = render(_distractor(rng), random_transform(rng, True) * rng.uniform(6, 34), 0.4)
        paste(image, tile, int(rng.integers(-15, width - 15)), int(rng.integers(-15, height - 15)))
    return image


def _distractor(rng: np.random.Generator) -> list[Part]:
    """A plain shape in the colour of a class, so that colour alone does not identify a class."""
    paint = _colour(rng, *_PLAIN_HSV[rng.integers(len(_PLAIN_HSV))])
    square = _poly((-1, -1), (1, -1), (1, 1), (-1, 1))
    triangle = _poly((-0.9, 0.8), (0.9, 0.8), (0, -0.9))
    shapes = [_oval(0, 0, 1, 1), _oval(0, 0, 1, 0.55), triangle, square * [1, 0.6], square * [0.35, 1]]
    shape = int(rng.integers(len(shapes)))
    parts: list[Part] = [(shapes[shape], paint)]
    if shape >= 3 and rng.random() < 0.6:  # a striped box
        low, high = shapes[shape].min(0), shapes[shape].max(0)
        for y in np.linspace(low[1], high[1], 7)[1:-1:2]:
            stripe = _poly((low[0], y), (high[0], y), (high[0], y + 0.15), (low[0], y + 0.15))
            parts.append((stripe, _tone(paint, 0.65)))
    elif shape < 2 and rng.random() < 0.4:  # the inner disc of a ring
        parts.append((shapes[shape] * 0.6, _tone(paint, 0.7)))
    return parts
