"""Losses of a classifier: from its labels, and from a teacher's logits and feature maps."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbones.classifier import normalize
from detection.core.errors import UserError
from detection.pretraining.classification_config import TeacherConfig
from detection.pretraining.teacher import FeatureTap, TeacherOutput, find_taps, logits_and_maps


class DistillationObjective(nn.Module):
    """A classifier with its losses; to learn a teacher's maps, also a 1x1 convolution per level from its maps to those.

    forward: images float32 [N, 3, H, W] in [0, 1]; labels int64 [N] or float32 [N, num_classes]; the teacher's output
    -> losses, scalars: label; with a teacher also logits and features.
    """

    def __init__(
        self,
        network: nn.Module,
        label_smoothing: float = 0.0,
        teacher: TeacherConfig | None = None,
        teacher_taps: Mapping[str, FeatureTap] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.label_smoothing = label_smoothing
        self.teacher = teacher
        own = find_taps(network) if teacher_taps else {}
        self.taps = {level: own[level] for level in teacher_taps or {} if level in own}
        if teacher_taps and not self.taps:
            raise UserError(
                f"the network has no maps of the strides that the teacher has ({', '.join(teacher_taps)} are strides "
                "8, 16, 32): set teacher.features=0"
            )
        self.regressors = nn.ModuleDict(
            {
                level: nn.Conv2d(tap.channels, teacher_taps[level].channels, 1)
                for level, tap in self.taps.items()
                if teacher_taps
            }
        )

    def forward(self, images: Tensor, labels: Tensor, teacher_output: TeacherOutput | None = None) -> dict[str, Tensor]:
        logits, maps = logits_and_maps(self.network, normalize(images, self.network), self.taps)
        losses = {"label": F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)}
        if self.teacher is None or teacher_output is None:
            return losses
        if self.teacher.logits:
            losses["logits"] = self.teacher.logits * distillation_loss(
                logits, teacher_output.logits, self.teacher.temperature
            )
        if self.teacher.features:
            errors = [
                relative_mse(self.regressors[level](maps[level]), teacher_output.maps[level]) for level in self.taps
            ]
            losses["features"] = self.teacher.features * torch.stack(errors).mean()
        return losses


def distillation_loss(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL divergence of softened logits, times temperature², which keeps the size of gradients (arXiv 1503.02531)."""
    own = F.log_softmax(logits.float() / temperature, dim=1)
    target = F.log_softmax(teacher.float() / temperature, dim=1)
    return F.kl_div(own, target, reduction="batchmean", log_target=True) * temperature**2


def relative_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over the mean square of the target, at any scale: 1 for a prediction of zeros."""
    prediction, target = prediction.float(), target.float()
    if prediction.shape[2:] != target.shape[2:]:  # networks round odd sizes up or down
        height, width = prediction.shape[2:]
        target = F.adaptive_avg_pool2d(target, (height, width))
    return F.mse_loss(prediction, target) / target.square().mean().clamp(min=1e-12)
