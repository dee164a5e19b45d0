"""Segmentation metrics: definitions, ignored pixels, order, reduction and refusals."""

import math

import pytest
import torch

from tasks.core.errors import UserError
from tasks.segmentation.metrics import SegmentationMetrics, confusion_matrix, image_miou

TARGET = torch.tensor([[0, 0, 1, 1], [0, 255, 1, 255]])
PRED = torch.tensor([[0, 2, 1, 1], [0, 1, 0, 2]])


def computed(**options):
    metrics = SegmentationMetrics(4, **options)
    metrics.update(PRED, TARGET)
    return metrics.compute()


def test_numbers_by_hand():
    result = computed()
    # class 0: 2 hits of 3 labelled, 3 predicted; class 1: 2 of 3, 2 predicted; class 2 is only predicted, 3 nowhere
    assert result["IoU"].tolist()[:2] == pytest.approx([2 / 4, 2 / 3])
    assert result["IoU"][2:].isnan().all()
    assert float(result["mIoU"]) == pytest.approx((2 / 4 + 2 / 3) / 2)
    assert float(result["mAcc"]) == pytest.approx(2 / 3)
    assert float(result["pAcc"]) == pytest.approx(4 / 6)
    assert float(result["fwIoU"]) == pytest.approx(0.5 * 2 / 4 + 0.5 * 2 / 3)
    assert result["confusion"].tolist() == [[2, 0, 1, 0], [1, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert all(result[name].dtype == torch.float64 for name in ("mIoU", "fwIoU", "mAcc", "pAcc", "IoU", "Acc"))


def test_mmseg_counts_classes_that_are_only_predicted_as_zero():
    result = computed(definition="mmseg")
    assert result["IoU"][2] == 0
    assert result["IoU"][3].isnan()
    assert float(result["mIoU"]) == pytest.approx((2 / 4 + 2 / 3 + 0) / 3)
    assert float(result["mAcc"]) == pytest.approx(2 / 3)


def test_images_batches_and_processes_add_up():
    torch.manual_seed(0)
    target, pred = torch.randint(0, 4, (6, 8, 9)), torch.randint(0, 4, (6, 8, 9))
    whole, parts = SegmentationMetrics(4), [SegmentationMetrics(4), SegmentationMetrics(4)]
    whole.update(pred, target)
    for i in range(6):
        parts[i % 2].update(pred[i].to(torch.uint8), target[i].to(torch.uint8))
    assert torch.equal(parts[0].confusion + parts[1].confusion, whole.confusion)
    assert whole._reductions["confusion"] is not None
    assert whole.confusion.dtype == torch.int64


def test_another_ignore_value():
    assert confusion_matrix(torch.tensor([1, 1]), torch.tensor([0, 1]), 2, ignore_index=0).tolist() == [[0, 0], [0, 1]]


def test_nothing_labelled_is_nan():
    metrics = SegmentationMetrics(3)
    metrics.update(torch.zeros(2, 2, dtype=torch.long), torch.full((2, 2), 255))
    assert math.isnan(metrics.compute()["mIoU"])


def test_image_miou_is_the_mean_over_the_classes_of_the_image():
    assert image_miou(PRED, TARGET) == pytest.approx((2 / 4 + 2 / 3) / 2)
    assert math.isnan(image_miou(PRED, torch.full_like(TARGET, 255)))


@pytest.mark.parametrize(
    ("pred", "target", "message"),
    [
        (torch.zeros(2, 2, dtype=torch.long), torch.full((2, 2), 150), "label 150 is outside 0..3"),
        (torch.full((2, 2), 4), torch.zeros(2, 2, dtype=torch.long), "predicted class 4 is outside 0..3"),
        (torch.zeros(2, 2, dtype=torch.long), torch.full((2, 2), -1), "label -1 is outside"),
        (torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 2, dtype=torch.long), r"shape \(2, 3\) against labels"),
        (torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.long), "class numbers were expected, got torch.float32"),
    ],
)
def test_values_that_are_no_classes(pred, target, message):
    with pytest.raises(UserError, match=message):
        SegmentationMetrics(4).update(pred, target)


def test_unknown_definition():
    with pytest.raises(UserError, match="definition: 'voc' was given"):
        SegmentationMetrics(4, definition="voc")
