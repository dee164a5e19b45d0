"""Classification metrics: by hand, against torchmetrics and scikit-learn, order, reduction and refusals."""

import math

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score, log_loss, top_k_accuracy_score
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)

from tasks.classification.metrics import ClassificationMetrics
from tasks.core.errors import UserError

SCALARS = ("top1", "top5", "macro_f1", "mean_class_accuracy", "ece", "loss")


def random_case(num_classes, count=500, seed=0, classes=None):
    torch.manual_seed(seed)
    labels = torch.randint(0, classes or num_classes, (count,))
    logits = 2 * torch.randn(count, num_classes)
    logits[torch.arange(count), labels] += 1.5
    return logits, labels


def computed(logits, labels, num_classes=None):
    metrics = ClassificationMetrics(num_classes or logits.shape[1])
    metrics.update(logits, labels)
    return metrics.compute()


@pytest.mark.parametrize("num_classes", [2, 3, 10, 40])
def test_equal_to_torchmetrics(num_classes):
    logits, labels = random_case(num_classes)
    result = computed(logits, labels)
    k = min(5, num_classes)
    probabilities = logits.softmax(1)
    expected = {
        "top1": MulticlassAccuracy(num_classes, average="micro")(logits, labels),
        "top5": MulticlassAccuracy(num_classes, top_k=k, average="micro")(logits, labels),
        "macro_f1": MulticlassF1Score(num_classes)(logits, labels),
        "mean_class_accuracy": MulticlassAccuracy(num_classes)(logits, labels),
        "ece": MulticlassCalibrationError(num_classes, n_bins=15, norm="l1")(probabilities, labels),
    }
    for name, value in expected.items():
        assert float(result[name]) == pytest.approx(float(value), rel=1e-5), name
    assert torch.equal(result["confusion"], MulticlassConfusionMatrix(num_classes)(logits, labels))
    per_class = MulticlassF1Score(num_classes, average="none")(logits, labels)
    torch.testing.assert_close(result["f1"].float(), per_class)


@pytest.mark.parametrize("num_classes", [6, 10])
def test_equal_to_scikit_learn(num_classes):
    logits, labels = random_case(num_classes)
    result = computed(logits, labels)
    predicted = logits.argmax(1)
    probabilities = logits.double().softmax(1).numpy()
    names = range(num_classes)
    assert float(result["macro_f1"]) == pytest.approx(f1_score(labels, predicted, average="macro"), rel=1e-12)
    assert float(result["mean_class_accuracy"]) == pytest.approx(balanced_accuracy_score(labels, predicted), rel=1e-12)
    assert float(result["top5"]) == top_k_accuracy_score(labels, logits.numpy(), k=5, labels=names)
    assert float(result["loss"]) == pytest.approx(log_loss(labels, probabilities, labels=names), abs=1e-6)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_classes_without_labels_count_only_where_they_are_predicted():
    logits, labels = random_case(12, classes=7)
    logits[:, 11] = -100.0  # neither in the labels nor predicted
    result = computed(logits, labels)
    predicted = logits.argmax(1)
    assert set(predicted.tolist()) > set(labels.tolist())
    assert float(result["macro_f1"]) == pytest.approx(f1_score(labels, predicted, average="macro"), rel=1e-12)
    assert float(result["mean_class_accuracy"]) == pytest.approx(balanced_accuracy_score(labels, predicted), rel=1e-12)
    assert result["accuracy"].isnan().tolist() == [False] * 7 + [True] * 5
    assert result["f1"].isnan().tolist() == [False] * 11 + [True]


def test_numbers_by_hand():
    probabilities = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.8, 0.2]])
    result = computed(probabilities.log(), torch.tensor([0, 1, 1, 0]))
    assert result["confusion"].tolist() == [[2, 0], [1, 1]]
    assert float(result["top1"]) == 3 / 4
    assert float(result["top5"]) == 1
    assert float(result["mean_class_accuracy"]) == (1 + 1 / 2) / 2
    assert float(result["macro_f1"]) == pytest.approx((4 / 5 + 2 / 3) / 2)
    # each sample is alone in its bin
    assert float(result["ece"]) == pytest.approx((0.1 + 0.6 + 0.3 + 0.2) / 4, abs=1e-7)
    assert float(result["loss"]) == pytest.approx(-math.log(0.9 * 0.4 * 0.7 * 0.8) / 4, abs=1e-6)


