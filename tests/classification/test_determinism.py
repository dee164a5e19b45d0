"""One seed, one training: repeated, with another number of loader workers, or interrupted and resumed."""

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from tasks.classification.data import DigitImages
from tasks.classification.module import Classification

MODEL = {
    "drop_path_rate": 0.3, "drop_rate": 0.2, "mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1, "ema_decay": 0.9,
    "backbone_options": {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]},
    "optim": {"lr": 1e-3, "warmup_epochs": 0.5},
}  # fmt: skip
STEPS = 4  # in each of two epochs


def train(root, folder, workers=0, seed=0, ckpt_path=None, **options):
    """Weights, averaged ones included, after a training with everything random switched on."""
    seed_everything(seed)
    model = Classification(10, "litv2_s", **{**MODEL, **options})
    torch.rand(3 * workers + 1)  # what is drawn before the first step must not matter
    data = DigitImages(str(root), batch_size=3, eval_batch_size=5, num_workers=workers, seed=seed, augmentation="timm")
    in_mid_epoch = ModelCheckpoint(folder, "{step}", every_n_train_steps=STEPS - 1, save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[in_mid_epoch], use_distributed_sampler=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    assert trainer.global_step == 2 * STEPS
    trainer.save_checkpoint(folder / "end.ckpt")
    end = torch.load(folder / "end.ckpt", weights_only=True)
    return end["state_dict"] | {f"current.{name}": value for name, value in end["current_model_state"].items()}


def equal(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.fixture(scope="module")
def trained(tiny_digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return folder, train(tiny_digits, folder)


def test_two_trainings_with_one_seed_are_equal(trained, tiny_digits, tmp_path):
    assert equal(trained[1], train(tiny_digits, tmp_path))
    assert not equal(trained[1], train(tiny_digits, tmp_path, seed=1))


def test_loader_workers_change_nothing(trained, tiny_digits, tmp_path):
    assert equal(trained[1], train(tiny_digits, tmp_path, workers=2))


def test_a_resumed_training_ends_with_the_weights_of_an_uninterrupted_one(trained, tiny_digits, tmp_path):
    folder, expected = trained
    for step in (3, 6):  # in mid-epoch, the first and the second
        assert equal(expected, train(tiny_digits, tmp_path, ckpt_path=folder / f"step={step}.ckpt"))


@pytest.mark.parametrize(
    "option", [{"drop_path_rate": 0.0}, {"drop_rate": 0.0}, {"mixup_switch_prob": 0.0}, {"mixup_switch_prob": 1.0}]
)
def test_everything_random_has_an_effect(trained, tiny_digits, tmp_path, option):
    """Without it the equalities above would say little."""
    assert not equal(trained[1], train(tiny_digits, tmp_path, **option))
