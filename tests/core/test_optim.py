"""Parameter groups, optimizers and schedules."""

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from backbones.swin import SwinFeatures
from tasks.core.errors import UserError
from tasks.core.module import TaskModule
from tasks.core.optim import OptimConfig, build_optimizer, build_scheduler, for_training, parameter_groups


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = SwinFeatures(embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 1, 1, 1), window_size=2)
        self.embed = nn.Embedding(3, 8)
        self.level_embed = nn.Parameter(torch.zeros(3, 8))
        self.pos_embed = nn.Parameter(torch.zeros(1, 4, 8))
        self.norm = nn.GroupNorm(2, 8)
        self.head = nn.Linear(8, 4)


def settings(network, groups):
    names = {id(p): name for name, p in network.named_parameters()}
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_every_trainable_parameter_appears_once_and_frozen_ones_not():
    network = Network()
    network.head.weight.requires_grad = False
    groups = parameter_groups(network, 1e-3, 0.05, lr_multipliers={"backbone": 0.1}, layer_decay=0.5)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in network.parameters() if p.requires_grad}


def test_decay_spares_norms_embeddings_and_position_tables_but_not_biases():
    network = Network()
    found = settings(network, parameter_groups(network, 1.0, 0.05, no_decay="norm_and_embedding"))
    spared = {name for name, (_, decay) in found.items() if decay == 0}
    assert {"embed.weight", "pos_embed", "norm.weight", "norm.bias", "backbone.patch_embed.norm.bias"} <= spared
    assert "backbone.layers.0.blocks.0.attn.relative_position_bias_table" in spared
    assert not {"head.weight", "head.bias", "level_embed", "backbone.layers.0.blocks.0.attn.qkv.bias"} & spared


def test_1d_is_the_convention_of_timm():
    from timm.optim import param_groups_weight_decay

    backbone = Network().backbone
    theirs = settings(
        backbone,
        [
            g | {"lr": 1.0}
            for g in param_groups_weight_decay(backbone, 0.05, no_weight_decay_list=backbone.no_weight_decay())
        ],
    )
    assert settings(backbone, parameter_groups(backbone, 1.0, 0.05, no_decay="1d")) == theirs


def test_nothing_is_spared():
    network = Network()
    found = settings(network, parameter_groups(network, 1.0, 0.05, no_decay="nothing"))
    assert {decay for _, decay in found.values()} == {0.05}


def test_the_longest_prefix_counts_and_ends_at_a_dot():
    network = Network()
    network.head2 = nn.Linear(2, 2)
    multipliers = {"backbone": 0.1, "backbone.layers.0": 0.5, "head": 3.0}
    found = settings(network, parameter_groups(network, 2.0, 0.0, lr_multipliers=multipliers))
    assert found["backbone.layers.1.downsample.norm.weight"][0] == pytest.approx(0.2)
    assert found["backbone.layers.0.blocks.0.norm1.weight"][0] == pytest.approx(1.0)
    assert found["head.bias"][0] == pytest.approx(6.0)
    assert found["head2.bias"][0] == pytest.approx(2.0)


def test_groups_of_equal_settings_are_merged_under_distinct_readable_names():
    groups = parameter_groups(Network(), 1e-4, 0.05, lr_multipliers={"backbone": 0.1}, no_decay="norm_and_embedding")
    assert {group["name"] for group in groups} == {"base", "backbone", "backbone no decay", "base no decay"}
    assert len(groups) == 4
    many = parameter_groups(Network(), 1e-4, 0.05, lr_multipliers={"backbone": 0.1, "embed": 0.1}, layer_decay=0.9)
    names = [group["name"] for group in many]
    assert len(names) == len(set(names))
    assert "backbone layer 1 no decay" in names


def test_layer_decay_falls_from_the_head_to_the_stem():
    network = Network()
    found = settings(network, parameter_groups(network, 1.0, 0.0, layer_decay=0.5))
    # five blocks, the output norms beside the last of them, and the stem
    assert found["head.weight"][0] == 1.0
    assert found["backbone.norm3.weight"][0] == pytest.approx(0.5)
    assert found["backbone.layers.3.blocks.0.mlp.fc1.weight"][0] == pytest.approx(0.5)
    assert found["backbone.layers.2.blocks.0.mlp.fc1.weight"][0] == pytest.approx(0.5**3)
    assert found["backbone.patch_embed.proj.weight"][0] == pytest.approx(0.5**6)


