"""Classification: networks from plain options, mixed batches, losses, what a run leaves behind, and refusals."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer

from tasks.classification.data import DigitImages
from tasks.classification.module import SCALARS, Classification
from tasks.classification.report import Case, classification_report, distinct, restored
from tasks.core.errors import UserError
from tasks.core.evaluation import Sample


def classifier(num_classes=10, **options):
    return Classification(num_classes, **{"backbone": "test_vit2", "img_size": 32, **options})


def batch(count=6, size=32, classes=10, seed=0):
    torch.manual_seed(seed)
    return {
        "image": torch.randn(count, 3, size, size), "label": torch.randint(0, classes, (count,)),
        "id": [f"{i}.png" for i in range(count)],
    }  # fmt: skip


# -- networks ---------------------------------------------------------------------------------------------------------


def test_image_size_goes_to_networks_made_for_one_size():
    assert classifier().network.patch_embed.img_size == (32, 32)
    assert classifier(backbone_options={"img_size": 64}).network.patch_embed.img_size == (64, 64)
    assert classifier(backbone="test_resnet").eval().network(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_options_reach_the_network():
    model = classifier(3, drop_path_rate=0.3, drop_rate=0.2, grad_checkpointing=True, backbone_options={"depth": 3})
    assert len(model.network.blocks) == 3
    assert model.network.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)
    assert model.network.head_drop.p == 0.2
    assert model.network.grad_checkpointing
    assert model.network.num_classes == 3


@pytest.mark.parametrize("name", ["litv2_s", "hvt_ti_1"])
def test_our_networks_with_options_of_a_small_one(name):
    options = {
        "litv2_s": {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]},
        "hvt_ti_1": {"patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2},
    }
    model = classifier(4, backbone=name, drop_path_rate=0.1, backbone_options=options[name])
    logits = model.network(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 4)
    logits.sum().backward()


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def logged(monkeypatch):
    seen = {}
    monkeypatch.setattr(Classification, "log", lambda self, name, value, **options: seen.update({name: value}))
    return seen


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_without_mixing_is_cross_entropy(logged, smoothing):
    model, data = classifier(label_smoothing=smoothing).eval(), batch()
    loss = model.training_step(data, 0)
    expected = F.cross_entropy(model.network(data["image"]), data["label"], label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected)
    assert logged["train/loss"] is loss


@pytest.mark.parametrize("count", [1, 2, 5, 6])
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_batches(count, kind):
    model, data = classifier(label_smoothing=0.1, **{kind: 1.0}), batch(count)
    before = data["image"].clone()
    np.random.seed(3)  # noqa: NPY002
    images, targets = model._mixed(data["image"], data["label"])
    assert images.shape == before.shape
    torch.testing.assert_close(targets.sum(1), torch.ones(count))
    smooth = F.one_hot(data["label"], 10) * 0.9 + 0.01
    unmixed = count % 2
    if unmixed:
        assert torch.equal(images[-1], before[-1])
        torch.testing.assert_close(targets[-1], smooth[-1])
    # each image is mixed with one from the other end of the batch, and so are the labels
    even = count - unmixed
    partner, weight = before[:even].flip(0), None
    for i in range(even):
        if kind == "mixup":
            weight = ((images[i] - partner[i]) / (before[i] - partner[i])).median()
            torch.testing.assert_close(images[i], weight * before[i] + (1 - weight) * partner[i], atol=1e-4, rtol=0)
        else:
            kept = images[i] == before[i]
            assert torch.equal(torch.where(kept, before[i], partner[i]), images[i])
            weight = kept.float().mean()
        assert 0 < weight < 1
        expected = weight * smooth[i] + (1 - weight) * smooth[:even].flip(0)[i]
        torch.testing.assert_close(targets[i], expected, atol=1e-4, rtol=0)


def test_loss_of_a_mixed_batch_is_that_of_its_targets(logged):
    model, data = classifier(mixup=0.8, cutmix=1.0).eval(), batch()
    np.random.seed(0)  # noqa: NPY002
    images, targets = model._mixed(data["image"].clone(), data["label"])
    np.random.seed(0)  # noqa: NPY002
    loss = model.training_step(data, 0)
    torch.testing.assert_close(loss, -(targets * model.network(images).log_softmax(1)).sum(1).mean())


# -- runs -------------------------------------------------------------------------------------------------------------


def last_report(result):
    line = result.out.rstrip().splitlines()[-1]
    assert line.startswith("report: "), result
    return json.loads(Path(line.removeprefix("report: ")).with_suffix(".json").read_text())


@pytest.mark.slow
def test_a_training_and_its_evaluation(run_cli, tiny_classifier_config, tiny_digits, tmp_path):
    changes = {
        "model.init_args.mixup": 0.8, "model.init_args.cutmix": 1.0, "model.init_args.label_smoothing": 0.1,
        "model.init_args.ema_decay": 0.5, "model.init_args.optim.reference_batch_size": 12,
        "data.init_args.batch_size": 5, "trainer.max_epochs": 2,
    }  # fmt: skip
    config = tiny_classifier_config(tiny_digits, changes=changes)
    fitted = run_cli("fit", "-c", config)
    assert fitted.code == 0, fitted.err
    assert "learning rate 4.2e-04 for a global batch of 5" in fitted.err
    report = last_report(fitted)
    assert {name.removeprefix("val/") for name in report["metrics"] if name.startswith("val/")} == set(SCALARS)
    assert report["cost"]["params"] > 0
    run = next((tmp_path / "runs").rglob("metrics.csv")).parent
    with (run / "metrics.csv").open() as file:
        assert {"train/loss", "val/top1"} <= set(csv.DictReader(file).fieldnames)

    best = run / "checkpoints" / "best.ckpt"
    for option in (f"--ckpt_path={best}", f"--model.weights={best}"):
        again = last_report(run_cli("validate", "-c", config, option))
        assert {name: again["metrics"][f"val/{name}"] for name in SCALARS} == {
            name: report["metrics"][f"val/{name}"] for name in SCALARS
        }
    tested = last_report(run_cli("test", "-c", config, f"--ckpt_path={best}"))
    assert tested["metrics"]["test/loss"] == report["metrics"]["val/loss"]  # there is no test split

    loaded = Classification.load_from_checkpoint(best, map_location="cpu").eval()
    saved = torch.load(best, weights_only=True)
    assert {k: v for k, v in saved["state_dict"].items() if not k.startswith("network.")} == {}
    assert saved["hyper_parameters"]["num_classes"] == 10
    assert saved["hyper_parameters"]["img_size"] == 32
    with torch.no_grad():
        assert loaded.network(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_parts_of_the_report(run_cli, tiny_classifier_config, tiny_digits):
    report = last_report(run_cli("validate", "-c", tiny_classifier_config(tiny_digits)))
    classes, pairs = report["tables"]
    assert classes["columns"] == ["class", "accuracy %", "F1 %", "images"]
    assert [row[0] for row in classes["rows"]] == [str(digit) for digit in range(10)]
    assert [row[3] for row in classes["rows"]] == [2, 2, 2, 1, 1, 1, 1, 1, 1, 1]
    wrong = round(13 * (1 - report["metrics"]["val/top1"]))
    assert pairs["columns"] == ["true", "predicted", "images", "% of the true class"]
    assert sum(row[2] for row in pairs["rows"]) == wrong
    assert [row[2] for row in pairs["rows"]] == sorted((row[2] for row in pairs["rows"]), reverse=True)
    assert all(row[0] != row[1] for row in pairs["rows"])
    titles = [picture["title"] for picture in report["pictures"]]
    assert (
        dict.fromkeys(titles).keys()
        == dict.fromkeys(
            ["Reliability", "Per-class accuracy", "Confusion matrix", "Best images", "Worst images"]
        ).keys()
    )
    assert (titles.count("Best images"), titles.count("Worst images")) == (8, 5)
    worst = [picture["caption"] for picture in report["pictures"] if picture["title"] == "Worst images"]
    chances = [float(caption.split("probability ")[1].split(";")[0]) for caption in worst]
    assert chances == sorted(chances)
    assert "; predicted " in worst[0]


def test_report_of_many_classes_and_none_confused():
    names = [f"class {i}" for i in range(40)]
    confusion = 2 * np.eye(40, dtype=np.int64)
    results = {
        "confusion": confusion, "accuracy": np.ones(40), "f1": np.ones(40), "ece": np.float64(0.1),
        "bins": np.array([[0, 0, np.nan]] * 14 + [[80, 80, 0.9]]),
        "best": [Sample("a/b.png", 0.9, Case(np.zeros((20, 30, 3), np.uint8), 3, 3, 0.9))], "worst": [],
    }  # fmt: skip
    parts = classification_report(results, names)
    assert [table.title for table in parts.tables] == ["Classes"]
    assert parts.pictures[-1].caption == "a/b.png: class 3 with probability 0.900"
    matrix = next(picture for picture in parts.pictures if picture.title == "Confusion matrix")
    assert "30 classes of the most frequent confusions" in matrix.caption


def test_pictures_are_what_was_normalised():
    pixels = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    normalised = (pixels / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert np.array_equal(restored(normalised, mean, std), pixels.permute(1, 2, 0).numpy())


def test_names_that_occur_twice_get_their_number():
    assert distinct(["crane", "dog", "crane"]) == ["crane (0)", "dog", "crane (2)"]


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fit_fails(run_cli, tiny_classifier_config, tiny_digits, tmp_path):
    """`fit` with the small configuration, changed, must fail with one line before anything is written."""

    def run(changes, parts):
        result = run_cli("fit", "-c", tiny_classifier_config(tiny_digits, changes=changes))
        assert result.code == 2, result
        error = result.err[result.err.index("error:") :].rstrip("\n")
        assert "\n" not in error
        for part in parts:
            assert part in error
        assert not list((tmp_path / "runs").rglob("*"))

    return run


TEACHER = {"teacher": "test_resnet", "teacher_weights": "missing.pth"}


@pytest.mark.parametrize(
    ("option", "value", "parts"),
    [
        ("backbone", "litv3_s", ["model.backbone: unknown backbone 'litv3_s'; nearest names: litv2_s"]),
        ("backbone_options", {"depht": 3}, ["model.backbone: 'test_vit2' has no option 'depht'"]),
        ("label_smoothing", 1.0, ["model.label_smoothing: 1.0 was given, a number of at least 0 and below 1"]),
        ("drop_path_rate", -0.1, ["model.drop_path_rate: -0.1 was given"]),
        ("drop_rate", 1.5, ["model.drop_rate: 1.5 was given"]),
        ("mixup", -0.2, ["model.mixup: -0.2 was given, at least 0 was expected"]),
        ("cutmix", -1.0, ["model.cutmix: -1.0 was given"]),
        ("mixup_switch_prob", 2.0, ["model.mixup_switch_prob: 2.0 was given, a probability"]),
        ("distillation", {**TEACHER, "alpha": 1.2}, ["model.distillation.alpha: 1.2 was given, a weight in 0..1"]),
        ("distillation", {**TEACHER, "temperature": 0.0}, ["model.distillation.temperature: 0.0 was given, a pos"]),
        ("distillation", {**TEACHER, "kind": "medium"}, ["kind: expected", "'hard', 'soft'", "medium"]),
        ("distillation", {"teacher": "resnet5o"}, ["model.distillation.teacher: unknown backbone 'resnet5o'; nearest"]),
        ("distillation", TEACHER, ["missing.pth: no such weight file"]),
        ("num_classes", 5, ["model.num_classes: 5 was given, but it follows from the data (num_classes)"]),
        ("img_size", 64, ["model.img_size: 64 was given, but it follows from the data (image_size)"]),
        ("mixpu", 0.1, ["unknown option 'mixpu'", "did you mean", "mixup"]),
        ("weights", "missing.pth", ["missing.pth: no such weight file"]),
        ("optim", {"lr_multipliers": {"*.conv_offset.weight": 0.01}}, ["no parameter starts with or matches *.conv_"]),
    ],
)
def test_options_that_cannot_be_used(fit_fails, option, value, parts):
    fit_fails({f"model.init_args.{option}": value}, parts)


def test_data_with_other_classes_than_the_model(tiny_digits):
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, use_distributed_sampler=False)
    with pytest.raises(UserError, match=r"model\.num_classes: 5 was given, the data's 10 was expected"):
        trainer.validate(classifier(5), datamodule=DigitImages(str(tiny_digits), num_workers=0))


@pytest.mark.parametrize(
    ("option", "value", "part"),
    [
        ("drop_path_rate", 0.1, "model.backbone: 'vgg11' has no option 'drop_path_rate'"),
        ("grad_checkpointing", True, "model.grad_checkpointing: 'vgg11' has no gradient checkpointing"),
    ],
)
def test_what_a_network_does_not_have(option, value, part):
    with pytest.raises(UserError, match=part):
        classifier(backbone="vgg11", **{option: value})
