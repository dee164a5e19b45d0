"""Every configuration of video: what it says of itself, what it builds, and its recipe."""

import pytest
import torch

from tasks.__main__ import CONFIGS, PACKAGE, find_configs
from tasks.core.optim import OptimConfig, build_optimizer
from tasks.video import module as modules

LISTED = {config.name: config for config in find_configs(CONFIGS, PACKAGE) if config.task == "video"}
PAPERS = ["stpt_thumos14", "afsd_thumos14", "stpt_activitynet", "afsd_activitynet"]


CLASSIFIERS = ["stpt_kinetics400", "sample/stpt_clips"]


def network_of(config, num_classes, image_size):
    """The module of a configuration, its tensors without memory."""
    options = config["model"]
    name = options["class_path"].rpartition(".")[2]
    arguments = options["init_args"] | {"num_classes": num_classes}
    if name == "TemporalActionDetection":
        arguments["image_size"] = image_size
    with torch.device("meta"):
        return getattr(modules, name)(**arguments)


def test_all_promised_configurations_exist():
    assert {*PAPERS, *CLASSIFIERS, "sample/stpt", "sample/afsd_frames"} <= set(LISTED)


@pytest.mark.parametrize("name", LISTED)
def test_comments_say_what_it_is_and_what_was_published(name):
    assert LISTED[name].description
    assert ("mAP on average" in LISTED[name].published) == (name in PAPERS)


@pytest.mark.parametrize("name", LISTED)
def test_every_configuration_builds(name, resolved):
    config = resolved(name)
    data = config["data"]["init_args"]
    module = network_of(config, 5, data["crop_size"])
    found = module.network(torch.zeros(1, 3, data["clip_length"], *[data["crop_size"]] * 2, device="meta"))
    if name in CLASSIFIERS:
        assert found.shape == (1, 5)
        return
    output, _ = found
    assert output.levels.shape == output.points.shape == output.loc.shape[1:2]
    assert output.conf.shape[2] == (2 if module.class_agnostic else 6)
    count = {"thumos14": 126, "activitynet": 189, "sample/stpt": 30, "frames": 30}[name.rpartition("_")[2]]
    assert len(output.points) == count


@pytest.mark.parametrize("name", PAPERS)
def test_recipes(name, resolved):
    """AFSD, arXiv 2103.13137, and its code."""
    config, thumos = resolved(name), name.endswith("thumos14")
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    assert (data["clip_length"], data["crop_size"], data["batch_size"]) == (256 if thumos else 768, 96, 1)
    assert trainer["max_epochs"] == 16
    module = network_of(config, 20 if thumos else 200, 96)
    (backbone, head) = (
        {group["lr"] for group in build_optimizer(part, OptimConfig(**model["optim"])).param_groups}
        for part in (torch.nn.ModuleDict({"backbone": module.network.backbone}), module.network)
    )
    assert backbone == {1e-5}
    assert head == ({1e-5} if thumos else {1e-5, 1e-4})
    optimizer = build_optimizer(module.network, OptimConfig(**model["optim"]))
    assert type(optimizer) is torch.optim.Adam
    assert {group["weight_decay"] for group in optimizer.param_groups} == {1e-3 if thumos else 1e-4}
    loss = module.loss
    assert (loss.loc_weight, loss.cls_weight, loss.triplet_weight) == (10 if thumos else 1, 1, 0.1)
    assert loss.refine_iou == (0.5 if thumos else 0.6)
    assert (loss.smooth_l1, loss.per_clip, loss.keep_best) == ((False,) * 3 if thumos else (True,) * 3)
    after = module.post_processing
    limits = (after.score_threshold, after.sigma, after.floor, after.max_per_class)
    assert limits == ((0.01, 0.5, 0.001, 5000) if thumos else (1e-9, 0.85, 1e-9, 5000))
    assert module.padding == ((0, 0) if thumos else (127.5, 127.5))
    tious = module.metrics["val_metrics"].tious
    assert tious == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7] if thumos else [0.5 + 0.05 * i for i in range(10)])
