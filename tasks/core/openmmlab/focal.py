"""Focal losses on logits and on softmax probabilities, with their derivatives (arXiv 1708.02002, equation 5)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.core.openmmlab.precision import widen


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write the loss of logits (n, classes) into `output` (n, classes).

    `target` (n,) holds classes; `classes` itself is background. `weight` is (classes,) or empty.
    """
    logits, is_class, scale = _sigmoid_terms(input, target, weight)
    p = logits.sigmoid()
    positive = -alpha * (1 - p) ** gamma * F.logsigmoid(logits)
    negative = -(1 - alpha) * p**gamma * F.logsigmoid(-logits)
    output.copy_(torch.where(is_class, positive, negative) * scale)


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the derivative of `sigmoid_focal_loss_forward` by the logits into `grad_input`."""
    logits, is_class, scale = _sigmoid_terms(input, target, weight)
    p = logits.sigmoid()
    positive = -alpha * (1 - p) ** gamma * (1 - p - gamma * p * F.logsigmoid(logits))
    negative = -(1 - alpha) * p**gamma * (gamma * (1 - p) * F.logsigmoid(-logits) - p)
    grad_input.copy_(torch.where(is_class, positive, negative) * scale)


def _sigmoid_terms(input: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, where a logit is that of the target (n, classes), and the weights of the rows (n, 1)."""
    logits, weight = widen(input, weight)
    is_class = target[:, None] == torch.arange(logits.shape[1], device=logits.device)
    return logits, is_class, _row_weights(logits, target, weight)[:, None]


def _row_weights(values: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Return the class weight of every target (n,), 1 for targets that are no class."""
    if weight.numel() == 0:
        return values.new_ones(len(values))
    is_class = (target >= 0) & (target < len(weight))
    return torch.where(is_class, weight[target * is_class], 1)


def softmax_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write the loss of softmax probabilities (n, classes) into `output` (n,); a negative target costs nothing."""
    p, scale = _target_probabilities(input, target, weight)
    output.copy_(-alpha * (1 - p) ** gamma * p.log() * scale)


def softmax_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the derivative of `softmax_focal_loss_forward` by the logits behind `input` into `grad_input`.

    `buff` (n,) receives its part that the classes of a row share.
    """
    p, scale = _target_probabilities(input, target, weight)
    shared = alpha * scale * (gamma * (1 - p) ** (gamma - 1) * p * p.log() - (1 - p) ** gamma)
    shared = torch.where(p == 1, 0, shared) if gamma > 0 else shared  # 0 * inf where gamma < 1
    buff.copy_(shared)
    (probabilities,) = widen(input)
    is_class = target[:, None] == torch.arange(probabilities.shape[1], device=input.device)
    grad_input.copy_(shared[:, None] * (is_class.to(probabilities) - probabilities))


def _target_probabilities(input: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probability of every target (n,), not 0, and the weight of its row, 0 for negative targets."""
    probabilities, weight = widen(input, weight)
    p = probabilities.gather(1, target.clamp(min=0)[:, None]).squeeze(1)
    scale = _row_weights(probabilities, target, weight) * (target >= 0)
    return p.clamp(min=torch.finfo(torch.float32).tiny), scale
