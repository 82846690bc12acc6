"""Whether a detector's anchors and input size suit the boxes of a set, and which would suit better."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from detection.config import DetectionConfig
from detection.core.errors import UserError
from detection.core.memory import available_memory
from detection.doctor.box_checks import box_sizes, clipped
from detection.doctor.entries import Entries
from detection.doctor.findings import Finding, make_finding

RATIOS = (0.5, 1.0, 2.0)
FIRST_STRIDE = {"retinanet": 8, "faster_rcnn": 4}
SCALES = {"retinanet": (1.0, 2 ** (1 / 3), 2 ** (2 / 3)), "faster_rcnn": (1.0,)}
DIVISOR = 32
MATCHED = 0.5
SMALL = 8.0
"""Pixels at the input: one step of RetinaNet's finest map."""
MOST_BOXES = 50_000
SEARCHED = 3_000
GAIN = 0.03
"""Share of boxes by which other anchors must be better to be proposed."""
FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)


@dataclass(frozen=True)
class Setting:
    """What decides which boxes a detector can match; `name` says where it is from."""

    detector: str
    anchor_sizes: tuple[int, ...]
    short_side: int
    long_side: int
    name: str

    def resized(self, factor: float) -> "Setting":
        """At another input size, in whole steps of 32 pixels."""
        sides = [max(DIVISOR, round(side * factor / DIVISOR) * DIVISOR) for side in (self.short_side, self.long_side)]
        return replace(self, short_side=sides[0], long_side=sides[1])


DEFAULT = Setting("retinanet", (16, 32, 64, 128, 256), 320, 320, "configs/retina_ghost_320.yaml")


@dataclass(frozen=True)
class Suitability:
    """Shares are of the boxes that training would see.

    Attributes:
        boxes: that were looked at; of more than 50 000, an even choice.
        matched: share whose best anchor reaches IoU 0.5.
        by_level: (stride, anchor size, share that this level matches, share for which it is the best level).
        small: share with a side under 8 pixels at the input.
        better_anchors, better_matched: anchor sizes that match clearly more, or None.
        inputs: (short side, long side, matched, small, cost against the setting's) at other input sizes.
        better_input: the smallest of them with hardly any small boxes, where the setting has many.
    """

    setting: Setting
    boxes: int
    matched: float
    by_level: list[tuple[int, int, float, float]]
    small: float
    better_anchors: tuple[int, ...] | None
    better_matched: float
    inputs: list[tuple[int, int, float, float, float]]
    better_input: tuple[int, int] | None


def setting_of(config: DetectionConfig, name: str) -> Setting:
    model, data = config.model, config.data
    return Setting(model.detector, tuple(model.anchor_sizes), data.short_side, data.long_side, name)


def examine_anchors(entries: Entries, setting: Setting) -> Suitability | None:
    """None where there is no box to train on."""
    sizes = box_sizes(entries)
    inner = clipped(entries.boxes, sizes)
    with np.errstate(invalid="ignore"):
        rows = np.flatnonzero(entries.valid & ((inner[:, 2:] - inner[:, :2]) >= 1).all(axis=1))
    if not len(rows):
        return None
    if len(rows) > MOST_BOXES:
        rows = np.sort(np.random.default_rng(0).choice(rows, MOST_BOXES, replace=False))
    boxes, sizes = inner[rows], sizes[rows]
    best = best_overlaps(boxes, sizes, setting)
    matched = float((best.max(axis=1) >= MATCHED).mean())
    level = best.argmax(axis=1)
    by_level = [
        (FIRST_STRIDE[setting.detector] << i, size, float((best[:, i] >= MATCHED).mean()), float((level == i).mean()))
        for i, size in enumerate(setting.anchor_sizes)
    ]
    few = np.random.default_rng(0).permutation(len(boxes))[:SEARCHED]
    # Where nearly all are matched, nothing is to be gained.
    anchors = _search_anchors(boxes[few], sizes[few], setting) if matched <= 1 - GAIN else setting.anchor_sizes
    better = float((best_overlaps(boxes, sizes, replace(setting, anchor_sizes=anchors)).max(axis=1) >= MATCHED).mean())
    inputs = []
    for factor in FACTORS:
        other = setting.resized(factor) if factor != 1 else setting
        share = float((best_overlaps(boxes[few], sizes[few], other).max(axis=1) >= MATCHED).mean())
        cost = other.short_side * other.long_side / (setting.short_side * setting.long_side)
        inputs.append((other.short_side, other.long_side, share, small_share(boxes, sizes, other), cost))
    small = small_share(boxes, sizes, setting)
    larger = [entry for entry in inputs if entry[4] > 1 and (entry[3] <= 0.1 or entry is inputs[-1])]
    return Suitability(
        setting=setting,
        boxes=len(boxes),
        matched=matched,
        by_level=by_level,
        small=small,
        better_anchors=anchors if better >= matched + GAIN else None,
        better_matched=better,
        inputs=inputs,
        better_input=(larger[0][0], larger[0][1]) if small > 0.1 else None,
    )


