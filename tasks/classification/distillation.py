"""Knowledge distillation from a trained classifier: soft (arXiv 1503.02531) or hard (DeiT, arXiv 2012.12877)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.checkpoint import first_names
from tasks.classification.network import create_classifier
from tasks.classification.weights import load_weights
from tasks.core.errors import UserError, expect

KINDS = ("hard", "soft")


@dataclass
class DistillationConfig:
    """What a network learns from a teacher beside the labels.

    The teacher sees the same augmented, mixed images as the student, so it must have been trained with the same
    normalisation. It has to know the same classes, in the same order.

    Args:
        teacher: Any timm model, or one of ours.
        teacher_weights: Its weights as a file; None takes timm's pretrained ones.
        kind: ``hard``: cross-entropy against the teacher's decision; ``soft``: Kullback-Leibler divergence from the
            teacher's probabilities at `temperature`, times its square.
        alpha: Weight of this loss; that of the labels has 1 - alpha.
        temperature: Divisor of both networks' logits in ``soft``.
    """

    teacher: str
    teacher_weights: str | None = None
    kind: Literal["hard", "soft"] = "hard"
    alpha: float = 0.5
    temperature: float = 3.0

    def __post_init__(self) -> None:
        key = "model.distillation"
        expect(f"{key}.kind", self.kind, self.kind in KINDS, f"one of {', '.join(KINDS)}")
        expect(f"{key}.alpha", self.alpha, 0 <= self.alpha <= 1, "a weight in 0..1")
        expect(f"{key}.temperature", self.temperature, self.temperature > 0, "a positive number")


class Teacher:
    """The frozen teacher of a training.

    Not a module, and shared by copies of the one that holds it: neither checkpoints, the optimizer, the moving average
    of the weights nor DDP know of it. Raises UserError unless all its weights are found and its classes are K.
    """

    def __init__(self, config: DistillationConfig, num_classes: int, img_size: int | None) -> None:
        key = "model.distillation.teacher"
        file = config.teacher_weights
        self.network = create_classifier(
            config.teacher, num_classes if file else None, img_size=img_size, pretrained=not file, key=key
        )
        if file:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an error below
                report = load_weights(self.network, file)
            shapes = [f"{name} {found}, expected {own}" for name, (found, own) in report.mismatched.items()]
            if lacking := [*shapes, *(f"{name} is missing" for name in report.missing)]:
                raise UserError(f"{key}_weights: {file} is no trained {config.teacher}: {first_names(lacking)}")
        classes: Any = self.network.num_classes
        if classes != num_classes:
            raise UserError(f"{key}: {config.teacher!r} knows {classes} classes; the data has {num_classes}")
        self.network.eval().requires_grad_(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        return self

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, 3, H, W), with float32 weights."""
        return self.network(images.float())


def distillation_loss(student: Tensor, teacher: Tensor, config: DistillationConfig) -> Tensor:
    """The loss of the student's logits (B, K) against the teacher's, averaged over the batch.

    ``soft`` is equation 2 of DeiT's paper with its factor temperature^2; DeiT's code also divides by the number of
    classes, which is a matter of `alpha`.
    """
    if config.kind == "hard":
        return F.cross_entropy(student, teacher.argmax(1))
    t = config.temperature
    log_student, log_teacher = (F.log_softmax(logits.float() / t, dim=1) for logits in (student, teacher))
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * t**2
