"""Every configuration of detection, through the real command line: what it builds, its recipe and its score."""

import importlib.util
import re

import pytest
import torch

from tasks.__main__ import CONFIGS, PACKAGE, find_configs
from tasks.core.optim import build_optimizer
from tasks.detection import data as datamodules
from tasks.detection import module as modules

LISTED = {config.name: config for config in find_configs(CONFIGS, PACKAGE) if config.task == "detection"}
LIT = [
    f"{detector}_{backbone}"
    for detector in ("retinanet", "mask_rcnn")
    for backbone in ("lit_ti", "lit_s", *(f"litv2_{size}{window}" for size in "smb" for window in ("", "_w4")))
]
DROP_PATH = {"lit_ti": 0.1, "lit_s": 0.2, "litv2_s": 0.2, "litv2_m": 0.2, "litv2_b": 0.3}
OTHERS = [
    "dino_litv2_s", "deformable_detr_litv2_s", "mask2former_instance_litv2_s", "mmdet", "retinanet_torchvision",
    "mask_rcnn_torchvision", "sample/retinanet_litv2", "sample/mask_rcnn_litv2",
]  # fmt: skip
HAS_MMDET = importlib.util.find_spec("mmdet") is not None


def module_of(config, num_classes, monkeypatch):
    """The module of a configuration, its tensors without memory or values."""
    options = config["model"]
    class_name = options["class_path"].rpartition(".")[2]
    if class_name.startswith("MM"):
        if not HAS_MMDET:
            pytest.skip("without the extra openmmlab")
        from tasks.detection.mmdet_network import import_mmdet

        import_mmdet()
        for base in ("mmengine.model.BaseModule", "mmdet.models.detectors.BaseDetector"):
            monkeypatch.setattr(f"{base}.init_weights", lambda self: None)
    arguments = options["init_args"] | {"num_classes": num_classes}
    if "pretrained" in arguments:
        arguments["pretrained"] = False
    with torch.device("meta"):
        return getattr(modules, class_name)(**arguments)


def test_all_promised_configurations_exist():
    assert {*LIT, *OTHERS} == set(LISTED)


@pytest.mark.parametrize("name", LISTED)
def test_comments_say_what_it_is_and_what_was_published(name):
    config = LISTED[name]
    assert config.description
    masks = r", \d\d\.\d mask AP" if name.startswith("mask_rcnn") else ""
    assert re.match(rf"none\b|\d\d\.\d box AP{masks}, COCO val2017$", config.published)
    assert config.published.startswith("none") == (name not in LIT)


@pytest.mark.parametrize("name", LISTED)
def test_parses_and_builds(name, resolved, monkeypatch):
    config = resolved(name)
    options = config["data"]
    data = getattr(datamodules, options["class_path"].rpartition(".")[2])(**options["init_args"])
    module = module_of(config, data.num_classes, monkeypatch)
    optimizer = build_optimizer(module.network, module.optim)
    trained = [p for p in module.network.parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trained)
    assert data.with_masks == module.network.with_masks


@pytest.mark.skipif(not HAS_MMDET, reason="without the extra openmmlab")
@pytest.mark.parametrize(
    ("name", "millions"),
    [  # the tables of LIT's and LITv2's repositories, and LITv2's exact number
        ("retinanet_lit_ti", 30), ("retinanet_lit_s", 39), ("mask_rcnn_lit_ti", 40), ("mask_rcnn_lit_s", 48),
        ("retinanet_litv2_s", 38.014252), ("retinanet_litv2_m", 59), ("retinanet_litv2_b", 97),
        ("mask_rcnn_litv2_s", 47), ("mask_rcnn_litv2_m", 68), ("mask_rcnn_litv2_b", 106),
        ("retinanet_litv2_s_w4", 38.014252), ("mask_rcnn_litv2_b_w4", 106),
    ],
)  # fmt: skip
def test_parameters_are_those_of_the_papers(name, millions, resolved, monkeypatch):
    module = module_of(resolved(name), 80, monkeypatch)
    count = sum(p.numel() for p in module.network.parameters()) / 1e6
    assert count == pytest.approx(millions, abs=0.6 if isinstance(millions, int) else 1e-9)


