"""Every configuration of segmentation, through the real command line: what it builds, its recipe and its score."""

import json
import os
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

from backbones.checkpoint import rename
from tasks.__main__ import CONFIGS, PACKAGE, find_configs, find_tasks
from tasks.core.optim import build_optimizer
from tasks.segmentation import data as datamodules
from tasks.segmentation import mmseg_module
from tasks.segmentation import module as modules
from tasks.segmentation.weights import official_key_table

TESTS = Path(__file__).parents[1]
LISTED = {config.name: config for config in find_configs(CONFIGS, PACKAGE) if config.task == "segmentation"}
ADE20K_512 = {
    "train_short_sides": [256, 307, 358, 409, 460, 512, 563, 614, 665, 716, 768, 819, 870, 921, 972, 1024],
    "max_long_side": 2048, "crop_size": [512, 512], "test_short_side": 512, "test_max_long_side": 2048,
}  # fmt: skip
ADE20K_640 = {
    "train_short_sides": list(range(320, 1281, 64)),
    "max_long_side": 2560, "crop_size": [640, 640], "test_short_side": 640, "test_max_long_side": 2560,
}  # fmt: skip
CITYSCAPES = {
    "train_short_sides": [
        512, 614, 716, 819, 921, 1024, 1126, 1228, 1331, 1433, 1536, 1638, 1740, 1843, 1945, 2048
    ],
    "max_long_side": 4096, "crop_size": [512, 1024], "test_short_side": 1024, "test_max_long_side": 2048,
}  # fmt: skip
RECIPES = {
    "faseg": ADE20K_512,
    "faseg_swin_t": ADE20K_512,
    "faseg_swin_s": ADE20K_512,
    "faseg_swin_b": ADE20K_640,
    "faseg_swin_l": ADE20K_640,
    "mask2former": ADE20K_512,
    "faseg_cityscapes": CITYSCAPES,
    "semantic_fpn": ADE20K_512,
    "semantic_fpn_swin_t": ADE20K_512,
    "semantic_fpn_lit_ti": ADE20K_512,
    "semantic_fpn_lit_s": ADE20K_512,
    "semantic_fpn_litv2_s": ADE20K_512,
    "semantic_fpn_litv2_m": ADE20K_512,
    "semantic_fpn_litv2_b": ADE20K_512,
}
SEMANTIC_FPN = [name for name in RECIPES if name.startswith("semantic_fpn")]
MASK_CLASSIFICATION = [name for name in RECIPES if name not in SEMANTIC_FPN]


def datamodule_of(config):
    options = config["data"]
    return getattr(datamodules, options["class_path"].rpartition(".")[2])(**options["init_args"])


def network_of(config, num_classes):
    """The module of a configuration, its tensors without memory unless mmsegmentation, which reads them, makes them."""
    options = config["model"]
    name, arguments = options["class_path"].rpartition(".")[2], options["init_args"] | {"num_classes": num_classes}
    arguments |= {"pretrained": False} if "pretrained" in arguments else {}
    if hasattr(modules, name):
        with torch.device("meta"):
            return getattr(modules, name)(**arguments)
    pytest.importorskip("mmseg", reason="the extra openmmlab is not installed")
    return getattr(mmseg_module, name)(**arguments)


def test_all_promised_configurations_exist():
    assert {*RECIPES, "sample/faseg"} <= set(LISTED)


def test_every_configuration_belongs_to_a_task():
    tasks = {task.name for task in find_tasks(PACKAGE)}
    assert {config.task for config in find_configs(CONFIGS, PACKAGE)} == tasks


@pytest.mark.parametrize("name", LISTED)
def test_comments_say_what_it_is_and_what_was_published(name):
    config = LISTED[name]
    assert config.description
    assert re.match(r"none\b|\d\d\.\d mIoU \(single scale\)", config.published)


@pytest.mark.parametrize("name", LISTED)
def test_parses_and_builds(name, resolved):
    config = resolved(name)
    data = datamodule_of(config)
    model = network_of(config, data.num_classes)
    optimizer = build_optimizer(model.network, model.optim)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.network.parameters()))


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [  # counted on the official code; README tables round them
        ("faseg", 50_511_639),
        ("faseg_swin_t", 53_922_065),
        ("faseg_swin_b", 113_412_815),
        ("faseg_swin_l", 221_995_787),
        ("faseg_cityscapes", 50_531_092),
        ("mask2former", 43_988_247),
        ("semantic_fpn", 28_495_574),
        ("semantic_fpn_litv2_s", 31_449_486),
    ],
)
def test_parameters_are_those_of_the_official_model(name, num_parameters, resolved):
    model = network_of(resolved(name), 19 if "cityscapes" in name else 150)
    assert sum(p.numel() for p in model.network.parameters()) == num_parameters


@pytest.mark.parametrize("name", RECIPES)
def test_data_recipe(name, resolved):
    options = resolved(name)["data"]["init_args"]
    assert {key: options[key] for key in RECIPES[name]} == RECIPES[name]
    assert options["flip"]
    assert options["color_jitter"]
    assert options["batch_size"] == 2  # on each of 8 GPUs


