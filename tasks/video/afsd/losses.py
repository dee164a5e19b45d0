"""Losses of AFSD (arXiv 2103.13137), sections 3.2 to 3.5, as in the official code."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.boundary_max_pool import boundary_max_pool
from tasks.core.errors import expect
from tasks.video.afsd.assignment import Targets, assign, overlaps, refined_labels
from tasks.video.afsd.head import AFSDOutput, BoundaryFeatures
from tasks.video.afsd.windows import frame_windows

BACKGROUND_ALPHA = 0.25  # of the focal loss; the rest is that of all actions
FOCAL_GAMMA = 2
PROBABILITY_EPS = 1e-6
BRANCH_WEIGHT = 0.1  # of the boundary losses on the features of the two branches


@dataclass
class AFSDLossConfig:
    """Weights and rules of the losses; the defaults are those of THUMOS14.

    ActivityNet-1.3 has `loc_weight` 1, `refine_iou` 0.6, `smooth_l1`, `per_clip`, `keep_best`, and `level_ranges`
    (`assignment.ACTIVITYNET_RANGES`). Its official code also has a `triplet_stride` of 4.

    Args:
        loc_weight: Weight of the two localisation losses.
        cls_weight: Weight of the two classification losses and of the quality loss.
        triplet_weight: Weight of the triplet loss on spliced clips.
        refine_iou: Overlap of a coarse proposal with its instance from which on its refinement is trained.
        smooth_l1: Smooth L1 loss of the refined distances instead of L1.
        per_clip: Normalise by the positive points of each clip and average over clips, instead of over the batch.
        keep_best: Always train the refinement of the best proposal of a clip.
        level_ranges: Frames between which the farther boundary must be away, per level; None for no limits.
        triplet_stride: Frames per step by which windows on the finest level are divided in the triplet loss; None is
            the level's stride.
    """

    loc_weight: float = 10.0
    cls_weight: float = 1.0
    triplet_weight: float = 0.1
    refine_iou: float = 0.5
    smooth_l1: bool = False
    per_clip: bool = False
    keep_best: bool = False
    level_ranges: list[tuple[float, float]] | None = None
    triplet_stride: float | None = None

    def __post_init__(self) -> None:
        for name in ("loc_weight", "cls_weight", "triplet_weight"):
            expect(f"loss.{name}", getattr(self, name), getattr(self, name) >= 0, "at least 0")
        expect("loss.refine_iou", self.refine_iou, 0 <= self.refine_iou <= 1, "an overlap between 0 and 1")


def giou_loss(distances: Tensor, targets: Tensor) -> Tensor:
    """1 - GIoU of segments around the same points, given as distances (..., 2) to start and end."""
    intersection = torch.minimum(distances, targets).sum(dim=-1)
    hull = torch.maximum(distances, targets).sum(dim=-1)
    union = distances.sum(dim=-1) + targets.sum(dim=-1) - intersection
    outside = (hull - union) / hull.clamp(min=torch.finfo(torch.float32).eps)
    return 1 - overlaps(distances, targets) + outside


def focal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the softmax focal loss (arXiv 1708.02002) of logits (N, K + 1) for labels (N,), 0 being background."""
    p = logits.softmax(dim=-1).gather(1, labels[:, None])[:, 0] + PROBABILITY_EPS
    alpha = torch.where(labels > 0, 1 - BACKGROUND_ALPHA, BACKGROUND_ALPHA).to(p)
    return -(alpha * (1 - p) ** FOCAL_GAMMA * p.log()).sum()


def refine(loc: Tensor, prop_loc: Tensor) -> Tensor:
    """Refined distances (..., 2) of coarse ones: corrections count in half lengths."""
    return loc + 0.5 * loc.sum(dim=-1, keepdim=True) * prop_loc


def detection_losses(
    output: AFSDOutput, segments: Sequence[Tensor], labels: Sequence[Tensor], config: AFSDLossConfig
) -> dict[str, Tensor]:
    """The unweighted losses ``loc``, ``conf``, ``prop_loc``, ``prop_conf`` and ``quality`` of a batch.

    `segments` (M_b, 2) are the instances of each clip in frames, `labels` (M_b,) their classes from 0. Each sum of a
    term is divided by the number of positive points, coarse or refined, at least 1.
    """
    clips = []
    for i in range(len(output.loc)):
        truth = segments[i].to(output.loc)
        targets = assign(output.points, output.levels, truth, labels[i] + 1, output.length, config.level_ranges)
        clips.append(_sums_of_clip(output, i, targets, config))
    sums, counts = ({name: torch.stack([clip[j][name] for clip in clips]) for name in clips[0][j]} for j in (0, 1))
    losses = {}
    for name, parts in sums.items():
        positives = counts["refined" if name.startswith("prop") else "coarse"]
        if config.per_clip:
            losses[name] = (parts / positives.clamp(min=1)).mean()
        else:
            losses[name] = parts.sum() / positives.sum().clamp(min=1)
    return losses


