"""From queries to label maps: semantic, panoptic and instance inference (Mask2Former, arXiv 2112.01527)."""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from tasks.segmentation.views import resize_maps

MASK_STRIDE = 4


class PanopticSegment(NamedTuple):
    """One segment of a panoptic map."""

    id: int
    is_thing: bool
    category: int


class Instances(NamedTuple):
    """Detected instances, best first."""

    scores: Tensor  # (N,)
    classes: Tensor  # (N,) int64
    masks: Tensor  # (N, H, W) bool


def class_scores(pred_logits: Tensor, pred_masks: Tensor) -> Tensor:
    """Sum over queries of class probability times mask probability.

    (..., Q, K + 1) and (..., Q, H, W) give (..., K, H, W). Scores are not normalised over classes and may exceed 1.
    """
    probability = pred_logits.softmax(dim=-1)[..., :-1]
    return torch.einsum("...qk,...qhw->...khw", probability, pred_masks.sigmoid())


def resize_mask_logits(pred_masks: Tensor, image_size: tuple[int, int], output_size: tuple[int, int]) -> Tensor:
    """Upsample mask logits (Q, h, w) to the padded image, cut the padding off and resize to `output_size`."""
    padded = (pred_masks.shape[-2] * MASK_STRIDE, pred_masks.shape[-1] * MASK_STRIDE)
    return resize_maps(resize_maps(pred_masks, padded)[:, : image_size[0], : image_size[1]], output_size)


def semantic_inference(
    pred_logits: Tensor, pred_masks: Tensor, image_size: tuple[int, int], output_size: tuple[int, int]
) -> Tensor:
    """Return class scores (K, *output_size) of one image from its queries (Q, K + 1) and (Q, h, w).

    `image_size` is the network's input before padding. Scores are formed at the padded size, cropped, then resized.
    """
    padded = (pred_masks.shape[-2] * MASK_STRIDE, pred_masks.shape[-1] * MASK_STRIDE)
    scores = class_scores(pred_logits, resize_maps(pred_masks, padded))
    return resize_maps(scores[:, : image_size[0], : image_size[1]], output_size)


def panoptic_inference(
    pred_logits: Tensor,
    pred_masks: Tensor,
    thing_classes: Collection[int],
    score_threshold: float = 0.8,
    overlap_threshold: float = 0.8,
) -> tuple[Tensor, list[PanopticSegment]]:
    """Return a map (H, W) int32 of segment ids, 0 for void, and the segments.

    pred_logits (Q, K + 1); pred_masks (Q, H, W) at output size. Queries need a class score above `score_threshold`
    and must win `overlap_threshold` of their own mask. Stuff segments of one class share an id.
    """
    num_classes = pred_logits.shape[-1] - 1
    scores, classes = pred_logits.softmax(dim=-1).max(dim=-1)
    kept = (classes != num_classes) & (scores > score_threshold)
    scores, classes, probability = scores[kept], classes[kept], pred_masks[kept].sigmoid()
    panoptic = torch.zeros(pred_masks.shape[-2:], dtype=torch.int32, device=pred_masks.device)
    segments: list[PanopticSegment] = []
    if len(scores) == 0:
        return panoptic, segments
    winner = (scores[:, None, None] * probability).argmax(dim=0)
    stuff_ids: dict[int, int] = {}
    for query, category in enumerate(classes.tolist()):
        own = probability[query] >= 0.5
        won = (winner == query) & own
        won_area = int((winner == query).sum())
        if won_area == 0 or not own.any() or not won.any() or won_area / int(own.sum()) < overlap_threshold:
            continue
        is_thing = category in thing_classes
        if not is_thing and category in stuff_ids:
            panoptic[won] = stuff_ids[category]
            continue
        segments.append(PanopticSegment(len(segments) + 1, is_thing, category))
        panoptic[won] = segments[-1].id
        if not is_thing:
            stuff_ids[category] = segments[-1].id
    return panoptic, segments


def instance_inference(
    pred_logits: Tensor, pred_masks: Tensor, top_k: int = 100, thing_classes: Collection[int] | None = None
) -> Instances:
    """Return the `top_k` best (query, class) pairs as instances; given `thing_classes`, only those classes are kept.

    pred_logits (Q, K + 1); pred_masks (Q, H, W) at output size. A score is the class probability times the mean mask
    probability inside the mask.
    """
    probability = pred_logits.softmax(dim=-1)[:, :-1]
    num_classes = probability.shape[1]
    scores, index = probability.flatten().topk(min(top_k, probability.numel()))
    queries, classes = index // num_classes, index % num_classes
    if thing_classes is not None:
        is_thing = torch.isin(classes, torch.tensor(sorted(thing_classes), device=classes.device))
        scores, queries, classes = scores[is_thing], queries[is_thing], classes[is_thing]
    masks = pred_masks[queries] > 0
    inside = (pred_masks[queries].sigmoid() * masks).flatten(1).sum(dim=1)
    scores = scores * inside / (masks.flatten(1).sum(dim=1).to(scores.dtype) + 1e-6)
    order = scores.argsort(descending=True)
    return Instances(scores[order], classes[order], masks[order])
