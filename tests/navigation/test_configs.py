"""Every configuration of navigation: what it builds and its recipe."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from tasks.__main__ import CONFIGS, PACKAGE, find_configs
from tasks.core.optim import OptimConfig, build_optimizer
from tasks.navigation import data as datamodules
from tasks.navigation.module import ORIST
from tasks.navigation.orist.optim import parameter_groups

LISTED = {config.name: config for config in find_configs(CONFIGS, PACKAGE) if config.task == "navigation"}
RECIPES = {  # words, objects per view, dropout of features, headline
    "orist_r2r": (29_153, 10, 0.5, "val_unseen/SR"),
    "orist_reverie": (29_198, 25, 0.3, "val_unseen/SR"),
    "orist_ndh": (29_056, 25, 0.5, "val_unseen/GP"),
}


def options_of(name):
    return yaml.safe_load(Path(CONFIGS, f"{name}.yaml").read_text())


def datamodule_of(options):
    return getattr(datamodules, options["data"]["class_path"])(**options["data"].get("init_args", {}))


def module_of(options, vocab_size, feature_dim, dataset):
    """The module of a configuration, its tensors without memory."""
    with torch.device("meta"):
        return ORIST(vocab_size, feature_dim, 31, dataset, **options["model"]["init_args"])


def test_all_promised_configurations_exist():
    assert set(LISTED) == {*RECIPES, "sample/orist"}


@pytest.mark.parametrize("name", LISTED)
def test_comments_say_what_it_is_and_what_was_published(name):
    assert LISTED[name].description
    assert re.match(r"none\b|\d+(\.\d+)? (SR|m GP)", LISTED[name].published)


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_is_the_official_one(name):
    options = options_of(name)
    vocab_size, max_objects, feature_dropout, headline = RECIPES[name]
    data = datamodule_of(options)
    assert (data.batch_size, data.max_objects, data.max_text, data.min_path_nodes) == (4, max_objects, 80, 3)
    model = module_of(options, vocab_size, 2048, data.dataset)
    assert model.monitor == headline
    assert model.network.feature_dropout == feature_dropout
    assert (model.agent.max_actions, model.reinforced, model.beam_width) == (10, 0.5, 1)
    assert not model.agent.a2c.broadcast
    assert model.bert_optimizer
    optim = model.optim
    assert (optim.lr, optim.weight_decay, tuple(optim.betas)) == (1e-6, 0.01, (0.9, 0.98))
    assert (optim.clip_grad, optim.min_lr) == (2.0, 1e-8)
    assert optim.warmup_epochs == 0.01 * options["trainer"]["max_epochs"] == 8
    assert set(optim.lr_multipliers) == set(model.network.head_names)
    assert set(optim.lr_multipliers.values()) == {10.0}
    groups = parameter_groups(model.network, optim.lr, optim.weight_decay, optim.lr_multipliers)
    trained = [p for p in model.network.parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in groups) == len(trained)
    assert build_optimizer(model.network, optim)  # what the command line tries before a run


def test_the_sample_is_small():
    options = options_of("sample/orist")
    model = module_of(options, 45, 32, "r2r")
    assert sum(p.numel() for p in model.network.parameters()) < 500_000
    assert isinstance(model.optim, OptimConfig)
    assert options["trainer"]["accelerator"] == "cpu"


def test_the_sample_is_written_when_the_model_asks_for_its_sizes(tmp_path):
    """As the command line does, before it prepares the data."""
    fresh = [datamodules.SampleHouses(str(tmp_path / name), num_train=1, num_unseen=1) for name in ("a", "b")]
    assert (fresh[0].vocab_size, fresh[1].feature_dim) == (45, 32)