@pytest.mark.parametrize("name", MASK_CLASSIFICATION)
def test_training_recipe_of_mask_classification(name, resolved):
    config = resolved(name)
    model = config["model"]["init_args"]
    expected = {
        "optimizer": "adamw", "lr": 1e-4, "weight_decay": 0.05, "lr_multipliers": {"backbone": 0.1},
        "no_decay": "norm_and_embedding", "layer_decay": None, "schedule": "poly", "power": 0.9, "warmup_steps": 0,
        "min_lr": 0.0, "clip_grad": 0.01,
    }  # fmt: skip
    assert {key: model["optim"][key] for key in expected} == expected
    assert config["trainer"]["max_steps"] == (90_000 if name == "faseg_cityscapes" else 160_000)
    assert config["trainer"]["val_check_interval"] == 5000
    assert config["trainer"]["precision"] == "16-mixed"
    assert model["num_points"] == 12544
    if "swin" in name:
        assert model["drop_path_rate"] == 0.3
    else:
        assert model["backbone_norm"] == ("batch" if name == "faseg_cityscapes" else "frozen")
    assert model["pretrained"]


@pytest.mark.parametrize("name", SEMANTIC_FPN)
def test_training_recipe_of_semantic_fpn(name, resolved):
    config = resolved(name)
    model = config["model"]["init_args"]
    expected = {"lr": 1e-4, "weight_decay": 1e-4, "schedule": "poly", "power": 0.9, "min_lr": 1e-6}
    assert {key: model["optim"][key] for key in expected} == expected
    assert config["trainer"]["max_steps"] == 80_000
    if "lit" in name:
        drop_path = {"lit_ti": 0.1, "lit_s": 0.2, "litv2_s": 0.2, "litv2_m": 0.2, "litv2_b": 0.3}
        assert model["drop_path_rate"] == drop_path[model["backbone"]]
        assert name == f"semantic_fpn_{model['backbone']}"
        assert not model["pretrained"]  # nothing can be downloaded


@pytest.mark.parametrize(
    ("name", "official"),
    [("faseg", "ade20k_r50"), ("faseg_swin_t", "ade20k_swin_tiny"), ("faseg_cityscapes", "cityscapes_r50")],
)
def test_learning_rate_and_decay_of_every_parameter_are_official(name, official, resolved):
    roots = [TESTS / "goldens", *map(Path, filter(None, os.environ.get("FRUGAL_GOLDENS", "").split(":")))]
    lists = [path for root in roots if (path := root / "faseg" / "keys" / f"optim_{official}.json").exists()]
    if not lists:
        pytest.skip(f"optim_{official}.json is in no folder of FRUGAL_GOLDENS")
    model = network_of(resolved(name), 19 if "cityscapes" in name else 150)
    groups = build_optimizer(model.network, model.optim).param_groups
    settings = {id(p): [group["lr"], group["weight_decay"]] for group in groups for p in group["params"]}
    named = rename(dict(model.network.named_parameters()), official_key_table(model.network))
    assert {key: settings[id(p)] for key, p in named.items()} == json.loads(lists[-1].read_text())["params"]


def write_images(root, layout, label):
    """Two images per split below `root`; `layout` gives image and label map of a split and a number."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for number in (1, 2):
            image, mask = (root / path for path in layout(split, number))
            for path in (image, mask):
                path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(image), generator.integers(0, 256, (64, 80, 3), dtype=np.uint8))
            cv2.imwrite(str(mask), np.repeat(np.array([[0], [label]], dtype=np.uint8), 32, axis=0).repeat(80, axis=1))


def ade20k_files(split, number):
    folder, name = {"train": "training", "val": "validation"}[split], f"ADE_{split}_{number:08d}"
    return f"images/{folder}/{name}.jpg", f"annotations/{folder}/{name}.png"


def cityscapes_files(split, number):
    name = f"{split}/ulm/ulm_{number:06d}_000019"
    return f"leftImg8bit/{name}_leftImg8bit.png", f"gtFine/{name}_gtFine_labelTrainIds.png"


def own_files(split, number):
    return f"images/{split}/{number}.jpg", f"masks/{split}/{number}.png"


@pytest.mark.parametrize(
    ("name", "datamodule", "layout", "label"),
    [
        ("faseg", "ADE20K", ade20k_files, 150),
        ("faseg_cityscapes", "Cityscapes", cityscapes_files, 18),
        ("semantic_fpn", "SegmentationFolder", own_files, 1),
        ("sample/faseg", "DigitScenes", None, 0),
    ],
)
def test_a_step_of_training_and_of_validation(name, datamodule, layout, label, tiny_options, run_cli, tmp_path):
    """Every data set with the configuration made for it; only the network and the sizes are small."""
    root = tmp_path / "data"
    if layout:
        write_images(root, layout, label)
        (root / "classes.txt").write_text("left\nright\n")
    options = tiny_options(root)
    network = options["model"]["init_args"]
    network["optim"]["warmup_steps"] = 0  # there is one step
    if name == "semantic_fpn":
        network = {"backbone": network["backbone"], "optim": network["optim"]}
    sizes = {"train_short_sides": [64], "crop_size": [64, 64], "test_short_side": 64, "batch_size": 2}
    data = sizes | {"root": str(root), "num_workers": 0}
    if datamodule == "DigitScenes":
        data |= {"num_train": 4, "num_val": 2}
    small = {
        "model": {"init_args": network | {"pretrained": False}},
        "data": {"class_path": datamodule, "init_args": data},
        "trainer": options["trainer"] | {"precision": "32-true", "fast_dev_run": True, "sync_batchnorm": False},
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    outcome = run_cli("fit", "-c", f"configs/{name}.yaml", "-c", "small.yaml")
    assert outcome.code == 0, outcome.err
