"""Creates the candidates of a benchmark: builds, saves and exports the networks and counts their costs."""

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
from detection.benchmark.detector_cost import detector_total
from detection.benchmark.onnx_models import OnnxModel
from detection.benchmark.peers import export_peer, peer_size, save_peer
from detection.benchmark.settings import BACKENDS, DIVISOR, EXPORTED, PEER_BACKENDS, PEERS, PYTORCH, Settings, kind_of
from detection.benchmark.untrained import NUM_NMS_CANDIDATES, build_untrained, nms_candidate_scores
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
    """The candidates to be timed, in the order of the table.

    Attributes:
        failed: candidates that could not be created -> reason.
        remarks: sentences about how they were created.
    """

    candidates: list[Candidate] = field(default_factory=list)
    failed: dict[Candidate, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def make_images(settings: Settings) -> list[np.ndarray]:
    """The input images of the settings, or a drawn one: RGB uint8 [H, W, 3]. Raises UserError for an unreadable one."""
    if settings.images:
        return [read_image(path) for path in settings.images]
    return [draw_scene(np.random.default_rng(settings.seed), (640, 480))[0]]


def make_batch(images: Sequence[np.ndarray], size: tuple[int, int], batch: int) -> list[Tensor]:
    """A list of `batch` images uint8 [3, H, W] resized to `size`; images repeat if there are fewer."""
    return [to_tensor(resize_to(image, *size)) for image in itertools.islice(itertools.cycle(images), batch)]


def export_for(candidate: Candidate, path: Path) -> None:
    """Export the checkpoint of a candidate for its backend, with its size and any batch.

    Raises:
        UserError: an extra is missing, or the detections differ from PyTorch. Random weights are not compared, because
            their neighboring boxes have nearly equal scores, and rounding decides which one NMS keeps.
    """
    spec = build_export_spec(candidate.path, size=candidate.size, overrides=candidate.overrides)
    if candidate.backend == "onnxruntime":
        export_onnx(spec, path)
    else:
        export_openvino(spec, path)
    if kind_of(candidate.network) == "checkpoint":
        verify_export(path, spec)


class SuiteBuilder:
    """Creates the candidates of one benchmark.

    Args:
        device: on which they run.
        folder: for the files of exported networks and networks with random weights; needed during the benchmark.
        images: RGB uint8 [H, W, 3].
    """

    def __init__(self, settings: Settings, device: torch.device, folder: Path, images: Sequence[np.ndarray]) -> None:
        if "cuda_graph" in (settings.backends or ()) and device.type != "cuda":
            raise UserError(f"backend cuda_graph needs a GPU; the device of this benchmark is {device}")
        self.settings, self.device, self.folder, self.images = settings, device, folder, images
        self.threads = settings.threads or torch.get_num_threads()
        self.suite = BenchmarkSuite()
        self._files = itertools.count()
        self._num_nms_candidates: int | None = None
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

    def build(self) -> BenchmarkSuite:
        """Create all candidates. Raises UserError for a network that is missing, unreadable or cannot be exported."""
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
            like = f", as in {self.checkpoint}" if self.checkpoint else ""
            self.suite.remarks.append(
                f"Random weights, {self.num_classes} classes: {', '.join(random)}. Their score thresholds let up to "
                f"{self._num_nms_candidates} (box, class) pairs of an image pass to NMS{like}."
            )
        return self.suite

    def _add_config(self, target: str) -> None:
        """Add the network of a config with random weights, saved as a checkpoint."""
        config = self._config_of(target)
        size = self._size_of(config)
        model, threshold = build_untrained(
            lambda: build_model(config, self.num_classes),
            make_batch(self.images, size, len(self.images)),
            self._count_nms_candidates(),
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
        """Add a checkpoint in every backend."""
        model, _, _ = load_detector(path, torch.device("cpu"), overrides=overrides)
        base = replace(self._contender(network, "detector", path, size, model), overrides=overrides)
        base = replace(base, ap=self.settings.aps.get(network, ap))
        default = [backend for backend in BACKENDS if backend != "cuda_graph" or self.device.type == "cuda"]
        for backend in self.settings.backends or default:
            candidate = replace(base, backend=backend)
            if backend not in PYTORCH:
                candidate = self._export(candidate)
            self.suite.candidates.append(candidate)

    def _export(self, candidate: Candidate) -> Candidate:
        """Export a checkpoint for a backend with its own format: with a fixed size, for any batch."""
        path = self._new_file(".onnx" if candidate.backend == "onnxruntime" else ".xml")
        exported = replace(candidate, path=path, overrides=())
        self._try_export(exported, partial(export_for, candidate, path))
        return exported

    def _add_exported(self, target: str) -> None:
        """Add an exported file of this toolkit, or any ONNX file."""
        path, backend = Path(target), EXPORTED[Path(target).suffix.lower()]
        if backend == "onnxruntime":
            session = OnnxModel(path, self.size, self.threads)
            if METADATA_KEY not in session.metadata:
                size = session.size or self.size
                raw = Candidate(target, backend, "raw_onnx", path, size, str(self.device), self.threads)
                self.suite.candidates.append(replace(raw, ap=self.settings.aps.get(target)))
                return
        metadata = read_metadata(path)
        config = exported_config(metadata, path)
        config.model.backbone.weights = None
        model = build_model(config, len(metadata.names)).eval()
        candidate = self._contender(target, "detector", path, metadata.size or self._size_of(config), model)
        self.suite.candidates.append(replace(candidate, backend=backend))

    def _add_peer(self, name: str) -> None:
        size, path = peer_size(name, self.size), self._new_file(".pth")
        images = make_batch(self.images, size, len(self.images))
        model = save_peer(name, path, self.num_classes, size, images, self._count_nms_candidates(), self.settings.seed)
        base = self._contender(name, "peer", path, size, model)
        for backend in self.settings.backends or PEER_BACKENDS:
            candidate = replace(base, backend=backend)
            if backend == "onnxruntime":
                candidate = replace(candidate, path=self._new_file(".onnx"))
                self._try_export(candidate, partial(export_peer, model, candidate.path, images[0]))
            elif backend not in PYTORCH:
                self.suite.failed[candidate] = f"torchvision's detectors cannot be measured in {backend}"
            self.suite.candidates.append(candidate)

    def _try_export(self, candidate: Candidate, export: Callable[[], Any]) -> None:
        """Export a candidate; if that fails and it is optional, record the reason."""
        try:
            export()
        except UserError as error:
            if not candidate.optional:
                raise
            self.suite.failed[candidate] = str(error)

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

    def _count_nms_candidates(self) -> int:
        """Number of (box, class) pairs of an image that the first checkpoint passes to NMS."""
        if self._num_nms_candidates is None:
            self._num_nms_candidates = NUM_NMS_CANDIDATES
            if self.checkpoint is not None:
                model, config, _ = load_detector(self.checkpoint, torch.device("cpu"), overrides=self.overrides)
                (image,) = make_batch(self.images, self._size_of(config), 1)
                scores = nms_candidate_scores(model, image.float() / 255)
                self._num_nms_candidates = int((scores > config.eval.score_threshold).sum())
        return self._num_nms_candidates

    def _config_of(self, target: str) -> DetectionConfig:
        if kind_of(target) == "config":
            # The weights are random here, so their file may be missing.
            return load_config(target, ["model.backbone.weights=null"])
        return config_of(self._content_of(target), target)

    def _content_of(self, checkpoint: str) -> dict[str, Any]:
        if checkpoint not in self._contents:
            self._contents[checkpoint] = read_checkpoint(checkpoint)
        return self._contents[checkpoint]

    def _size_of(self, config: DetectionConfig) -> tuple[int, int]:
        """The size in the settings, or the padded size of a landscape image with the config's sides."""
        sides = (config.data.short_side, config.data.long_side)
        return self.settings.size or (-(-sides[0] // DIVISOR) * DIVISOR, -(-sides[1] // DIVISOR) * DIVISOR)

    def _new_file(self, suffix: str) -> Path:
        return self.folder / f"{next(self._files)}{suffix}"
