"""Parameter groups, optimizers and schedules."""

import pytest
import torch
from torch import nn

from backbones.swin import SwinFeatures
from tasks.core.errors import UserError
from tasks.core.optim import OptimConfig, build_optimizer, build_scheduler, parameter_groups


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


def test_warm_up_and_minimum_scale_with_the_multiplier():
    model = nn.ModuleDict({"backbone": nn.Linear(2, 2, bias=False), "head": nn.Linear(2, 2, bias=False)})
    config = OptimConfig(lr=1.0, lr_multipliers={"backbone": 0.1}, warmup_steps=4, warmup_lr=0.2, min_lr=0.5)
    optimizer = build_optimizer(model, config)
    scheduler = build_scheduler(optimizer, config, 10)
    seen = []
    for step in (0, 2, 10):
        scheduler.step_update(step)
        seen.append([group["lr"] for group in optimizer.param_groups])
    assert seen == [pytest.approx([0.02, 0.2]), pytest.approx([0.06, 0.6]), pytest.approx([0.05, 0.5])]


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
        ({"no_decay": "none"}, "no_decay: 'none' was given, one of norm_and_embedding, 1d"),
        ({"lr": -1.0}, "lr: -1.0 was given, a positive number"),
        ({"lr": float("nan")}, "lr: nan was given"),
        ({"weight_decay": -0.1}, "weight_decay: -0.1 was given"),
        ({"milestones": [5, 3]}, r"milestones: \[5, 3\] was given, positive numbers of updates in rising order"),
        ({"schedule": "multistep"}, "milestones: empty"),
        ({"layer_decay": 1.5}, "layer_decay: 1.5 was given, 0 < value <= 1"),
        ({"clip_grad": 0.0}, "clip_grad: 0.0 was given, a positive number or null"),
        ({"lr_multipliers": {"backbone": -1.0}}, "lr_multipliers.backbone: -1.0 was given"),
    ],
)
def test_values_that_cannot_be_used(values, message):
    with pytest.raises(UserError, match=message):
        OptimConfig(**values)


def test_settings_that_would_have_no_effect_are_refused():
    with pytest.raises(UserError, match="no parameter starts with backbon; parameters start with weight, bias"):
        parameter_groups(nn.Linear(2, 2), 1.0, 0.0, lr_multipliers={"backbon": 0.1})
    with pytest.raises(UserError, match="betas: optimizer 'sgd' has no such setting"):
        build_optimizer(nn.Linear(2, 2), OptimConfig(optimizer="sgd", betas=(0.9, 0.95)))
    with pytest.raises(UserError, match="layer_decay: Linear does not number its layers"):
        parameter_groups(nn.Linear(2, 2), 1.0, 0.0, layer_decay=0.5)
    with pytest.raises(UserError, match="nothing to optimise"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), OptimConfig())
    optimizer = build_optimizer(nn.Linear(2, 2), OptimConfig(warmup_steps=5))
    with pytest.raises(UserError, match="warmup_steps: 5 is more than the 3 steps"):
        build_scheduler(optimizer, OptimConfig(warmup_steps=5), 3)
