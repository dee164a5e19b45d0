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
from kernels.attention import attention
from kernels.hash_attention import hash_attention
from kernels.hilo import hilo
from kernels.ms_deform_attn import ms_deform_attn
from kernels.window_attention import window_attention


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


@pytest.fixture(params=["reference", "triton"])
def either_path(request, monkeypatch):
    """PyTorch, or the Triton kernels: on the GPU, or in their interpreter (see tests/conftest.py)."""
    if request.param == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("FRUGAL_KERNELS", request.param)
    return "cuda" if torch.cuda.is_available() else "cpu"


def padded_windows(x):
    """2 x 2 windows of 2 x 3 tokens on a map of 3 x 4, keys of 1 x 2 tokens per window on a map of 2 x 4."""
    maps = [x[..., : shape[-1]].expand(1, *shape) for shape in ((3, 4, 2, 8), (2, 4, 2, 8), (2, 4, 2, 6))]
    return window_attention(*maps, window=(2, 3), kv_window=(1, 2))


def windows_of_a_clip(x):
    """One frame, 1 x 2 windows of 3 x 2 tokens, with a bias."""
    clip = x.expand(1, 2, 3, 4, 2, 8)
    return window_attention(clip, clip, clip, (1, 3, 2), bias=torch.zeros(2, 6, 6, device=x.device))


def sampled(x):
    locations = x[..., :2].expand(1, 5, 2, 1, 3, 2)
    return ms_deform_attn(x.expand(1, 6, 2, 8), [(2, 3)], locations, locations[..., 0])


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: attention(*(x[..., :d].expand(1, 2, n, d) for n, d in ((6, 8), (4, 8), (4, 7)))), 2 * 6 * 4 * 15),
        (
            lambda x: attention(*[x.expand(1, 2, 6, 8)] * 3, bias=torch.zeros(1, 2, 6, 6, device=x.device)),
            2 * 6 * 6 * 16,
        ),
        (padded_windows, 4 * 2 * 6 * 2 * 14),
        (windows_of_a_clip, 2 * 2 * 2 * 6 * 6 * 16),
        (
            lambda x: hilo(x.expand(1, 4, 6, 3, 2, 8), x.expand(1, 4, 6, 5, 8), x.expand(1, 2, 3, 2, 5, 8), 2)[0],
            24 * 2 * 4 * 16 + 24 * 5 * 6 * 16,
        ),
        (lambda x: hash_attention(x[..., :3].expand(2, 2, 9, 3), x.expand(2, 2, 9, 8)), 4 * 2 * 9 * 3 * 8),
        (sampled, 0),
    ],
    ids=["attention", "bias", "padded windows", "clip", "hilo", "hash attention", "deformable"],
)
def test_operations_count_the_same_on_either_path(function, expected, either_path):
    assert count_macs(Call(function), torch.ones(1, 8, device=either_path)) == expected


@pytest.mark.parametrize("name", ["lit_s", "litv2_s"])
def test_networks_count_the_same_on_either_path(name, either_path, monkeypatch):
    model = timm.create_model(name, depths=(1, 1, 1, 1)).to(either_path)
    macs = count_macs(model, torch.zeros(1, 3, 64, 64, device=either_path))
    monkeypatch.setenv("FRUGAL_KERNELS", "reference")
    assert macs == count_macs(model.to("meta"), torch.zeros(1, 3, 64, 64, device="meta"))


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
