"""Every configuration of classification, through the real command line: what it builds, its recipe, its score."""

import re

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from backbones.published import PUBLISHED
from backbones.spvit_architecture import PUBLISHED_ARCHITECTURES
from efficiency import SPViT
from tasks.__main__ import CONFIGS, PACKAGE, find_configs
from tasks.classification import data as datamodules
from tasks.classification.imagenet import imagenet_classes
from tasks.classification.module import Classification
from tasks.core.optim import OptimConfig, build_optimizer

LISTED = {config.name: config for config in find_configs(CONFIGS, PACKAGE) if config.task == "classification"}
SPVIT_SAMPLES = ("sample/deit", "sample/spvit_search", "sample/spvit_finetune")
SAMPLES = ("sample/litv2", "sample/lit", "sample/hvt", "sample/ecoformer", *SPVIT_SAMPLES)
# SPViT's configurations by the network that they search for and train.
SPVIT = {
    "deit_ti": "spvit_deit_ti_l200_t10", "deit_s": "spvit_deit_sm_l30_t32", "deit_b": "spvit_deit_bs_l008_t60",
    "swin_t": "spvit_swin_t_l28_t32", "swin_s": "spvit_swin_sm_l04_t55", "swin_b": "spvit_swin_bs_l01_t100",
}  # fmt: skip
SEARCHES = [f"spvit_{size}_search" for size in SPVIT]
FINE_TUNINGS = [f"spvit_{size}_finetune" for size in SPVIT]
ECOFORMER = [name for name in PUBLISHED if re.fullmatch(r"(pvt_v2_b\d|twins_svt_small)_(msa|ecoformer)", name)]
NOT_TRAINED = {f"twins_svt_{size}_{kind}" for size in ("base", "large") for kind in ("msa", "ecoformer")}  # by anyone
DROP_PATH = {
    "lit_ti": 0.1, "lit_s": 0.2, "lit_m": 0.3, "lit_b": 0.5, "litv2_s": 0.2, "litv2_m": 0.3, "litv2_b": 0.5,
    **{f"litv2_s_alpha{alpha}": 0.2 for alpha in ("00", "02", "04", "05", "07", "10")},
    **dict.fromkeys(("hvt_ti_1", "hvt_s_0", "hvt_s_1", "hvt_s_2", "hvt_s_3", "scale_hvt_ti_4"), 0.1),
    "hvt_s_1_cifar100": 0.1,
}  # fmt: skip
FULL_TRAININGS = list(DROP_PATH)  # all but the fine-tuning at 384 pixels


def datamodule_of(config):
    options = config["data"]
    return getattr(datamodules, options["class_path"].rpartition(".")[2])(**options["init_args"])


def network_of(config, **linked):
    """The module of a configuration, its tensors without memory."""
    options = config["model"]["init_args"] | linked
    options |= {"optim": OptimConfig(**options["optim"]), "pretrained": False}
    with torch.device("meta"):
        return Classification(**options)


def apply_spvit(config, model, folder):
    """Let the callback of a configuration change the network; of the units that stay, the number is right."""
    for callback in config["trainer"]["callbacks"] or []:
        if callback["class_path"].endswith("SPViT"):
            options = dict(callback["init_args"])
            if options["indicators"]:
                options["indicators"] = str(folder / "indicators.pth")
                architecture = PUBLISHED_ARCHITECTURES[options["architecture"]]
                hidden = [4 * architecture.dims[stage] for stage in architecture.stages]
                masks = [torch.arange(n) < block.width for n, block in zip(hidden, architecture.blocks, strict=True)]
                named = {f"{i}.mlp.assigned_indicator_index": mask.float() for i, mask in enumerate(masks)}
                torch.save({"model": named}, options["indicators"])
            with torch.device("meta"):
                SPViT(**options).convert(model)


def test_every_published_network_has_its_configuration():
    by_name = {name for name in PUBLISHED if not name.startswith("spvit_")} - NOT_TRAINED
    assert set(LISTED) == {*by_name, "hvt_s_1_cifar100", *SAMPLES, *SEARCHES, *FINE_TUNINGS}
    assert {*FULL_TRAININGS, "litv2_b_384", *ECOFORMER, *SAMPLES, *SEARCHES, *FINE_TUNINGS} == set(LISTED)


@pytest.mark.parametrize("name", LISTED)
def test_comments_say_what_it_is_and_what_was_published(name):
    config = LISTED[name]
    assert config.description
    network = SPVIT[name[6:-9]] if name in FINE_TUNINGS else name
    if network in PUBLISHED and PUBLISHED[network].top1:
        accuracy = re.fullmatch(r"(\d\d\.\d\d?) top-1, ImageNet val", config.published)
        assert float(accuracy[1]) == PUBLISHED[network].top1
    else:
        assert config.published.startswith("none")


