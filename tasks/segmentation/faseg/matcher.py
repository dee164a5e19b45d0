"""Optimal assignment of predicted masks to target segments (DETR, arXiv 2005.12872; Mask2Former, arXiv 2112.01527)."""

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tasks.core.errors import UserError
from tasks.segmentation.faseg.points import PointSource, point_sample, uniform_points


def matching_costs(
    class_logits: Tensor, mask_logits: Tensor, labels: Tensor, masks: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the class, mask and dice costs, (..., Q, T) each, of pairing every prediction with every target.

    class_logits (..., Q, K + 1), labels (..., T); mask_logits (..., Q, P) and masks (..., T, P) are values at the same
    P points.
    """
    cost_class = -torch.take_along_dim(class_logits.softmax(dim=-1), labels.unsqueeze(-2), dim=-1)
    # Binary cross-entropy of all pairs: softplus(a) where the target is 0, softplus(-a) = softplus(a) - a elsewhere.
    negative = F.softplus(mask_logits)
    cost_mask = (negative.sum(dim=-1, keepdim=True) - mask_logits @ masks.mT) / mask_logits.shape[-1]
    probability = mask_logits.sigmoid()
    overlap = 2 * probability @ masks.mT
    total = probability.sum(dim=-1, keepdim=True) + masks.sum(dim=-1).unsqueeze(-2)
    return cost_class, cost_mask, 1 - (overlap + 1) / (total + 1)


class HungarianMatcher(nn.Module):
    """Match each image's queries to its segments with the least total cost, masks compared at random points."""

    def __init__(
        self,
        class_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        num_points: int = 12544,
        draw_points: PointSource = uniform_points,
    ) -> None:
        super().__init__()
        self.class_weight, self.mask_weight, self.dice_weight = class_weight, mask_weight, dice_weight
        self.num_points = num_points
        self.draw_points = draw_points

    @torch.no_grad()
    def forward(
        self, pred_logits: Tensor, pred_masks: Tensor, labels: list[Tensor], masks: list[Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """Return per image the matched query and target indices, min(Q, T) each, queries ascending.

        pred_logits (B, Q, K + 1), pred_masks (B, Q, h, w); per image labels (T,) and masks (T, H, W), floating point.
        Raises `UserError` when a cost is not finite.
        """
        # Each image has its own points, shared by its queries and targets; the missing targets of images are zero.
        points = torch.cat([self.draw_points(1, self.num_points, pred_masks) for _ in masks])  # (B, P, 2)
        predicted = point_sample(pred_masks, points)  # (B, Q, P)
        target = point_sample(pad_sequence(masks, batch_first=True).to(predicted.dtype), points)  # (B, T, P)
        cost_class, cost_mask, cost_dice = matching_costs(
            pred_logits, predicted, pad_sequence(labels, batch_first=True), target
        )
        cost = self.class_weight * cost_class + self.mask_weight * cost_mask + self.dice_weight * cost_dice
        costs = cost.cpu()  # (B, Q, T), in one transfer
        return [
            self._assign(image[:, : len(own)], pred_logits.device) for image, own in zip(costs, labels, strict=True)
        ]

    @staticmethod
    def _assign(cost: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        if not cost.isfinite().all():
            raise UserError(
                "FASeg: matching costs contain NaN or infinity, so the network's predictions do; "
                "lower the learning rate or train with precision 32-true or bf16-mixed"
            )
        queries, targets = linear_sum_assignment(cost.numpy())
        return torch.as_tensor(queries, device=device), torch.as_tensor(targets, device=device)
