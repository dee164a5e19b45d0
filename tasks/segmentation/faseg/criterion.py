"""Losses of mask classification: class cross-entropy, point-wise mask cross-entropy and dice.

Mask2Former (arXiv 2112.01527), section 3.3.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.core.errors import expect
from tasks.core.preprocess import SIZE_DIVISOR
from tasks.segmentation.faseg.matcher import HungarianMatcher
from tasks.segmentation.faseg.points import PointSource, point_sample, uncertain_points, uniform_points
from tasks.segmentation.labels import IGNORE


class Segments(NamedTuple):
    """The target segments of one image."""

    labels: Tensor  # (T,) int64
    masks: Tensor  # (T, H, W), 1 inside


def semantic_segments(label_maps: Tensor) -> list[Segments]:
    """Split label maps (B, H, W) into one segment per class present.

    Masks are zero-padded right and bottom as the network pads its images. Ignored pixels belong to no segment.
    """
    height, width = label_maps.shape[-2:]
    padding = (0, -width % SIZE_DIVISOR, 0, -height % SIZE_DIVISOR)
    segments = []
    for label_map in label_maps:
        labels = label_map.unique().long()
        labels = labels[labels != IGNORE]
        masks = label_map[None] == labels[:, None, None]
        segments.append(Segments(labels, F.pad(masks, padding)))
    return segments


class SetCriterion(nn.Module):
    """Match predictions to segments and compute the losses of the final and all auxiliary predictions.

    `num_points` points represent each mask: `importance_sample_ratio` of them where the prediction is least decided
    among `oversample_ratio` times as many. Unmatched queries learn "no object" with weight `no_object_weight`.
    """

    def __init__(
        self,
        num_classes: int,
        num_points: int = 12544,
        oversample_ratio: float = 3.0,
        importance_sample_ratio: float = 0.75,
        no_object_weight: float = 0.1,
        class_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        draw_points: PointSource = uniform_points,
    ) -> None:
        super().__init__()
        expect("num_points", num_points, num_points >= 1, "at least 1")
        self.num_classes = num_classes
        self.no_object_weight = no_object_weight
        self.num_points = num_points
        self.oversample_ratio = oversample_ratio
        self.importance_sample_ratio = importance_sample_ratio
        self.draw_points = draw_points
        self.weights = {"loss_ce": class_weight, "loss_mask": mask_weight, "loss_dice": dice_weight}
        self.matcher = HungarianMatcher(class_weight, mask_weight, dice_weight, num_points, draw_points)

    def forward(self, outputs: dict[str, Any], segments: list[Segments]) -> dict[str, Tensor]:
        """Return the unweighted losses: `loss_ce`, `loss_mask`, `loss_dice`, and `loss_x_i` of auxiliary output i.

        `outputs` as `FASegNetwork` returns them. Computed in float32 also under autocast.
        """
        with torch.autocast(device_type=outputs["pred_masks"].device.type, enabled=False):
            dtype = torch.promote_types(outputs["pred_masks"].dtype, torch.float32)
            labels = [image.labels for image in segments]
            masks = [image.masks.to(dtype) for image in segments]
            num_masks = self._average_num_masks(sum(len(image.labels) for image in segments), outputs["pred_masks"])
            losses = {}
            for suffix, prediction in [("", outputs), *((f"_{i}", p) for i, p in enumerate(outputs["aux_outputs"]))]:
                logits, mask_logits = prediction["pred_logits"].to(dtype), prediction["pred_masks"].to(dtype)
                for name, loss in self._losses(logits, mask_logits, labels, masks, num_masks).items():
                    losses[name + suffix] = loss
        return losses

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """Return the weighted sum of what `forward` returned."""
        return torch.stack([self.weights["_".join(name.split("_")[:2])] * loss for name, loss in losses.items()]).sum()

    @staticmethod
    def _average_num_masks(count: int, like: Tensor) -> Tensor:
        # Every rank divides by the same number, so averaging gradients over ranks gives the loss of the whole batch.
        num_masks = torch.tensor(float(count), device=like.device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(num_masks)
            num_masks /= dist.get_world_size()
        return num_masks.clamp(min=1)

    def _losses(
        self, logits: Tensor, mask_logits: Tensor, labels: list[Tensor], masks: list[Tensor], num_masks: Tensor
    ) -> dict[str, Tensor]:
        pairs = self.matcher(logits, mask_logits, labels, masks)

        classes = torch.full(logits.shape[:2], self.num_classes, dtype=torch.long, device=logits.device)
        for image, (queries, targets) in enumerate(pairs):
            classes[image, queries] = labels[image][targets]
        class_weights = logits.new_ones(self.num_classes + 1)
        class_weights[self.num_classes] = self.no_object_weight
        loss_ce = F.cross_entropy(logits.transpose(1, 2), classes, class_weights)

        predicted = torch.cat([mask_logits[image, queries] for image, (queries, _) in enumerate(pairs)])  # (N, h, w)
        target = torch.cat([masks[image][targets] for image, (_, targets) in enumerate(pairs)])  # (N, H, W)
        points = self.select_points(predicted)
        a = point_sample(predicted.unsqueeze(1), points).squeeze(1)  # (N, P)
        with torch.no_grad():
            t = point_sample(target.unsqueeze(1), points).squeeze(1)
        s = a.sigmoid()
        loss_mask = F.binary_cross_entropy_with_logits(a, t, reduction="none").mean(dim=1).sum() / num_masks
        dice = 1 - (2 * (s * t).sum(dim=1) + 1) / (s.sum(dim=1) + t.sum(dim=1) + 1)
        return {"loss_ce": loss_ce, "loss_mask": loss_mask, "loss_dice": dice.sum() / num_masks}

    def select_points(self, mask_logits: Tensor) -> Tensor:
        """Choose the points (N, num_points, 2) at which masks (N, h, w) are compared with their targets."""
        return uncertain_points(
            mask_logits, self.num_points, self.oversample_ratio, self.importance_sample_ratio, self.draw_points
        )