def check_suitability(found: Suitability, split: str) -> list[Finding]:
    findings = []
    missed = 1 - found.matched
    if missed > 0.1:
        way = (
            f"model.anchor_sizes=[{', '.join(map(str, found.better_anchors))}] would match {found.better_matched:.0%}"
            if found.better_anchors
            else "other anchor sizes would not help much: they are too small, or too long and thin"
        )
        where = f"at {found.setting.short_side}x{found.setting.long_side} ({found.setting.name})"
        findings.append(
            make_finding(
                "anchors-miss", split, round(missed * found.boxes), total=found.boxes, detail=f"{where}; {way}"
            )
        )
    if found.small > 0.1 and found.better_input:
        short, long = found.better_input
        _, _, _, small, cost = next(entry for entry in found.inputs if entry[:2] == found.better_input)
        detail = f"data.short_side={short} data.long_side={long} leaves {small:.0%}, at {cost:.1f} times the cost"
        findings.append(
            make_finding("boxes-small", split, round(found.small * found.boxes), total=found.boxes, detail=detail)
        )
    return findings


def resize(boxes: np.ndarray, sizes: np.ndarray, setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    """Boxes xyxy [m, 4] as the network sees them, and the padded frames [m, 2] (width, height) of their images."""
    scale = np.minimum(setting.short_side / sizes.min(axis=1), setting.long_side / sizes.max(axis=1))
    resized = np.maximum(1, np.round(sizes * scale[:, None]))
    factor = resized / sizes
    return boxes * np.concatenate([factor, factor], axis=1), np.ceil(resized / DIVISOR) * DIVISOR


def small_share(boxes: np.ndarray, sizes: np.ndarray, setting: Setting) -> float:
    seen, _ = resize(boxes, sizes, setting)
    return float(((seen[:, 2:] - seen[:, :2]).min(axis=1) < SMALL).mean())


def best_overlaps(boxes: np.ndarray, sizes: np.ndarray, setting: Setting) -> np.ndarray:
    """The highest IoU that any anchor of each level has with each box: [m, levels].

    Args:
        boxes: [m, 4] xyxy in pixels of the image.
        sizes: [m, 2], width and height of each one's image, which is padded by itself, as in a batch of one.

    Of all places of an anchor, the one nearest to the box's centre overlaps it most: only that one is computed.
    """
    seen, frames = resize(boxes, sizes, setting)
    centre, side = (seen[:, :2] + seen[:, 2:]) / 2, seen[:, 2:] - seen[:, :2]
    result = np.zeros((len(boxes), len(setting.anchor_sizes)))
    cells = frames / FIRST_STRIDE[setting.detector]
    for level, size in enumerate(setting.anchor_sizes):
        # torchvision: the stride is what the frame's side divided by the map's gives, rounded down.
        stride = frames // cells
        place = np.clip(np.round(centre / stride), 0, cells - 1) * stride
        shapes = anchor_shapes(size, setting.detector)
        low = np.maximum(place[:, None] - shapes / 2, seen[:, None, :2])
        high = np.minimum(place[:, None] + shapes / 2, seen[:, None, 2:])
        common = np.clip(high - low, 0, None).prod(axis=2)
        union = side.prod(axis=1)[:, None] + shapes.prod(axis=1) - common
        result[:, level] = (common / union).max(axis=1)
        cells = np.ceil(cells / 2)
    return result


def anchor_shapes(size: int, detector: str) -> np.ndarray:
    """[a, 2]: widths and heights of a level's anchors, rounded as torchvision rounds them."""
    sizes = [int(size * scale) for scale in SCALES[detector]] if detector == "retinanet" else [size]
    shapes = [(s / math.sqrt(ratio), s * math.sqrt(ratio)) for ratio in RATIOS for s in sizes]
    return 2 * np.round(np.array(shapes) / 2)


def _search_anchors(boxes: np.ndarray, sizes: np.ndarray, setting: Setting) -> tuple[int, ...]:
    """The geometric row of sizes that matches most boxes; between equals, the one with the higher mean IoU."""
    best, answer = -1.0, setting.anchor_sizes
    levels = range(len(setting.anchor_sizes))
    for start in np.geomspace(6, 128, 19):
        for growth in (1.5, 1.75, 2.0, 2.25):
            anchors = tuple(round(start * growth**level) for level in levels)
            overlap = best_overlaps(boxes, sizes, replace(setting, anchor_sizes=anchors)).max(axis=1)
            value = float((overlap >= MATCHED).mean() + 0.01 * overlap.mean())
            if value > best:
                best, answer = value, anchors
    return answer


def predicted_memory(config: DetectionConfig, num_classes: int) -> dict[str, float]:
    """Bytes that a training step of `data.batch_size` images of full size will take, before it is tried.

    Keys: weights (with gradients, the optimizer's state and averaged weights), images (what the backward pass
    needs), total. Float32; mixed precision takes about half of the second. What the process and CUDA themselves take
    comes on top.
    """
    import torch

    from detection.benchmark.cost import detector_costs
    from detection.models.build import build_model

    config = config.model_copy(deep=True)
    config.model.backbone.weights = None
    with torch.device("meta"):
        model = build_model(config, num_classes)
    short = max(config.data.multi_scale, default=config.data.short_side)
    long = round(config.data.long_side * short / config.data.short_side)
    frame = [-(-side // DIVISOR) * DIVISOR for side in (short, long)]
    total = next(row for row in detector_costs("", model, (frame[0], frame[1])) if row.part == "total")
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    states = {"sgd": 1, "adamw": 2}[config.optim.name]
    weights = 4 * (total.parameters * (2 if config.train.ema else 1) + learned * (1 + states))
    losses = 0
    if config.model.detector == "retinanet":
        places = sum(math.prod(-(-side // (8 << level)) for side in frame) for level in range(5))
        # The focal loss holds about five arrays of the logits' size at a time.
        losses = 5 * 4 * 9 * places * num_classes
    images = config.data.batch_size * (total.memory * (0.55 if config.train.amp != "off" else 1) + losses)
    return {"weights": weights, "images": images, "total": weights + images}


def memory_finding(predicted: float, free: float | None, split: str) -> list[Finding]:
    if free is None or predicted <= 0.9 * free:
        return []
    return [make_finding("memory-high", split, math.ceil(predicted / 1e9), detail=f"{free / 1e9:.1f} GB are free")]


def free_memory(device: str) -> float | None:
    """Bytes that training on `device` could use now; None where that is not known."""
    import torch

    from detection.core.device import pick_device

    try:
        picked = pick_device(device)
    except UserError:
        return None  # the data may be looked at elsewhere than they are trained on
    if picked.type == "cuda":
        return float(torch.cuda.mem_get_info(picked)[0])
    return available_memory()


def table_of_inputs(found: Suitability) -> Sequence[tuple[str, str, str, str]]:
    """For people: input size, matched, small, cost."""
    return [
        (f"{short}x{long}", f"{matched:.1%}", f"{small:.1%}", f"{cost:.2g} x")
        for short, long, matched, small, cost in found.inputs
    ]