def _sums_of_clip(
    output: AFSDOutput, i: int, targets: Targets, config: AFSDLossConfig
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sum of each term over the points of clip `i`, and the numbers of its positive points."""
    loc, prop_loc = output.loc[i], output.prop_loc[i].to(output.loc.dtype)
    refined = refined_labels(loc.detach(), targets, config.refine_iou, config.keep_best)
    positive, again = targets.labels > 0, refined > 0
    half_lengths = 0.5 * loc.detach()[again].sum(dim=-1, keepdim=True)
    corrections = (targets.distances[again] - loc.detach()[again]) / half_lengths
    distance = F.smooth_l1_loss if config.smooth_l1 else F.l1_loss
    # As in the official code, the overlap is no constant: its gradient reaches both distances.
    overlap = overlaps(refine(loc, prop_loc)[positive], targets.distances[positive]).clamp(min=0)
    quality = output.quality[i][positive].to(overlap.dtype)
    sums = {
        "loc": giou_loss(loc[positive], targets.distances[positive]).sum(),
        "conf": focal_loss(output.conf[i].to(loc.dtype), targets.labels),
        "prop_loc": distance(prop_loc[again], corrections, reduction="sum"),
        "prop_conf": focal_loss(output.prop_conf[i].to(loc.dtype), refined),
        "quality": (F.softplus(quality) - quality * overlap).sum(),
    }
    return sums, {"coarse": positive.sum(), "refined": again.sum()}


def boundary_losses(boundaries: BoundaryFeatures, masks: Tensor) -> dict[str, Tensor]:
    """The losses ``start`` and ``end``: boundary features must be active at the boundaries alone.

    `masks` (B, 2, L) are 1 on the frames around starts, and around ends, of instances, else 0.
    """
    losses = dict.fromkeys(("start", "end"), masks.new_zeros(()))
    for feature, weight in zip(boundaries, (1.0, BRANCH_WEIGHT, BRANCH_WEIGHT), strict=True):
        feature = feature.to(torch.promote_types(feature.dtype, torch.float32))
        targets = F.interpolate(masks.to(feature.dtype), feature.shape[2])
        for name, half, target in zip(losses, feature.chunk(2, dim=1), targets.unbind(dim=1), strict=True):
            losses[name] = losses[name] + weight * F.binary_cross_entropy(half.tanh().mean(dim=1), target)
    return losses


def triplet_loss(boundaries: BoundaryFeatures, segments: Tensor, stride: float | None = None) -> Tensor:
    """Triplet loss on spliced clips: the end of an action's first part is like the start of its second part.

    `segments` (B, 3, 2), in frames, are the first part, the second part, and the background between them, whose start
    must be unlike both. `stride` is that of `AFSDLossConfig.triplet_stride`.
    """
    frames = boundaries.frame.shape[2]
    windows = frame_windows(segments[..., 0], segments[..., 1])
    total = boundaries.frame.new_zeros(())
    for feature, weight in zip(boundaries, (1.0, BRANCH_WEIGHT, BRANCH_WEIGHT), strict=True):
        feature = feature.to(torch.promote_types(feature.dtype, torch.float32))
        steps = 1.0 if feature.shape[2] == frames else stride or frames / feature.shape[2]
        starts, ends = boundary_max_pool(feature, windows.to(feature.dtype) / steps).chunk(2, dim=1)
        total = total + weight * F.triplet_margin_loss(ends[..., 0], starts[..., 1], starts[..., 2])
    return total


def total_loss(losses: dict[str, Tensor], config: AFSDLossConfig) -> Tensor:
    """The weighted sum of the losses of the functions above, by name; ``triplet`` may be missing."""
    weights = {"loc": config.loc_weight, "prop_loc": config.loc_weight, "triplet": config.triplet_weight}
    weights |= dict.fromkeys(("conf", "prop_conf", "quality"), config.cls_weight)
    return torch.stack([weights.get(name, 1.0) * value for name, value in losses.items()]).sum()
