"""From what a user names to the field of contenders: networks built, saved and exported, costs counted."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from detection.benchmark.candidates import Candidate
from detection.benchmark.cost import detector_total
from detection.benchmark.onnx_models import OnnxModel
from detection.benchmark.peers import export_peer, peer_size, save_peer
from detection.benchmark.settings import BACKENDS, DIVISOR, EXPORTED, PEER_BACKENDS, PEERS, PYTORCH, Settings, kind_of
from detection.benchmark.untrained import CANDIDATES, candidate_scores, like_trained
from detection.checkpoint import classes_of, config_of, read_checkpoint, save_checkpoint
from detection.config import DetectionConfig
from detection.config_io import load_config
from detection.core.errors import UserError
from detection.core.progress import progress_bar
from detection.data.image_io import read_image
from detection.data.synthetic.demo import draw_scene
from detection.data.transforms import resize_to, to_tensor
from detection.export.exporter import build_export_spec, verify_export
from detection.export.onnx import export_onnx
from detection.export.openvino import export_openvino
from detection.models.build import build_model
from detection.runtime.exported import exported_config, read_metadata
from detection.runtime.metadata import METADATA_KEY
from detection.runtime.pytorch import load_detector

CLASSES = 80
SIDE = 320


@dataclass
class BenchmarkSuite:
    """All that is to be timed, in the order of the table.

    Attributes:
        failed: contenders that could not be made, with the reason.
        remarks: sentences about how they were made.
    """

    contenders: list[Candidate] = field(default_factory=list)
    failed: dict[Candidate, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def make_images(settings: Settings) -> list[np.ndarray]:
    """The images that the user named, or a drawn one: RGB uint8 [H, W, 3]. Raises UserError for an unreadable one."""
    if settings.images:
        return [read_image(path) for path in settings.images]
    return [draw_scene(np.random.default_rng(settings.seed), (640, 480))[0]]


def batch_of(images: Sequence[np.ndarray], size: tuple[int, int], batch: int) -> list[Tensor]:
    """So many uint8 [3, H, W] of `size`, the whole image squeezed; in turns, where there are fewer."""
    return [to_tensor(resize_to(image, *size)) for image in itertools.islice(itertools.cycle(images), batch)]


def export_for(contender: Candidate, path: Path) -> None:
    """Write the checkpoint of a contender as its backend runs it, for its size and any batch.

    Raises:
        UserError: a missing extra; or the file does not find what PyTorch does. Of random weights that is not asked:
            their neighbouring boxes have nearly the same scores, and rounding decides which of them is kept.
    """
    spec = build_export_spec(contender.path, size=contender.size, overrides=contender.overrides)
    if contender.backend == "onnxruntime":
        export_onnx(spec, path)
    else:
        export_openvino(spec, path)
    if kind_of(contender.network) == "checkpoint":
        verify_export(path, spec)


class SuiteBuilder:
    """Makes the contenders of one benchmark.

    Args:
        device: that they run on.
        folder: for the files of networks with random weights and of exported ones; they are needed while it is timed.
        images: RGB uint8 [H, W, 3].
    """

    def __init__(self, settings: Settings, device: torch.device, folder: Path, images: Sequence[np.ndarray]) -> None:
        if "cuda_graph" in (settings.backends or ()) and device.type != "cuda":
            raise UserError(f"backend cuda_graph records what a GPU does, and this is measured on the {device}")
        self.settings, self.device, self.folder, self.images = settings, device, folder, images
        self.threads = settings.threads or torch.get_num_threads()
        self.field = BenchmarkSuite()
        self._files = itertools.count()
        self._candidates: int | None = None
        self._contents: dict[str, dict[str, Any]] = {}
        self.overrides: tuple[str, ...] = ()
        if settings.score_threshold is not None:
            self.overrides = (f"eval.score_threshold={settings.score_threshold}",)
        kinds = {target: kind_of(target) for target in settings.targets}
        self.checkpoint = next((target for target, kind in kinds.items() if kind == "checkpoint"), None)
        first = next((target for target, kind in kinds.items() if kind != "exported"), None)
        self.size = settings.size or (SIDE, SIDE) if first is None else self._size_of(self._config_of(first))
        self.num_classes = settings.num_classes or CLASSES
        if settings.num_classes is None and self.checkpoint is not None:
            self.num_classes = len(classes_of(self._content_of(self.checkpoint), self.checkpoint).names)

    def make(self) -> BenchmarkSuite:
        """Raises UserError for what the user named and is not there, cannot be read or cannot be exported."""
        random = []
        names = [*self.settings.targets, *(PEERS if self.settings.peers else ())]
        for name in progress_bar(names, "preparing"):
            kind = "peer" if name in PEERS else kind_of(name)
            if kind == "checkpoint":
                ap = (self._content_of(name).get("numbers") or {}).get("AP")
                size = self._size_of(self._config_of(name))
                self._add_detector(name, Path(name), size, self.overrides, ap)
            elif kind == "exported":
                self._add_exported(name)
            else:
                random.append(name)
                (self._add_config if kind == "config" else self._add_peer)(name)
        if random:
            like = f" as many as {self.checkpoint} does" if self.checkpoint else f" {self._candidates}"
            self.field.remarks.append(
                f"Random weights, {self.num_classes} classes: {', '.join(random)}. Of the (box, class) pairs of a "
                f"image they let{like} pass to NMS, where they have so many."
            )
        return self.field

    def _add_config(self, target: str) -> None:
        """Its network with random weights, saved like a trained one."""
        config = self._config_of(target)
        size = self._size_of(config)
        model, threshold = like_trained(
            lambda: build_model(config, self.num_classes),
            batch_of(self.images, size, len(self.images)),
            self._candidates_wanted(),
            self.settings.seed,
        )
        config.eval.score_threshold = threshold
        path, labels = self._new_file(".pt"), list(range(1, self.num_classes + 1))
        classes = {"names": [f"class {label}" for label in labels], "ids": labels}
        save_checkpoint(path, {"config": config.model_dump(), "classes": classes, "model": model.state_dict()})
        self._add_detector(target, path, size, (), None)

    def _add_detector(
        self, network: str, path: Path, size: tuple[int, int], overrides: tuple[str, ...], ap: float | None
    ) -> None:
        """A checkpoint in every backend."""
        model, _, _ = load_detector(path, torch.device("cpu"), overrides=overrides)
        base = replace(self._contender(network, "detector", path, size, model), overrides=overrides)
        base = replace(base, ap=self.settings.aps.get(network, ap))
        default = [backend for backend in BACKENDS if backend != "cuda_graph" or self.device.type == "cuda"]
        for backend in self.settings.backends or default:
            contender = replace(base, backend=backend)
            if backend not in PYTORCH:
                contender = self._exported(contender)
            self.field.contenders.append(contender)

    def _exported(self, contender: Candidate) -> Candidate:
        """A checkpoint as a file for a backend that runs its own: of a fixed size, for any batch."""
        path = self._new_file(".onnx" if contender.backend == "onnxruntime" else ".xml")
        exported = replace(contender, path=path, overrides=())
        self._try(exported, partial(export_for, contender, path))
        return exported

    def _add_exported(self, target: str) -> None:
        """A file of this toolkit, or any ONNX file."""
        path, backend = Path(target), EXPORTED[Path(target).suffix.lower()]
        if backend == "onnxruntime":
            session = OnnxModel(path, self.size, self.threads)
            if METADATA_KEY not in session.metadata:
                size = session.size or self.size
                foreign = Candidate(target, backend, "foreign", path, size, str(self.device), self.threads)
                self.field.contenders.append(replace(foreign, ap=self.settings.aps.get(target)))
                return
        metadata = read_metadata(path)
        config = exported_config(metadata, path)
        config.model.backbone.weights = None
        model = build_model(config, len(metadata.names)).eval()
        contender = self._contender(target, "detector", path, metadata.size or self._size_of(config), model)
        self.field.contenders.append(replace(contender, backend=backend))

    def _add_peer(self, name: str) -> None:
        size, path = peer_size(name, self.size), self._new_file(".pth")
        images = batch_of(self.images, size, len(self.images))
        model = save_peer(name, path, self.num_classes, size, images, self._candidates_wanted(), self.settings.seed)
        base = self._contender(name, "peer", path, size, model)
        for backend in self.settings.backends or PEER_BACKENDS:
            contender = replace(base, backend=backend)
            if backend == "onnxruntime":
                contender = replace(contender, path=self._new_file(".onnx"))
                self._try(contender, partial(export_peer, model, contender.path, images[0]))
            elif backend not in PYTORCH:
                self.field.failed[contender] = f"torchvision's detectors are not measured in {backend}"
            self.field.contenders.append(contender)

    def _try(self, contender: Candidate, export: Callable[[], Any]) -> None:
        """Export it; where that does not work, an optional contender gets a row that says why."""
        try:
            export()
        except UserError as error:
            if not contender.optional:
                raise
            self.field.failed[contender] = str(error)

    def _contender(self, network: str, kind: str, path: Path, size: tuple[int, int], model: nn.Module) -> Candidate:
        cost = detector_total(model, size)
        return Candidate(
            network=network,
            backend="eager",
            kind=kind,
            path=path,
            size=size,
            device=str(self.device),
            threads=self.threads,
            num_classes=self.num_classes,
            optional=self.settings.backends is None,
            parameters=cost.parameters,
            macs=cost.macs,
            ap=self.settings.aps.get(network),
        )

    def _candidates_wanted(self) -> int:
        """How many (box, class) pairs of the image the first checkpoint lets pass to NMS."""
        if self._candidates is None:
            self._candidates = CANDIDATES
            if self.checkpoint is not None:
                model, config, _ = load_detector(self.checkpoint, torch.device("cpu"), overrides=self.overrides)
                (image,) = batch_of(self.images, self._size_of(config), 1)
                scores = candidate_scores(model, image.float() / 255)
                self._candidates = int((scores > config.eval.score_threshold).sum())
        return self._candidates

    def _config_of(self, target: str) -> DetectionConfig:
        if kind_of(target) == "config":
            # The weights' file need not be here, as they are made up.
            return load_config(target, ["model.backbone.weights=null"])
        return config_of(self._content_of(target), target)

    def _content_of(self, checkpoint: str) -> dict[str, Any]:
        if checkpoint not in self._contents:
            self._contents[checkpoint] = read_checkpoint(checkpoint)
        return self._contents[checkpoint]

    def _size_of(self, config: DetectionConfig) -> tuple[int, int]:
        """The asked size, or the config's sides as a landscape image has them, padded."""
        sides = (config.data.short_side, config.data.long_side)
        return self.settings.size or (-(-sides[0] // DIVISOR) * DIVISOR, -(-sides[1] // DIVISOR) * DIVISOR)

    def _new_file(self, suffix: str) -> Path:
        return self.folder / f"{next(self._files)}{suffix}"