@pytest.mark.parametrize("name", LISTED)
def test_parses_and_builds(name, resolved, tmp_path):
    config = resolved(name)
    data = datamodule_of(config)
    searched = {"weights": None, "backbone_options": None} if name == "sample/spvit_finetune" else {}
    model = network_of(config, num_classes=data.num_classes, img_size=data.image_size, **searched)
    apply_spvit(config, model, tmp_path)
    optimizer = build_optimizer(model.network, model.optim)
    parameters = list(model.network.parameters())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(parameters)
    if name in PUBLISHED:
        assert sum(parameter.numel() for parameter in parameters) == PUBLISHED[name].params
        assert config["model"]["init_args"]["backbone"] == name


@pytest.mark.parametrize("name", FULL_TRAININGS)
def test_recipe_of_full_trainings(name, resolved):
    config = resolved(name)
    model, data, trainer = (config[part] for part in ("model", "data", "trainer"))
    model, data = model["init_args"], data["init_args"]
    hvt, first_lit = "hvt" in name, name == "lit_ti"
    optim = {
        "optimizer": "adamw", "betas": None, "lr": 1e-3, "reference_batch_size": 1024, "schedule": "cosine",
        "min_lr": 1e-5, "warmup_lr": 1e-6, "warmup_steps": 0, "warmup_epochs": 5 if hvt or first_lit else 20,
        "weight_decay": 0.025 if hvt else 0.05, "no_decay": "1d", "layer_decay": None,
        "clip_grad": None if hvt or first_lit else 5.0,
        "lr_multipliers": {} if hvt else {"*.conv_offset.weight": 0.01},
    }  # fmt: skip
    assert {key: model["optim"][key] for key in optim} == optim
    mixing = {"label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0, "mixup_switch_prob": 0.5}
    assert {key: model[key] for key in mixing} == mixing
    assert model["drop_path_rate"] == DROP_PATH[name]
    assert model["grad_checkpointing"] == (name == "lit_b")
    assert model["ema_decay"] is None
    assert model["distillation"] is None
    expected = {
        "image_size": 224, "batch_size": 128, "repeats": 3 if hvt or first_lit else 1, "augmentation": "timm",
        "crop_scale": [0.08, 1.0], "hflip": 0.5, "auto_augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0.4,
        "random_erasing": 0.25, "interpolation": "bicubic", "crop_pct": 0.875,
    }  # fmt: skip
    assert {key: data[key] for key in expected} == expected
    assert config["data"]["class_path"].endswith("CIFAR100" if "cifar" in name else "ImageNet")
    assert (trainer["max_epochs"], trainer["precision"]) == (300, "16-mixed")
    assert trainer["accumulate_grad_batches"] == 1


def test_recipe_of_the_fine_tuning_at_384_pixels(resolved):
    config = resolved("litv2_b_384")
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    optim = {
        "lr": 2e-5, "reference_batch_size": 512, "warmup_lr": 2e-8, "min_lr": 2e-7, "warmup_epochs": 5,
        "weight_decay": 1e-8, "clip_grad": 5.0, "schedule": "cosine",
    }  # fmt: skip
    assert {key: model["optim"][key] for key in optim} == optim
    assert model["drop_path_rate"] == 0.5
    assert (data["image_size"], data["crop_pct"], data["repeats"]) == (384, None, 1)
    assert 8 * data["batch_size"] * trainer["accumulate_grad_batches"] == 1024
    assert trainer["max_epochs"] == 30


@pytest.mark.parametrize("name", ECOFORMER)
def test_recipe_of_ecoformer(name, resolved):
    config = resolved(name)
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    twins, second = name.startswith("twins"), name.endswith("_ecoformer")
    optim = {
        "optimizer": "adamw", "lr": 1.25e-4 if twins and second else 2.5e-5, "reference_batch_size": 256,
        "schedule": "cosine", "min_lr": 1e-6, "warmup_lr": 5e-7 if twins else 1e-7, "warmup_epochs": 5,
        "weight_decay": 0.05, "no_decay": "1d", "clip_grad": 5.0 if twins else None,
    }  # fmt: skip
    assert {key: model["optim"][key] for key in optim} == optim
    assert (model["label_smoothing"], model["mixup"], model["cutmix"], model["drop_path_rate"]) == (0.1, 0.8, 1.0, 0)
    assert 8 * data["batch_size"] == 256
    assert (data["image_size"], data["crop_pct"], data["repeats"]) == (224, 0.875, 1 if twins else 3)
    assert (trainer["max_epochs"], trainer["precision"]) == (30 if second else 100, "16-mixed")
    methods = [callback["class_path"] for callback in trainer["callbacks"] or []]
    assert [method.rpartition(".")[2] for method in methods] == (["EcoFormer"] if second else [])


@pytest.mark.parametrize("name", ["lit_ti", "lit_s", "litv2_s", "hvt_s_1"])
def test_learning_rate_and_decay_of_every_parameter_are_official(name, resolved):
    config = resolved(name)
    model = network_of(config, num_classes=1000, img_size=224)
    groups = build_optimizer(model.network, model.optim).param_groups
    settings = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    decay = config["model"]["init_args"]["optim"]["weight_decay"]
    slow = set()
    for parameter_name, parameter in model.network.named_parameters():
        lr, weight_decay = settings[id(parameter)]
        position = "relative_position_bias_table" in parameter_name or ("pos_embed" in parameter_name and "hvt" in name)
        # LIT-Ti decays its position embeddings
        assert weight_decay == (0.0 if parameter.ndim == 1 or "cls_token" in parameter_name or position else decay)
        if parameter_name.endswith("conv_offset.weight"):
            slow.add(parameter_name)
        assert lr == pytest.approx(1e-5 if parameter_name in slow else 1e-3)
    assert len(slow) == (0 if "hvt" in name else 3)


@pytest.mark.parametrize("size", SPVIT)
def test_recipes_of_spvit(size, resolved, tmp_path):
    """Of the search and of the fine-tuning, for a global batch of 1024."""
    targets = {"deit_ti": (1.0, 20.0), "deit_s": (3.2, 3.0), "deit_b": (6.0, 0.08)}
    targets |= {"swin_t": (3.2, 2.8), "swin_s": (5.5, 0.4), "swin_b": (10.0, 0.1)}
    drop_path = {"swin_t": 0.2, "swin_s": 0.3, "swin_b": 0.5}.get(size, 0.1)
    swin = "swin" in size
    for kind, epochs, schedule in (("search", 20, "constant"), ("finetune", 130, "cosine")):
        config = resolved(f"spvit_{size}_{kind}")
        model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
        optim = {
            "lr": 1e-4, "reference_batch_size": 1024, "schedule": schedule, "warmup_epochs": 0, "weight_decay": 0.05,
            "clip_grad": 5.0 if swin else None,
        }  # fmt: skip
        assert {key: model["optim"][key] for key in optim} == optim
        assert (model["drop_path_rate"], model["pretrained"], data["repeats"]) == (drop_path, True, 1 if swin else 3)
        assert (trainer["max_epochs"], trainer["precision"]) == (epochs, "16-mixed")
        callback = trainer["callbacks"][0]["init_args"]
        if kind == "search":
            assert (callback["target"], callback["weight"]) == targets[size]
            assert data["batch_size"] * (4 if size == "deit_ti" else 8) == (736 if size == "swin_b" else 1024)
            network = network_of(config, num_classes=1000, img_size=224)
            apply_spvit(config, network, tmp_path)
            groups = build_optimizer(network.network, network.optim).param_groups
            settings = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
            gates = {n: settings[id(p)] for n, p in network.network.named_parameters() if "thresholds" in n}
            assert len(gates) == 2 * len(network.network.architecture.blocks)
            assert [lr for lr, _ in gates.values()] == pytest.approx([5e-4 if size == "deit_s" else 1e-3] * len(gates))
            assert {decay for _, decay in gates.values()} == {0.0}
        else:
            assert (callback["architecture"], callback["official_blocks"]) == (SPVIT[size], swin)
            assert model["optim"]["min_lr"] == 1e-5


def test_a_missing_architecture_is_said_in_one_line(fails):
    fails("fit", "-c", "configs/sample/spvit_finetune.yaml", parts=("architecture.json: no such architecture",))


# -- steps ----------------------------------------------------------------------------------------------------------


def write_cifar100(root):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3074), dtype=np.uint8)
    pixels[:, :2] = [[0, 1], [0, 99], [0, 50], [0, 3]]
    (root / "cifar-100-binary").mkdir(parents=True)
    for name in ("train.bin", "test.bin"):
        (root / "cifar-100-binary" / name).write_bytes(pixels.tobytes())


