"""tools/ghostify.py: ghosts a backbone or a detector, and reports the saved costs and the errors."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backbones import build_backbone
from backbones.classifier import normalize
from backbones.ghost_conversion import GhostReport
from backbones.ghostify_init import output_errors
from detection.checkpoint import (
    Classes,
    classes_of,
    config_of,
    load_model_state,
    read_checkpoint,
    save_checkpoint,
    weights_of,
)
from detection.config import GhostifyConfig
from detection.config_io import load_config
from detection.core.commands import command
from detection.core.device import pick_device
from detection.core.errors import UserError
from detection.core.outputs import check_outputs, note_output, write_output
from detection.core.text import text_table
from detection.data.transforms import to_tensor
from detection.inference.sample_images import read_images, sample_image_paths
from detection.models.build import build_model
from detection.models.ghost_recipe import ghostify_by, ghostify_detector, raw_outputs, recipe_config

# Number of classes for a config, which does not define it. Only the prediction layers, which are kept, depend on it.
DEFAULT_NUM_CLASSES = 80
BATCH = 4


@dataclass
class NetworkAdapter:
    """A backbone or a detector with the functions to ghost, compare and save it.

    Attributes:
        make_input: list of uint8 images [3, H, W] -> an input of the model.
        ghostify: (model, example, calibration) -> report; ghosts the model in place.
        forward: the outputs that `output_errors` compares; None: the output of the model.
        file_content: (ghosted model, report) -> content of the file; None if there are no weights to save.
    """

    model: nn.Module
    make_input: Callable[[list[Tensor]], Any]
    ghostify: Callable[[nn.Module, Any, Any], GhostReport]
    forward: Callable[[nn.Module, Any], Any] | None
    file_content: Callable[[nn.Module, GhostReport], dict[str, Any]] | None


def ghostify_network(
    network: str,
    spec: GhostifyConfig,
    *,
    width: float = 1.0,
    weights: str | None = None,
    images: Sequence[str] = (),
    size: int = 224,
    count: int = 32,
    init: str = "fit",
    out: str | None = None,
    device: str = "auto",
    force: bool = False,
) -> str:
    """Ghost a network, compare it with the original on images, and write it.

    Args:
        network: name of a backbone, a checkpoint (.pt) or a config (.yaml) of a detector.
        width, weights: of a backbone.
        images: images, folders or globs; without images only the costs are reported.
        size: side in pixels to which images are resized (squares, so that they form batches).
        count: largest number of images, spread evenly over all. Every fourth is held out to measure errors.
        init: weights in the file: "fit" or "random". The report compares both.
        force: overwrite a file that this toolkit did not write.
        out: the file: for a backbone a state dict for `model.backbone.weights`, for a checkpoint a checkpoint.

    Returns:
        The text to print.

    Raises:
        UserError: the network, weights, images or patterns cannot be used.
    """
    if init == "fit" and out is not None and not images:
        raise UserError("--init fit needs images for the fit; give --images, or --init random")
    if out is not None:
        if not Path(out).parent.is_dir():
            raise UserError(f"--out {out}: folder {Path(out).parent} does not exist")
        check_outputs([out], [network, weights, *images], force=force)
    place = pick_device(device)
    adapter = _load_network(network, spec, width, weights)
    adapter.model.to(place).eval()
    if out is not None and adapter.file_content is None:
        raise UserError(
            f"{network} is a config and has no weights to write; train with model.ghostify, or give a checkpoint"
        )

    def batches(tensors: list[Tensor]) -> list[Any]:
        return [_to(adapter.make_input(tensors[i : i + BATCH]), place) for i in range(0, len(tensors), BATCH)]

    example = _to(adapter.make_input([torch.zeros(3, size, size, dtype=torch.uint8)]), place)
    random = copy.deepcopy(adapter.model)
    report = adapter.ghostify(random, example, None)
    text = [str(report)]
    ghosted = random
    if images:
        tensors = [to_tensor(image) for image in read_images(sample_image_paths(images, count), size)]
        fitting = [p for i, p in enumerate(tensors) if i % 4 != 3]
        held_out = tensors[3::4] or fitting
        fitted = copy.deepcopy(adapter.model)
        fitted_report = adapter.ghostify(fitted, None, batches(fitting))
        layers = [layer.name for layer in report.replaced]
        errors = [
            output_errors(adapter.model, model, layers, batches(held_out), adapter.forward)
            for model in (random, fitted)
        ]
        text.append(_error_table(layers, errors[0], errors[1], len(fitting), len(tensors[3::4])))
        if init == "fit":
            ghosted, report = fitted, fitted_report
    if out is not None and adapter.file_content is not None:
        text.append(_write(Path(out), adapter.file_content(ghosted.cpu(), report), network, width))
    return "\n\n".join(text)


def _load_network(network: str, spec: GhostifyConfig, width: float, weights: str | None) -> NetworkAdapter:
    path = Path(network)
    if path.suffix in (".yaml", ".yml"):
        config = load_config(path)
        config.model.ghostify = None
        return _detector_adapter(build_model(config, DEFAULT_NUM_CLASSES), spec, None)
    if path.suffix in (".pt", ".pth") or path.is_file():
        checkpoint = read_checkpoint(path)
        config, classes = config_of(checkpoint, path), classes_of(checkpoint, path)
        if config.model.ghostify is not None:
            raise UserError(f"{path} is ghosted already (model.ghostify in its config)")
        config.model.backbone.weights = None
        model = build_model(config, len(classes.names))
        load_model_state(model, weights_of(checkpoint, path), path)
        return _detector_adapter(model, spec, (config, classes))
    try:
        backbone = build_backbone(network, width=width, weights=weights)
    except ValueError as error:
        raise UserError(f"{network}: {error}" if network not in str(error) else str(error)) from error

    def apply(model: nn.Module, example: Any, calibration: Any) -> GhostReport:
        try:
            report = ghostify_by(spec, model, example=example, calibration=calibration)
        except ValueError as error:
            raise UserError(f"{network}: {error}") from error
        if not report.replaced:
            raise UserError(f"{network}: no convolution is left to replace:\n{report}")
        return report

    def content(model: nn.Module, report: GhostReport) -> dict[str, Any]:
        return {"network": network, "width": width, "ghostify": report.recipe, "state_dict": model.state_dict()}

    return NetworkAdapter(backbone, lambda images: normalize(torch.stack(images) / 255, backbone), apply, None, content)


def _detector_adapter(model: nn.Module, spec: GhostifyConfig, trained: tuple[Any, Classes] | None) -> NetworkAdapter:
    def content(ghosted: nn.Module, report: GhostReport) -> dict[str, Any]:
        assert trained is not None
        config, classes = trained
        section = recipe_config(report, spec.parts)
        ghosted_config = config.model_copy(update={"model": config.model.model_copy(update={"ghostify": section})})
        return {
            "config": ghosted_config.model_dump(),
            "classes": {"names": list(classes.names), "ids": list(classes.ids)},
            "model": ghosted.state_dict(),
        }

    return NetworkAdapter(
        model,
        lambda images: (images,),
        lambda model, example, calibration: ghostify_detector(model, spec, example=example, calibration=calibration),
        raw_outputs,
        content if trained is not None else None,
    )


def _error_table(
    layers: Sequence[str],
    random: tuple[dict[str, float], float],
    fitted: tuple[dict[str, float], float],
    used: int,
    held_out: int,
) -> str:
    on = f"on {held_out} images that were held out from the fit" if held_out else "on the images of the fit"
    cells = [(layer, random[0][layer], fitted[0][layer]) for layer in layers]
    means = [sum(errors[0].values()) / len(layers) for errors in (random, fitted)]
    cells += [("mean of layers", means[0], means[1]), ("network output", random[1], fitted[1])]
    rows = [
        f"error against the original: squared difference / variance; 0 is equal, 1 is the error of a constant.\n"
        f"Fitted to {used} images, measured {on}. Each layer gets the input of the original.",
        text_table(("layer", "random", "fitted"), [(n, f"{a:.3f}", f"{b:.3f}") for n, a, b in cells], left=1),
    ]
    return "\n".join(rows)


def _write(path: Path, content: dict[str, Any], network: str, width: float) -> str:
    if "config" in content:
        save_checkpoint(path, content)
        note_output(path)
        return f"written: {path}, a checkpoint for {command('evaluate')} and {command('detect')}"
    write_output(path, lambda file: torch.save(content, file))
    recipe = content["ghostify"]
    return (
        f"written: {path}. In a detector:\n"
        f"  model.backbone.name={network} model.backbone.width={width:g} model.backbone.weights={path}\n"
        f"  model.ghostify.ratio={recipe['ratio']} model.ghostify.kernel_size={recipe['kernel_size']} "
        "(and the same include, exclude and min_channels, if other than by default)\n"
        f"In Python: model = build_backbone({network!r}, width={width:g}); load_ghosted(model, {str(path)!r})"
    )


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    return tuple([image.to(device) for image in part] for part in batch)
