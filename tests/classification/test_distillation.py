"""Distillation: the losses, the frozen teacher that nothing else sees, students with two heads, refusals."""

import copy

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer

from tasks.classification.data import DigitImages
from tasks.classification.distillation import DistillationConfig, Teacher, distillation_loss
from tasks.classification.module import Classification
from tasks.core.errors import UserError


@pytest.fixture
def weights(tmp_path):
    """Weights of a teacher for 10 classes, which prefers class 7."""
    torch.manual_seed(1)
    teacher = timm.create_model("test_resnet", num_classes=10)
    teacher.fc.bias.data[7] = 3.0
    torch.save(teacher.state_dict(), tmp_path / "teacher.pth")
    return str(tmp_path / "teacher.pth")


def config(weights, **options):
    return DistillationConfig("test_resnet", weights, **options)


def student(weights, backbone="test_vit2", **options):
    distillation = {name: options.pop(name) for name in ("kind", "alpha", "temperature") if name in options}
    return Classification(10, backbone, img_size=32, distillation=config(weights, **distillation), **options)


def logits(count=4, classes=10):
    torch.manual_seed(2)
    return torch.randn(count, classes), 3 * torch.randn(count, classes)


def test_hard_loss_is_cross_entropy_against_the_decision():
    own, teacher = logits()
    expected = -own.log_softmax(1)[range(4), teacher.argmax(1)].mean()
    torch.testing.assert_close(distillation_loss(own, teacher, DistillationConfig("t")), expected)


def test_soft_loss_is_the_divergence_from_the_teacher_times_the_squared_temperature():
    own, teacher = logits()
    p, q = ((x.double() / 2.5).softmax(1).numpy() for x in (teacher, own))
    expected = 2.5**2 * (p * np.log(p / q)).sum(1).mean()
    found = distillation_loss(own, teacher, DistillationConfig("t", kind="soft", temperature=2.5))
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert float(distillation_loss(own, own, DistillationConfig("t", kind="soft"))) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_the_loss_weighs_labels_and_teacher_on_the_same_images(weights, monkeypatch, kind):
    monkeypatch.setattr(Classification, "log", lambda *args, **options: None)
    model = student(weights, kind=kind, alpha=0.3, mixup=0.8, label_smoothing=0.1).eval()
    model.setup("fit")
    batch = {"image": torch.randn(4, 3, 32, 32), "label": torch.tensor([0, 1, 2, 3])}
    np.random.seed(0)  # noqa: NPY002
    images, targets = model._mixed(batch["image"].clone(), batch["label"])
    np.random.seed(0)  # noqa: NPY002
    loss = model.training_step(batch, 0)
    own = model.network(images)
    labels = -(targets * own.log_softmax(1)).sum(1).mean()
    learned = distillation_loss(own, model.teacher.network(images), model.distillation)
    torch.testing.assert_close(loss, 0.7 * labels + 0.3 * learned)


def test_a_student_with_two_heads_learns_from_the_teacher_with_its_second(weights, monkeypatch):
    monkeypatch.setattr(Classification, "log", lambda *args, **options: None)
    model = student(
        weights, "deit_tiny_distilled_patch16_224", alpha=1.0, backbone_options={"depth": 1, "embed_dim": 24}
    ).train()
    model.setup("fit")
    model.training_step({"image": torch.randn(4, 3, 32, 32), "label": torch.tensor([0, 1, 2, 3])}, 0).backward()
    assert model.network.head.weight.grad.abs().max() == 0  # alpha is 1: the labels do not count
    assert model.network.head_dist.weight.grad.abs().max() > 0
    with torch.no_grad():
        images = torch.randn(2, 3, 32, 32)
        features = model.eval().network.forward_features(images)
        both = model.network.head(features[:, 0]) + model.network.head_dist(features[:, 1])
        torch.testing.assert_close(model.network(images), both / 2)


def test_two_heads_without_a_teacher_learn_as_one():
    model = Classification(
        10, "deit_tiny_distilled_patch16_224", img_size=32, backbone_options={"depth": 1, "embed_dim": 24}
    ).train()
    assert isinstance(model.network(torch.randn(2, 3, 32, 32)), torch.Tensor)


@pytest.mark.slow
def test_the_teacher_is_frozen_and_nowhere_else(weights, tiny_digits, tmp_path):
    torch.manual_seed(0)
    model = student(weights, alpha=1.0, ema_decay=0.9, optim={"lr": 3e-3})
    trainer = Trainer(
        accelerator="cpu", max_epochs=15, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=DigitImages(str(tiny_digits), batch_size=13, eval_batch_size=13, num_workers=0))
    before = torch.load(weights)
    after = model.teacher.network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())  # running statistics included
    assert not model.teacher.network.training

    trained = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.network.parameters()}
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for name in ("state_dict", "current_model_state"):
        assert {key.partition(".")[0] for key in checkpoint[name]} == {"network"}
    # It learnt: the teacher calls nearly everything a 7, whatever the label says.
    assert trainer.callback_metrics["train/loss_distillation"] < 0.5
    assert trainer.callback_metrics["train/loss_labels"] > 2 * trainer.callback_metrics["train/loss_distillation"]

    (tmp_path / "teacher.pth").unlink()
    loaded = Classification.load_from_checkpoint(tmp_path / "last.ckpt", map_location="cpu")
    loaded.setup("validate")
    assert loaded.teacher is None
    assert loaded.distillation == model.distillation


def test_a_copy_of_the_module_shares_the_teacher(weights):
    model = student(weights)
    model.setup("fit")
    teacher = model.teacher
    model.setup("fit")
    assert model.teacher is teacher
    assert copy.deepcopy(model).teacher is teacher
    assert not any(p.requires_grad for p in teacher.network.parameters())


def test_a_teacher_takes_our_checkpoints(weights, tmp_path):
    state = {f"network.{name}": value for name, value in torch.load(weights).items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "best.ckpt")
    teacher = Teacher(config(str(tmp_path / "best.ckpt")), 10, 32)
    assert torch.equal(teacher.network.fc.bias, state["network.fc.bias"])


@pytest.mark.filterwarnings("error")
def test_a_teacher_that_lacks_weights_or_classes(weights, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"teacher_weights: .*teacher.pth is no trained test_resnet: fc.weight \(10, "):
        Teacher(config(weights), 5, 32)
    state = torch.load(weights)
    del state["fc.bias"]
    torch.save(state, tmp_path / "headless.pth")
    with pytest.raises(UserError, match=r"headless.pth is no trained test_resnet: fc.bias is missing"):
        Teacher(config(str(tmp_path / "headless.pth")), 10, 32)
    # as timm's pretrained weights, which cannot be downloaded in a test
    monkeypatch.setattr(
        "tasks.classification.network.create",
        lambda name, pretrained, **options: timm.create_model(name, num_classes=1000),
    )
    with pytest.raises(UserError, match="teacher: 'test_resnet' knows 1000 classes; the data has 10"):
        Teacher(DistillationConfig("test_resnet"), 10, 32)
    assert Teacher(DistillationConfig("test_resnet"), 1000, 32).network.num_classes == 1000


def test_the_teachers_logits_have_no_gradient(weights):
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    assert not Teacher(config(weights), 10, 32).logits(images).requires_grad
    assert F.softmax(Teacher(config(weights), 10, 32).logits(images), 1).argmax(1).tolist() == [7, 7]
