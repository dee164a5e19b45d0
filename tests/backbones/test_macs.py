"""Multiply-adds: exact for known layers, and the published figures of every network registered here."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import deform_conv2d

from backbones.macs import count_macs
from backbones.profiling import profile, stage_names
from backbones.published import PUBLISHED


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def attend(x, mask=None):
    """6 queries and 4 keys of width 8, values of width 10, two heads."""
    query = x.expand(1, 2, 6, 8)
    return F.scaled_dot_product_attention(query, torch.ones(1, 2, 4, 8), torch.ones(1, 2, 4, 10), attn_mask=mask)


ATTENTION = 2 * 6 * 4 * (8 + 10)


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (nn.Linear(3, 5), (2, 4, 3), 2 * 4 * 3 * 5),
        (nn.Conv2d(6, 9, 3, padding=1, groups=3), (1, 6, 5, 4), 9 * 2 * 9 * 5 * 4),
        (nn.Sequential(nn.LayerNorm(3), nn.GELU(), nn.BatchNorm1d(3)), (2, 3), 0),
        (Call(attend), (1, 8), ATTENTION),
        (Call(lambda x: attend(x, torch.zeros(6, 4))), (1, 8), ATTENTION),
        (Call(lambda x: attend(x.requires_grad_())), (1, 8), ATTENTION),
        (
            Call(lambda x: deform_conv2d(x, torch.zeros(1, 8, 3, 2), torch.ones(5, 4, 2, 2), stride=2)),
            (1, 4, 6, 4),
            5 * 4 * 4 * 3 * 2,
        ),
    ],
    ids=[
        "linear",
        "grouped convolution",
        "no products",
        "attention",
        "masked attention",
        "with gradient",
        "deformable",
    ],
)
def test_known_layers(model, shape, expected):
    assert count_macs(model, torch.zeros(shape)) == expected


def test_attention_layers_are_counted_when_frozen_too():
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True).requires_grad_(False)
    with torch.no_grad():  # where torch has a single operation for the layer
        assert count_macs(layer, torch.zeros(1, 5, 8)) == 5 * 8 * (4 * 8 + 2 * 16) + 2 * 5 * 5 * 8
    assert torch.backends.mha.get_fastpath_enabled()
    assert layer.training


@pytest.mark.parametrize("facts", PUBLISHED.values(), ids=lambda facts: facts.name)
def test_published_figures(facts):
    with torch.device("meta"):
        model = timm.create_model(facts.name)
        macs = count_macs(model, torch.zeros(1, 3, facts.size, facts.size))
    assert sum(p.numel() for p in model.parameters()) == facts.params
    assert macs / 1e9 == pytest.approx(facts.gmacs, rel=0.005)
    assert model.pretrained_cfg["input_size"] == (3, facts.size, facts.size)


@pytest.mark.parametrize(
    ("name", "options", "stages"),
    [
        ("litv2_s", {"depths": (1, 1, 1, 1)}, ["layers.0", "layers.1", "layers.2", "layers.3"]),
        ("hvt_s_1", {"depth": 2, "embed_dim": 24, "num_heads": 2}, ["blocks.0", "blocks.1"]),
        ("test_resnet", {}, ["layer1", "layer2", "layer3", "layer4"]),
        ("test_efficientnet", {}, ["blocks.0", "blocks.1", "blocks.2", "blocks.3"]),
    ],
)
def test_stages_add_up(name, options, stages):
    model = timm.create_model(name, **options).eval()
    assert [stage for stage in stage_names(model) if stage in stages] == stages
    cost = profile(model, torch.randn(2, 3, 64, 64))
    found = {stage.name: stage for stage in cost.stages}
    assert sum(stage.params for stage in cost.stages) == cost.params == sum(p.numel() for p in model.parameters())
    assert sum(stage.macs for stage in cost.stages) == cost.macs == count_macs(model, torch.zeros(1, 3, 64, 64))
    assert all(found[stage].macs > 0 and found[stage].time_ms > 0 for stage in stages)
    assert {found[stage].output[0] for stage in stages} == {2}
    assert found["(elsewhere)"].macs == 0
    assert cost.images_per_second > 0
    assert not model.training
    assert not model._forward_hooks


def test_profile_of_training():
    model = timm.create_model("test_resnet")
    before = {name: p.clone() for name, p in model.named_parameters()}
    modes = []
    model.register_forward_hook(lambda module, *_: modes.append((module.training, torch.is_grad_enabled())))
    cost = profile(model, torch.randn(2, 3, 64, 64), train=True)
    assert modes.count((True, True)) == cost.passes + 2
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in model.named_parameters())
