"""The LightningModule of detection: what a step logs, efficiency methods, weights averages, checks before a run."""

import importlib.util

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

import efficiency
from efficiency import mesa
from tasks.core.errors import UserError
from tasks.detection.data import DigitScenes
from tasks.detection.module import MMDetection, TorchvisionDetection

needs_mmdet = pytest.mark.skipif(importlib.util.find_spec("mmdet") is None, reason="without the extra openmmlab")
BACKBONE = {
    "backbone": "litv2_s",
    "backbone_norm": "batch",
    "backbone_options": {"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]},
}
TORCHVISION = {"fpn_channels": 16, "levels": (3, 5), "head_convs": 1, "head_norm": True}


def torchvision_module(**options):
    return TorchvisionDetection(10, **BACKBONE, **TORCHVISION, **options)


def mmdet_module(**options):
    head = {"in_channels": 16, "feat_channels": 16, "stacked_convs": 1}
    small = {"neck": {"out_channels": 16}, "bbox_head": head}
    return MMDetection(10, "retinanet", **BACKBONE, options=small, **options)


MODULES = [torchvision_module, pytest.param(mmdet_module, marks=needs_mmdet)]


@pytest.fixture
def data(tiny_coco):
    def make(**options):
        sizes = {"train_short_sides": [40], "test_short_side": 40, "max_long_side": 64, "batch_size": 2}
        return DigitScenes(str(tiny_coco), num_workers=0, **{**sizes, **options})

    return make


def train(module, data, tmp_path, callbacks=(), steps=2):
    seed_everything(0)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
        use_distributed_sampler=False,
    )
    before = {name: value.clone() for name, value in module.network.named_parameters()}
    trainer.fit(module, datamodule=data)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert all(torch.tensor(value).isfinite() for value in logged.values())
    return logged, before


@pytest.mark.parametrize("make", MODULES)
def test_a_step_moves_every_parameter_and_logs_its_terms(make, data, tmp_path):
    module = make(optim={"lr": 1e-2, "weight_decay": 0.1, "no_decay": "none"})
    logged, before = train(module, data(), tmp_path)
    terms = {name for name in logged if name.startswith("train/loss_")}
    assert len(terms) == 2
    assert logged["train/loss"] == pytest.approx(sum(logged[name] for name in terms), rel=1e-5)
    moved = {name for name, value in module.network.named_parameters() if not torch.equal(value, before[name])}
    assert before.keys() - moved <= {name for name, value in before.items() if not value.any()}


@pytest.mark.parametrize("make", MODULES)
@pytest.mark.parametrize("method", [efficiency.Mesa, efficiency.GradientCheckpointing])
def test_efficiency_methods_work_on_detectors(make, method, data, tmp_path):
    module, callback = make(), method()
    logged, _ = train(module, data(), tmp_path, [callback], steps=3)
    assert logged["train/loss"] > 0
    if method is efficiency.Mesa:
        assert mesa.find(module.network) is not None
    assert callback.report_rows()  # what was kept for the backward pass, counted in a step


def test_classes_and_masks_are_those_of_the_data(data, tmp_path):
    with pytest.raises(UserError, match=r"model\.num_classes: 3 was given, the data's 10 was expected"):
        train(TorchvisionDetection(3, **BACKBONE, **TORCHVISION), data(), tmp_path)
    with pytest.raises(UserError, match=r"data\.with_masks: false was given"):
        train(TorchvisionDetection(10, "mask_rcnn", **BACKBONE), data(), tmp_path)


@pytest.mark.parametrize("make", MODULES)
def test_a_checkpoint_needs_nothing_else(make, data, tmp_path):
    module = make(optim={"lr": 1e-3})
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "module.ckpt", weights_only=True)
    again = type(module).load_from_checkpoint(tmp_path / "module.ckpt")
    assert again.hparams == module.hparams
    for name, value in module.network.state_dict().items():
        torch.testing.assert_close(again.network.state_dict()[name], value, rtol=0, atol=0)


def test_the_example_is_as_large_as_published_costs_say():
    module = torchvision_module()
    assert module.example_input().shape == (1, 3, 800, 1280)
