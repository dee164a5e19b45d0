"""Classification metrics from integer counts over the whole set: the same for any order and number of processes."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from tasks.core.errors import UserError

NUM_BINS = 15
CONFIDENCE_BITS = 32  # confidences are kept in units of 2^-32: float32 has no finer ones near 1
LOSS_BITS = 24
LARGEST_LOSS = 2**15  # 2^39 units per sample: 2^24 samples fit into int64


class ClassificationMetrics(Metric):
    """Top-1 and top-5 accuracy, means over classes, calibration error and cross-entropy.

    Every state is a sum of int64: counts, and confidences and losses rounded to fixed point (units of 2^-32 and 2^-24).
    Such sums do not depend on the order of the samples, which sums of floats do. Ratios are float64 fractions in 0..1.

    - ``top1``, ``top5``: share of the samples whose label is the most probable class, or one of the five most probable
      (1 where K <= 5). Of equal logits the smaller class number comes first.
    - ``mean_class_accuracy``: mean of the recalls of the classes that occur in the labels ("balanced accuracy").
    - ``macro_f1``: mean F1 of the classes that occur in the labels or predictions, as in scikit-learn.
    - ``ece``: expected calibration error of the predicted class's probability with 15 bins of equal width, open on
      the left (Guo et al. 2017, arXiv 1706.04599, equation 3).
    - ``loss``: mean cross-entropy without label smoothing; a sample counts at most 2^15.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    confusion: Tensor  # (K, K), rows are labels, columns predictions
    top5_hits: Tensor
    bins: Tensor  # (15, 3): samples, hits and summed confidence of each bin
    loss: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        for name, shape in {
            "confusion": (num_classes, num_classes), "top5_hits": (), "bins": (NUM_BINS, 3), "loss": (),
        }.items():  # fmt: skip
            self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count logits (B, K) against labels (B,) int64; B may be 0.

        Raises UserError for a label outside 0..K-1, another number of logits, and logits that are not finite.
        """
        self._check(logits, labels)
        logits = logits.detach().float()
        predicted = logits.argmax(1)  # the first of equal ones
        hit = predicted == labels
        pairs = torch.bincount(labels * self.num_classes + predicted, minlength=self.num_classes**2)
        self.confusion += pairs.view_as(self.confusion)

        own = logits.gather(1, labels[:, None])
        before = torch.arange(self.num_classes, device=labels.device) < labels[:, None]
        rank = ((logits > own) | ((logits == own) & before)).sum(1)
        self.top5_hits += (rank < 5).sum()

        confidence = _fixed_point(logits.softmax(1).amax(1), CONFIDENCE_BITS)
        place = ((confidence * NUM_BINS - 1) >> CONFIDENCE_BITS).clamp(0, NUM_BINS - 1)
        self.bins.index_add_(0, place, torch.stack([torch.ones_like(place), hit.long(), confidence], dim=1))

        loss = F.cross_entropy(logits, labels, reduction="none").clamp(max=LARGEST_LOSS)
        self.loss += _fixed_point(loss, LOSS_BITS).sum()

    def compute(self) -> dict[str, Tensor]:
        """The metrics; and ``accuracy``, ``f1`` (K,) with NaN for undefined classes, ``confusion`` and ``bins``.

        ``bins`` (15, 3) float64 holds the samples, hits and mean confidence of each bin.
        """
        confusion, bins = self.confusion.cpu(), self.bins.cpu()
        hits, labelled, predicted = confusion.diagonal().double(), confusion.sum(1), confusion.sum(0)
        count = labelled.sum()
        accuracy = hits / labelled
        f1 = 2 * hits / (labelled + predicted)  # 0 / 0 is NaN: the class is skipped by nanmean
        samples, bin_hits = bins[:, 0], bins[:, 1]
        confidence = bins[:, 2].double() / 2**CONFIDENCE_BITS
        return {
            "top1": hits.sum() / count,
            "top5": self.top5_hits.cpu().double() / count,
            "macro_f1": f1.nanmean(),
            "mean_class_accuracy": accuracy.nanmean(),
            "ece": (bin_hits - confidence).abs().sum() / count,
            "loss": self.loss.cpu().double() / 2**LOSS_BITS / count,
            "accuracy": accuracy,
            "f1": f1,
            "confusion": confusion,
            "bins": torch.stack([samples.double(), bin_hits.double(), confidence / samples], dim=1),
        }

    def _check(self, logits: Tensor, labels: Tensor) -> None:
        if logits.shape != (len(labels), self.num_classes):
            expected = (len(labels), self.num_classes)
            raise UserError(f"logits of shape {tuple(logits.shape)} against {expected}, samples x classes, expected")
        outside = (labels < 0) | (labels >= self.num_classes)
        if bool(outside.any()):
            raise UserError(f"label {int(labels[outside][0])} is outside 0..{self.num_classes - 1}")
        if not bool(logits.isfinite().all()):
            raise UserError("the network's output is not finite: the training diverged (a lower optim.lr may help)")


def _fixed_point(values: Tensor, bits: int) -> Tensor:
    """Non-negative float32 values in int64 units of 2^-bits; scaling by a power of two is exact."""
    return (values * 2.0**bits).round().to(torch.int64)