def test_layer_decay_of_a_whole_timm_model_is_timms():
    import timm
    from timm.optim import param_groups_layer_decay

    model = timm.create_model("convnext_atto", num_classes=3)
    theirs = param_groups_layer_decay(model, 0.05, model.no_weight_decay() if hasattr(model, "no_weight_decay") else ())
    expected = settings(model, [g | {"lr": g["lr_scale"]} for g in theirs])
    found = settings(model, parameter_groups(model, 1.0, 0.05, layer_decay=0.75))
    assert found.keys() == expected.keys()
    assert all(found[name] == pytest.approx(expected[name]) for name in expected)


def rates(config, total, steps):
    optimizer = build_optimizer(nn.Linear(2, 2), config)
    scheduler = build_scheduler(optimizer, config, total)
    seen = []
    for step in steps:
        scheduler.step_update(step)
        seen.append(optimizer.param_groups[0]["lr"])
    return seen


def test_poly_is_the_published_schedule():
    config = OptimConfig(schedule="poly", lr=1e-4, power=0.9)
    steps = [0, 40_000, 80_000, 120_000, 160_000]
    expected = [1e-4 * (1 - step / 160_000) ** 0.9 for step in steps]
    assert rates(config, 160_000, steps) == pytest.approx(expected, rel=1e-12)
    assert expected[1:4] == pytest.approx([7.72e-5, 5.36e-5, 2.87e-5], rel=1e-3)


def test_cosine_multistep_and_constant():
    cosine = rates(OptimConfig(schedule="cosine", lr=1.0, min_lr=0.1), 10, [0, 5, 10])
    assert cosine == pytest.approx([1.0, 0.55, 0.1])
    drops = rates(OptimConfig(schedule="multistep", lr=1.0, milestones=[3, 6]), 10, [2, 3, 5, 6])
    assert drops == pytest.approx([1.0, 0.1, 0.1, 0.01])
    assert rates(OptimConfig(schedule="constant", lr=1.0), 10, [0, 9]) == [1.0, 1.0]


def rates_by_group(config, steps, total=10):
    model = nn.ModuleDict({"backbone": nn.Linear(2, 2, bias=False), "head": nn.Linear(2, 2, bias=False)})
    optimizer = build_optimizer(model, config)
    scheduler = build_scheduler(optimizer, config, total)
    seen = []
    for step in steps:
        scheduler.step_update(step)
        seen.append([group["lr"] for group in optimizer.param_groups])
    return seen


def test_multipliers_leave_the_start_of_the_warm_up_and_the_minimum():
    config = OptimConfig(lr=1.0, lr_multipliers={"backbone": 0.1}, warmup_steps=4, warmup_lr=0.02, min_lr=0.05)
    seen = rates_by_group(config, (0, 2, 10))
    assert seen == [pytest.approx([0.02, 0.02]), pytest.approx([0.06, 0.51]), pytest.approx([0.05, 0.05])]


def test_offsets_of_lit_keep_their_learning_rate_after_the_warm_up():
    config = OptimConfig(lr=1e-3, lr_multipliers={"back*.weight": 0.01}, warmup_steps=4, warmup_lr=1e-6, min_lr=1e-5)
    seen = [backbone for backbone, _ in rates_by_group(config, (0, 2, 4, 7, 10))]
    assert seen == pytest.approx([1e-6, 5.5e-6, 1e-5, 1e-5, 1e-5])


def test_a_multiplier_of_zero_holds_still_in_spite_of_the_minimum():
    config = OptimConfig(lr=1.0, lr_multipliers={"backbone": 0.0}, warmup_steps=4, warmup_lr=0.02, min_lr=0.05)
    assert [backbone for backbone, _ in rates_by_group(config, (0, 2, 7, 10))] == [0, 0, 0, 0]


def test_layer_decay_scales_the_whole_schedule():
    network = Network()
    config = OptimConfig(lr=1.0, layer_decay=0.5, warmup_steps=4, warmup_lr=0.2, min_lr=0.1)
    optimizer = build_optimizer(network, config)
    scheduler = build_scheduler(optimizer, config, 10)
    for step, expected in ((0, 0.2), (10, 0.1)):
        scheduler.step_update(step)
        found = {name: rate for name, (rate, _) in settings(network, optimizer.param_groups).items()}
        assert found["head.weight"] == pytest.approx(expected)
        assert found["backbone.layers.2.blocks.0.mlp.fc1.weight"] == pytest.approx(expected * 0.5**3)