def test_bins_are_open_on_the_left():
    """Guo et al.: bin m holds the confidences in ((m - 1) / 15, m / 15]."""
    half = torch.tensor([[0.0, 0.0]])  # 0.5 lies inside bin 8
    certain = torch.tensor([[1000.0, 0.0]])  # exactly 1: the last bin, not one of its own
    third = torch.tensor([[math.log(1.0), math.log(0.25)]])  # 0.8 = 12 / 15, rounded to a float32 a little above
    for logits, place in ((half, 7), (certain, 14), (third, 12)):
        bins = computed(logits, torch.tensor([0]))["bins"]
        assert bins[:, 0].nonzero().flatten().tolist() == [place]
        assert bins[place, 1] == 1
    fifth = torch.zeros(1, 5)  # 0.2 = 3 / 15; the nearest float32 is above it
    assert computed(fifth, torch.tensor([0]))["bins"][3, 0] == 1
    eighth = torch.zeros(1, 16)  # 1 / 16 < 1 / 15
    assert computed(eighth, torch.tensor([0]))["bins"][0, 0] == 1


def test_bins_sum_up_to_all_samples():
    logits, labels = random_case(10)
    result = computed(logits, labels)
    assert result["bins"][:, 0].sum() == 500
    assert result["bins"][:, 1].sum() == result["top1"] * 500
    confidence = result["bins"][:, 2].nan_to_num() @ result["bins"][:, 0]
    assert float(confidence) == pytest.approx(float(logits.softmax(1).amax(1).double().sum()), rel=1e-9)


def test_of_equal_logits_the_smaller_class_comes_first():
    result = computed(torch.zeros(10, 10), torch.arange(10))
    assert float(result["top1"]) == 1 / 10
    assert float(result["top5"]) == 5 / 10


@pytest.mark.parametrize("num_classes", [1, 2, 4, 5])
def test_up_to_five_classes_are_all_in_the_top_five(num_classes):
    assert float(computed(*random_case(num_classes, count=20))["top5"]) == 1


def test_order_batches_and_processes_change_nothing():
    logits, labels = random_case(10)
    whole = ClassificationMetrics(10)
    whole.update(logits, labels)
    order = torch.randperm(500)
    parts = [ClassificationMetrics(10), ClassificationMetrics(10)]
    for i, chunk in enumerate(order.split(37)):
        parts[i % 2].update(logits[chunk], labels[chunk])
    for name, reduction in whole._reductions.items():
        state = getattr(whole, name)
        assert state.dtype == torch.int64
        assert torch.equal(reduction(torch.stack([getattr(part, name) for part in parts])), state), name
    # sums of float32 would differ
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert sum(chunk.sum() for chunk in losses[order].split(37)) != sum(chunk.sum() for chunk in losses.split(37))


def test_a_batch_of_no_samples_changes_nothing():
    metrics = ClassificationMetrics(4)
    metrics.update(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert all(math.isnan(metrics.compute()[name]) for name in SCALARS)
    logits, labels = random_case(4)
    metrics.update(logits, labels)
    expected = computed(logits, labels)
    assert all(metrics.compute()[name] == expected[name] for name in SCALARS)


def test_half_precision_logits_are_taken():
    logits, labels = random_case(4)
    result = computed(logits.bfloat16(), labels)
    assert result["loss"] == computed(logits.bfloat16().float(), labels)["loss"]


def test_a_huge_loss_does_not_overflow():
    logits = torch.tensor([[0.0, 1e30]]).repeat(1000, 1)
    assert float(computed(logits, torch.zeros(1000, dtype=torch.int64))["loss"]) == 2**15


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(2, 4), torch.tensor([0, 4]), r"label 4 is outside 0\.\.3"),
        (torch.zeros(2, 4), torch.tensor([-1, 0]), r"label -1 is outside"),
        (torch.zeros(2, 5), torch.tensor([1, 0]), r"shape \(2, 5\) against \(2, 4\)"),
        (torch.full((2, 4), math.nan), torch.tensor([1, 0]), "not finite: the training diverged"),
        (torch.full((2, 4), math.inf), torch.tensor([1, 0]), "not finite"),
    ],
)
def test_values_that_cannot_be_counted(logits, labels, message):
    with pytest.raises(UserError, match=message):
        ClassificationMetrics(4).update(logits, labels)