def write_imagenet(root):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    image.save(root.parent / "one.jpg")
    content = (root.parent / "one.jpg").read_bytes()
    for wnid in imagenet_classes()[0]:
        for path in (root / "train" / wnid / "1.JPEG", root / "val" / wnid / "2.JPEG"):
            path.parent.mkdir(parents=True)
            path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "write", "network"),
    [
        ("litv2_s", write_imagenet, {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]}),
        ("hvt_s_1_cifar100", write_cifar100, {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}),
        *((name, None, None) for name in SAMPLES if name != "sample/spvit_finetune"),
    ],
)
def test_a_step_of_training_and_of_validation(name, write, network, run_cli, tmp_path):
    """Every data set with the configuration made for it; only the network and the sizes are small."""
    root = tmp_path / "data"
    if write:
        write(root)
    data = {"root": str(root), "num_workers": 0, "image_size": 32, "batch_size": 2, "eval_batch_size": 3}
    trainer = {"accelerator": "cpu", "precision": "32-true", "fast_dev_run": True, "enable_progress_bar": False}
    small = {"data": {"init_args": data}, "trainer": trainer}
    if network:
        optim = {"warmup_epochs": 0}  # there is one step
        small["model"] = {"init_args": {"backbone_options": network, "optim": optim}}
    else:
        small["model"] = {"init_args": {"optim": {"warmup_epochs": 0}}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    outcome = run_cli("fit", "-c", f"configs/{name}.yaml", "-c", "small.yaml")
    assert outcome.code == 0, outcome.err