def test_patterns_are_for_whole_names_and_the_longest_key_counts():
    network = Network()
    multipliers = {"*.weight": 0.1, "backbone.layers.0": 0.5, "*.qkv.weight": 0.2, "*.blocks.[12].*.qkv.weight": 0.3}
    found = settings(network, parameter_groups(network, 1.0, 0.05, lr_multipliers=multipliers))
    assert found["head.weight"][0] == pytest.approx(0.1)
    assert found["head.bias"][0] == 1.0
    assert found["backbone.layers.0.blocks.0.norm1.weight"][0] == pytest.approx(0.5)
    assert found["backbone.layers.1.blocks.0.attn.qkv.weight"][0] == pytest.approx(0.2)
    assert found["backbone.layers.2.blocks.1.attn.qkv.weight"][0] == pytest.approx(0.3)
    assert found["backbone.layers.2.blocks.1.attn.qkv.weight"][1] == 0.05  # still decays
    assert found["backbone.layers.2.blocks.1.attn.qkv.bias"] == (1.0, 0.0)


def test_learning_rates_follow_the_global_batch_and_the_warm_up_the_epochs():
    config = OptimConfig(lr=5e-4, warmup_lr=5e-7, min_lr=5e-6, reference_batch_size=512, warmup_epochs=2.5)
    ready = for_training(config, global_batch=1024, updates_per_epoch=10)
    assert (ready.lr, ready.warmup_lr, ready.min_lr) == pytest.approx((1e-3, 1e-6, 1e-5))
    assert (ready.warmup_steps, ready.warmup_epochs, ready.reference_batch_size) == (25, 0, None)
    assert for_training(ready, global_batch=7, updates_per_epoch=3) == ready


class Bare(TaskModule):
    task, monitor = "bare", "val/x"

    def __init__(self, optim):
        super().__init__(optim)
        self.network = nn.Linear(1, 1)
        self.draws = []

    def training_step(self, batch, batch_idx):
        self.draws.append((float(torch.rand(1)), float(np.random.rand())))  # noqa: NPY002
        return self.network(batch).sum()


class Loaders(LightningDataModule):
    batch_size = 3

    def train_dataloader(self):
        return DataLoader(torch.zeros(21, 1), batch_size=self.batch_size)


def fit(module, data=None, **options):
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, **options,
    )  # fmt: skip
    trainer.fit(module, data or Loaders())
    return trainer


@pytest.mark.parametrize("length", [{"max_epochs": 3}, {"max_steps": 12}])
def test_a_training_scales_its_learning_rate_and_says_so(length, caplog):
    optim = OptimConfig(lr=0.1, reference_batch_size=12, warmup_epochs=0.5, warmup_lr=0.02)
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        trainer = fit(Bare(optim), accumulate_grad_batches=2, **length)
    scheduler = trainer.lr_scheduler_configs[0].scheduler
    assert scheduler.base_values == pytest.approx([0.05, 0.05])  # weight and bias; 3 samples, accumulated twice, of 12
    assert scheduler.warmup_lr_init == pytest.approx(0.01)
    assert scheduler.warmup_t == 2  # half of 7 batches in 4 updates
    assert [line for line in caplog.messages if "learning rate" in line] == [
        "learning rate 5.0e-02 for a global batch of 6"
    ]


def test_the_global_batch_needs_a_datamodule():
    with pytest.raises(UserError, match="reference_batch_size: needs a datamodule with batch_size"):
        fit(Bare(OptimConfig(reference_batch_size=12)), DataLoader(torch.zeros(2, 1)), max_steps=1)


def test_steps_draw_numbers_of_torch_and_numpy_from_the_seed_alone():
    seen = []
    for earlier in (1, 2):
        np.random.seed(earlier)  # noqa: NPY002
        torch.manual_seed(5)
        module = Bare(OptimConfig())
        fit(module, max_steps=3)
        seen.append(module.draws)
    assert seen[0] == seen[1]
    assert len({draw for step in seen[0] for draw in step}) == 6


