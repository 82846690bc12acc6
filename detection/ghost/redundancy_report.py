"""tools/redundancy.py: reports the redundancy of the feature maps of a layer as text, a CSV and an image."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import cv2
import torch

from backbones import build_backbone
from backbones.classifier import normalize
from backbones.feature_redundancy import Redundancy, default_layer, find_pairs, list_layers, record_feature_maps
from backbones.redundancy_plot import draw_pairs
from detection.core.errors import UserError
from detection.core.outputs import check_outputs, write_output
from detection.data.transforms import to_tensor
from detection.inference.sample_images import read_images, sample_image_paths


def redundancy_report(
    network: str,
    images: Sequence[str],
    *,
    width: float = 1.0,
    weights: str | None = None,
    layer: str | None = None,
    kernel_sizes: Sequence[int] = (1, 3, 5, 7),
    ranked_by: int | None = None,
    size: int = 224,
    count: int = 8,
    pairs: int = 6,
    out: str | Path = "redundancy",
    force: bool = False,
) -> str:
    """Find the most similar pairs of feature maps; write OUT/NETWORK_LAYER.png and .csv.

    Args:
        network, width, weights: see `build_backbone`.
        images: images, folders or globs. Filters are fitted to `count` of them; the first is drawn.
        layer: default: `backbones.feature_redundancy.default_layer`.
        size: side in pixels to which images are resized.
        pairs: number of pairs that are drawn and printed; the CSV has all.
        force: overwrite files that this toolkit did not write.

    Returns:
        The text to print.

    Raises:
        UserError: the network, weights, layer or images cannot be used.
    """
    out = Path(out)
    try:
        backbone = build_backbone(network, width=width, weights=weights)
        paths = sample_image_paths(images, count)
        arrays = read_images(paths, size)
        inputs = [normalize(to_tensor(image)[None] / 255, backbone) for image in arrays]
        layer = layer or default_layer(backbone, inputs[0])
        stem = f"{network}_{layer}".replace("/", "_")
        check_outputs([out / f"{stem}{suffix}" for suffix in (".png", ".csv")], [*paths, weights], force=force)
        maps = record_feature_maps(backbone, layer, inputs)
        found = find_pairs(maps, kernel_sizes, ranked_by)
    except ValueError as error:
        raise UserError(str(error)) from error
    trained = "random weights" if weights is None else Path(weights).name
    title = f"{network} ({trained}), layer {layer}, {Path(paths[0]).name}"
    drawing = draw_pairs(found, maps[0][0], arrays[0], title=title, pairs=pairs)
    png = cv2.imencode(".png", drawing)[1].tobytes()
    write_output(out / f"{stem}.png", lambda file: file.write(png))
    write_output(out / f"{stem}.csv", lambda file: file.write(to_csv(found).encode()))
    warning = [] if weights is not None else ["random weights: this shows the network's structure, nothing learnt"]
    shape = "x".join(map(str, maps[0].shape[1:]))
    head = f"{network}, layer {layer} ({shape}), {len(paths)} image{'s' if len(paths) > 1 else ''}"
    return "\n".join([head, *warning, to_text(found, pairs), f"written: {out / stem}.png and .csv"])


def list_layers_table(network: str, *, width: float = 1.0, size: int = 224) -> str:
    """A table of the layers for `--layer` with class and shape. Raises UserError for an unknown network."""
    try:
        backbone = build_backbone(network, width=width)
        layers = list_layers(backbone, torch.zeros(1, 3, size, size))
    except ValueError as error:
        raise UserError(str(error)) from error
    columns = max(map(len, layers))
    return "\n".join(
        f"{name:<{columns}}  {kind:<20} {'x'.join(map(str, shape))}" for name, (kind, shape) in layers.items()
    )


def to_text(found: Redundancy, count: int) -> str:
    """The best pairs, and the fraction of maps that other maps predict below several errors."""
    sizes = list(found.pairs[0].errors)
    rows = [
        f"mean squared error of a d x d filter from one map to another, / variance of the target (0 exact, 1 useless); "
        f"ranked by d = {found.ranked_by}",
        f"{'source':>6} {'target':>6}  " + " ".join(f"{f'd = {d}':>8}" for d in sizes),
    ]
    rows += [
        f"{p.source:>6} {p.target:>6}  " + " ".join(f"{p.errors[d]:>8.4f}" for d in sizes) for p in found.pairs[:count]
    ]
    for name, pairs in (
        (f"mean of these {min(count, len(found.pairs))}", found.pairs[:count]),
        (f"mean of all {len(found.pairs)} disjoint pairs", found.pairs),
    ):
        rows.append(name)
        means = [sum(p.errors[d] for p in pairs) / len(pairs) for d in sizes]
        rows.append(f"{'':>13}  " + " ".join(f"{mean:>8.4f}" for mean in means))
    shares = ", ".join(
        f"{float((found.best < limit).double().mean()):.0%} below {limit}" for limit in (0.05, 0.1, 0.25, 0.5)
    )
    rows.append(f"error of each map from its best source: {shares} (of {len(found.best)} maps)")
    if found.dead:
        rows.append(f"{len(found.dead)} of {found.channels} maps are constant on these images and left out")
    return "\n".join(rows)


def to_csv(found: Redundancy) -> str:
    """One line for each pair, best first: source, target, mse_d1, …"""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    sizes = list(found.pairs[0].errors)
    writer.writerow(["source", "target", *(f"mse_d{d}" for d in sizes)])
    for pair in found.pairs:
        writer.writerow([pair.source, pair.target, *(f"{pair.errors[d]:.6g}" for d in sizes)])
    return text.getvalue()
