"""Semantic segmentation metrics from one confusion matrix over the whole set, equal to the official evaluators."""

from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from tasks.core.errors import UserError


class SegmentationMetrics(Metric):
    """Mean IoU, frequency-weighted IoU, mean and pixel accuracy of label maps.

    Counts are int64 and summed over processes; ratios are float64 fractions in 0..1. Pixels whose label is
    `ignore_index` count nowhere. The definitions differ in which classes enter the mean IoU: ``detectron2`` (since July
    2022, the default because it is what current Mask2Former code reports) takes the classes that occur in the ground
    truth, ``mmseg`` also those that are only predicted, as 0. They agree when every class occurs, as in ADE20K val.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    confusion: Tensor  # (K, K), rows are labels, columns predictions

    def __init__(
        self, num_classes: int, ignore_index: int = 255, definition: Literal["detectron2", "mmseg"] = "detectron2"
    ) -> None:
        super().__init__()
        if definition not in ("detectron2", "mmseg"):
            raise UserError(f"definition: {definition!r} was given, 'detectron2' or 'mmseg' was expected")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.definition = definition
        self.add_state("confusion", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Count class numbers `pred` against labels `target`, both (H, W) or (B, H, W) integers of the same shape.

        Raises UserError for a label outside 0..K-1 other than `ignore_index`, or a prediction outside 0..K-1.
        """
        self.confusion += confusion_matrix(pred, target, self.num_classes, self.ignore_index)

    def compute(self) -> dict[str, Tensor]:
        """Return mIoU, fwIoU, mAcc, pAcc, vectors IoU and Acc (K,) with NaN for undefined classes, and `confusion`."""
        confusion = self.confusion.cpu().double()
        hits, labelled, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        union = labelled + predicted - hits
        # 0 / 0 is NaN: the class is skipped by nanmean
        iou = hits / (torch.where(labelled > 0, union, 0) if self.definition == "detectron2" else union)
        accuracy = hits / labelled
        frequency = labelled / labelled.sum()
        return {
            "mIoU": iou.nanmean(),
            "fwIoU": (frequency * iou.nan_to_num()).sum(),
            "mAcc": accuracy.nanmean(),
            "pAcc": hits.sum() / labelled.sum(),
            "IoU": iou,
            "Acc": accuracy,
            "confusion": self.confusion.cpu(),
        }


def image_miou(pred: Tensor, target: Tensor, ignore_index: int = 255) -> float:
    """Mean IoU of one image over the classes of its label map (NaN if all is ignored); both (H, W) integers."""
    valid = target != ignore_index
    pred, target = pred[valid], target[valid]
    ious = [((pred == c) & (target == c)).sum() / ((pred == c) | (target == c)).sum() for c in target.unique()]
    return float(torch.stack(ious).double().mean()) if ious else float("nan")


def confusion_matrix(pred: Tensor, target: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """Count (label, prediction) pairs of two integer maps of one shape: (K, K) int64, without ignored pixels."""
    if pred.shape != target.shape:
        raise UserError(f"prediction of shape {tuple(pred.shape)} against labels of shape {tuple(target.shape)}")
    if pred.is_floating_point() or target.is_floating_point():
        raise UserError(f"class numbers were expected, got {pred.dtype} predictions and {target.dtype} labels")
    target, pred = target.flatten().long(), pred.flatten().long()
    valid = target != ignore_index
    target, pred = target[valid], pred[valid]
    for what, values in (("label", target), ("predicted class", pred)):
        outside = (values < 0) | (values >= num_classes)
        if bool(outside.any()):
            found = ", ".join(str(int(v)) for v in values[outside].unique()[:5])
            raise UserError(
                f"{what} {found} is outside 0..{num_classes - 1} (and is not the ignore value {ignore_index})"
            )
    return torch.bincount(target * num_classes + pred, minlength=num_classes**2).view(num_classes, num_classes)