def test_a_schedule_resumes_from_its_state():
    config = OptimConfig(schedule="poly", warmup_steps=2, lr_multipliers={"weight": 0.1})
    model = nn.Linear(2, 2)
    first = build_optimizer(model, config)
    scheduler = build_scheduler(first, config, 10)
    scheduler.step_update(4)
    second = build_optimizer(model, config)
    resumed = build_scheduler(second, config, 10)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    for s in (scheduler, resumed):
        s.step_update(5)
    assert [g["lr"] for g in second.param_groups] == [g["lr"] for g in first.param_groups]


def test_optimizers_come_from_timm_with_their_settings():
    adamw = build_optimizer(nn.Linear(2, 2), OptimConfig(betas=(0.9, 0.95)))
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.param_groups[0]["betas"] == (0.9, 0.95)
    sgd = build_optimizer(nn.Linear(2, 2), OptimConfig(optimizer="sgd", momentum=0.8))
    assert sgd.param_groups[0]["momentum"] == 0.8
    assert type(build_optimizer(nn.Linear(2, 2), OptimConfig(optimizer="lookahead_adamw"))).__name__ == "Lookahead"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": "adamv"}, "optimizer: 'adamv' is not an optimizer of timm; did you mean adam"),
        ({"schedule": "linear"}, "schedule: 'linear' was given, one of poly, cosine, multistep, constant"),
        ({"no_decay": "none"}, "no_decay: 'none' was given, one of norm_and_embedding, 1d, nothing"),
        ({"lr": -1.0}, "lr: -1.0 was given, a positive number"),
        ({"lr": float("nan")}, "lr: nan was given"),
        ({"weight_decay": -0.1}, "weight_decay: -0.1 was given"),
        ({"milestones": [5, 3]}, r"milestones: \[5, 3\] was given, positive numbers of updates in rising order"),
        ({"schedule": "multistep"}, "milestones: empty"),
        ({"layer_decay": 1.5}, "layer_decay: 1.5 was given, 0 < value <= 1"),
        ({"clip_grad": 0.0}, "clip_grad: 0.0 was given, a positive number or null"),
        ({"lr_multipliers": {"backbone": -1.0}}, "lr_multipliers.backbone: -1.0 was given"),
        (
            {"lr": 1e-3, "min_lr": 1e-4, "lr_multipliers": {"b": 0.01}},
            r"lr_multipliers.b: 0.01 was given, a product with lr of at least min_lr \(0.0001\)",
        ),
        ({"warmup_epochs": -1.0}, "warmup_epochs: -1.0 was given"),
        ({"warmup_epochs": 1.5, "warmup_steps": 7}, "warmup_epochs: 1.5 was given beside warmup_steps: 7, one of"),
        ({"reference_batch_size": 0}, "reference_batch_size: 0 was given, a positive number of samples or null"),
    ],
)
def test_values_that_cannot_be_used(values, message):
    with pytest.raises(UserError, match=message):
        OptimConfig(**values)


def test_settings_that_would_have_no_effect_are_refused():
    with pytest.raises(
        UserError, match="no parameter starts with or matches backbon; parameters start with weight, bias"
    ):
        parameter_groups(nn.Linear(2, 2), 1.0, 0.0, lr_multipliers={"backbon": 0.1})
    with pytest.raises(UserError, match=r"matches \*\.conv_offset\.weight"):
        parameter_groups(nn.Linear(2, 2), 1.0, 0.0, lr_multipliers={"*.conv_offset.weight": 0.1, "weight": 2.0})
    with pytest.raises(UserError, match="betas: optimizer 'sgd' has no such setting"):
        build_optimizer(nn.Linear(2, 2), OptimConfig(optimizer="sgd", betas=(0.9, 0.95)))
    with pytest.raises(UserError, match="layer_decay: Linear does not number its layers"):
        parameter_groups(nn.Linear(2, 2), 1.0, 0.0, layer_decay=0.5)
    with pytest.raises(UserError, match="nothing to optimise"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), OptimConfig())
    optimizer = build_optimizer(nn.Linear(2, 2), OptimConfig(warmup_steps=5))
    with pytest.raises(UserError, match="warmup_steps: 5 is more than the 3 steps"):
        build_scheduler(optimizer, OptimConfig(warmup_steps=5), 3)