@pytest.mark.parametrize("name", LIT)
def test_recipe_of_lit(name, resolved):
    config = resolved(name)
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    detector = "retinanet" if name.startswith("retinanet") else "mask_rcnn"
    backbone = name.removeprefix(f"{detector}_").removesuffix("_w4")
    assert (model["detector"], model["backbone"], model["backbone_norm"]) == (detector, backbone, "batch")
    assert model["drop_path_rate"] == DROP_PATH[backbone]
    assert model["backbone_options"] == ({"local_ws": [0, 0, 4, 1]} if name.endswith("_w4") else None)
    assert not model["pretrained"]  # nothing can be downloaded
    lr, warmup_lr = (1e-4, 1e-7) if detector == "retinanet" else (2e-4, 2e-7)
    everything = backbone == "lit_ti" or (detector == "retinanet" and "litv2" in backbone)
    expected = {
        "optimizer": "adamw", "lr": lr, "weight_decay": 1e-4, "schedule": "multistep", "gamma": 0.1,
        "milestones": [8 * 7330, 11 * 7330], "warmup_steps": 500, "warmup_lr": warmup_lr, "clip_grad": None,
        "lr_multipliers": {}, "no_decay": "none" if everything else "norm_and_embedding",
    }  # fmt: skip
    assert {key: model["optim"][key] for key in expected} == expected
    recipe = {
        "with_masks": detector == "mask_rcnn", "batch_size": 2, "train_short_sides": [800], "max_long_side": 1333,
        "test_short_side": 800, "test_max_long_side": 1333, "flip": True, "crop": False, "filter_empty": True,
    }  # fmt: skip
    assert {key: data[key] for key in recipe} == recipe
    assert trainer["max_epochs"] == 12
    assert trainer["precision"] == (None if backbone == "lit_ti" else "16-mixed")


@pytest.mark.parametrize(
    ("name", "optim", "recipe", "trainer"),
    [
        (
            "dino_litv2_s",
            {"lr": 1e-4, "weight_decay": 1e-4, "clip_grad": 0.1, "lr_multipliers": {"detector.backbone": 0.1},
             "milestones": [11 * 7392]},
            {"train_short_sides": list(range(480, 801, 32)), "crop": True, "filter_empty": False},
            {"max_epochs": 12},
        ),
        (
            "deformable_detr_litv2_s",
            {"lr": 2e-4, "weight_decay": 1e-4, "clip_grad": 0.1, "milestones": [40 * 3696]},
            {"train_short_sides": list(range(480, 801, 32)), "crop": True, "filter_empty": False},
            {"max_epochs": 50},
        ),
        (
            "mask2former_instance_litv2_s",
            {"lr": 1e-4, "weight_decay": 0.05, "clip_grad": 0.01, "no_decay": "norm_and_embedding",
             "lr_multipliers": {"detector.backbone": 0.1}, "milestones": [327_778, 355_092]},
            {"jitter": [0.1, 2.0], "max_long_side": 1024, "with_masks": True},
            {"max_steps": 368_750},
        ),
        (
            "mmdet",
            {"optimizer": "sgd", "lr": 0.02, "weight_decay": 1e-4, "warmup_lr": 2e-5},
            {"train_short_sides": [800]},
            {"max_epochs": 12},
        ),
    ],
)  # fmt: skip
def test_recipes_of_other_papers(name, optim, recipe, trainer, resolved):
    config = resolved(name)
    assert {key: config["model"]["init_args"]["optim"][key] for key in optim} == optim
    assert {key: config["data"]["init_args"][key] for key in recipe} == recipe
    assert {key: config["trainer"][key] for key in trainer} == trainer
