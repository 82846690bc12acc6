"""Weights of other frameworks: what a file holds, and the same weights in the published PyTorch layout."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save
from torch.utils.data import DataLoader
from torchvision import models, transforms
from torchvision.datasets import ImageFolder

from backbones import GhostNet, LoadReport, WeightsError, load_weights, read_weights
from backbones.weight_layouts import ghostnet_width
from detection.core.device import pick_device
from detection.core.errors import UserError
from detection.core.outputs import write_output
from detection.core.progress import progress_bar
from detection.data.image_io import read_image

SUFFIXES = (".safetensors", ".pth")


@dataclass(frozen=True)
class Converted:
    """A GhostNet classifier with the weights of a file, in evaluation mode."""

    path: Path
    sha256: str
    width: float
    network: GhostNet
    report: LoadReport

    def __str__(self) -> str:
        network = self.network
        parameters = sum(p.numel() for p in network.parameters()) / 1e6
        channels = ", ".join(f"{level} {count}" for level, count in network.channels.items())
        lines = [
            f"file      {self.path}, {self.path.stat().st_size / 1e6:.1f} MB, sha256 {self.sha256}",
            f"network   ghostnet, width {self.width:g}, {network.classifier.out_features} classes: "
            f"{parameters:.3f} M parameters; channels {channels}",
            f"load      {self.report}",
        ]
        if self.report.unexpected:
            lines.append(f"          not used: {', '.join(self.report.unexpected[:5])}, …")
        return "\n".join(lines)


def convert(file: str | Path) -> Converted:
    """Read a GhostNet classifier's weights in any layout that is known, and load all of them strictly.

    Raises:
        UserError: absent, unreadable or hostile; of another network; parts are missing; or its sha256 is not
            the one that its name claims (MindCV's files end in the first 8 digits: ghostnet_130-cf4c235c.ckpt).
    """
    path = Path(file).expanduser()
    try:
        state_dict, source = read_weights(path, "ghostnet", 1.0)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        claimed = re.search(r"-([0-9a-f]{8})(-910v2)?\.ckpt$", path.name)
        if claimed is not None and not sha256.startswith(claimed[1]):
            raise UserError(
                f"{path} is damaged: its sha256 begins with {sha256[:8]}, not with {claimed[1]} as its name says; "
                "download it again"
            )
        width, head = ghostnet_width(state_dict), state_dict.get("classifier.weight")
        if width is None or head is None or head.ndim != 2:
            keys = ", ".join(list(state_dict)[:3])
            raise UserError(f"{path} is not of a GhostNet classifier (it has {keys}, …)")
        network = GhostNet(width, num_classes=head.shape[0]).eval()
        report = load_weights(network, state_dict, source)
    except WeightsError as error:
        raise UserError(str(error)) from error
    return Converted(path, sha256, width, network, report)


def check_out(out: Path) -> None:
    """Raises UserError for another suffix than `.safetensors` or `.pth`, and where there is no such folder."""
    if out.suffix not in SUFFIXES:
        raise UserError(f"--out {out} must end in {' or '.join(SUFFIXES)}")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")


def write(converted: Converted, out: Path) -> None:
    """Write the network in the published layout (512 keys), which `model.backbone.weights` and timm take.

    Raises:
        UserError: another suffix than `.safetensors` or `.pth`, or the file cannot be written.
    """
    check_out(out)
    state_dict = converted.network.state_dict()
    if out.suffix == ".pth":
        write_output(out, lambda file: torch.save(state_dict, file))
        return
    metadata = {
        "network": "ghostnet",
        "width": f"{converted.width:g}",
        "source": converted.path.name,
        "source_sha256": converted.sha256,
    }
    write_output(out, lambda file: file.write(save(state_dict, metadata)))


def _view() -> transforms.Compose:
    """What the published accuracies were measured on: the middle 224 x 224 of an image of short side 256."""
    return transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(GhostNet.mean, GhostNet.std),
        ]
    )


@torch.inference_mode()
def name_image(network: GhostNet, image: str | Path, count: int = 5) -> list[tuple[str, float]]:
    """The likeliest classes of an image: (ImageNet's name, probability), best first. Raises UserError."""
    probabilities = network(_view()(_open(image))[None])[0].softmax(0)
    names = models.ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    if len(names) != len(probabilities):
        names = [f"class {index}" for index in range(len(probabilities))]
    best = probabilities.topk(min(count, len(probabilities)))
    return [(names[index], float(p)) for p, index in zip(best.values, best.indices, strict=True)]


@torch.inference_mode()
def accuracy(network: GhostNet, folder: str | Path) -> tuple[float, float, int]:
    """Top-1 and top-5 accuracy in percent, and the number of images, on a folder of class folders (n01440764, …).

    Raises:
        UserError: absent, empty, a broken image, or another number of class folders than the network has classes.
    """
    device = pick_device("auto")
    network = network.to(device)
    try:
        dataset = ImageFolder(str(folder), _view(), loader=_open)
    except FileNotFoundError as error:
        raise UserError(f"--val {folder}: {str(error).splitlines()[0]}") from error
    classes = network.classifier.out_features
    if len(dataset.classes) != classes:
        raise UserError(f"--val {folder} has {len(dataset.classes)} class folders, the network {classes} classes")
    right = torch.zeros(2, dtype=torch.long)
    for images, labels in progress_bar(DataLoader(dataset, 64), "validation", unit="batch"):
        found = network(images.to(device)).topk(min(5, classes)).indices.cpu() == labels[:, None]
        right += torch.stack([found[:, 0].sum(), found.any(1).sum()])
    top1, top5 = (100 * right / len(dataset)).tolist()
    return top1, top5, len(dataset)


def _open(image: str | Path) -> Image.Image:
    return Image.fromarray(read_image(image))
