import pytest
import timm
import torch
from torch import nn

import backbones
from efficiency.mesa_layers import describe, groups_of, of_parameters, units
from efficiency.mesa_policy import Policy, Setting, deploy, parse_policy, read_rules

HEADS = 2


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.qkv, self.proj = HEADS, nn.Linear(64, 192), nn.Linear(64, 64)


def layer_of(module, name="layer"):
    return describe(nn.ModuleDict({"layer": module}), None)[name]


@pytest.mark.parametrize(
    ("module", "shape", "dim", "size", "groups"),
    [
        (nn.Linear(96, 8), (4, 7, 96), 2, 96, 3),  # 32 channels each
        (nn.Linear(50, 8), (4, 50), 1, 50, 1),
        (nn.Conv2d(64, 8, 1), (4, 64, 5, 5), 1, 64, 2),
        (nn.Conv1d(64, 8, 1), (4, 64, 5), 1, 64, 2),
        (nn.BatchNorm1d(64), (4, 64, 5), 1, 64, 2),
        (nn.LayerNorm(64), (4, 7, 7, 64), 3, 64, 2),
        (nn.GELU(), (4, 7, 7, 64), 3, 64, 2),
        (nn.GELU(), (4, 64, 7, 7), 1, 64, 2),
        (Attention(), (4, 2, 9, 32), 1, 2, 2),
        (Attention(), (4, 9, 2, 32), 2, 2, 2),
        (Attention(), (3, 4, 2, 9, 32), 2, 2, 2),
        (Attention(), (8, 9, 32), 0, 2, 2),  # batch and heads in one dimension
        (Attention(), (8, 9, 9), 0, 2, 2),
        (Attention(), (8, 9, 64), 2, 64, 2),  # channels of its linear layers
        (Attention(), (4, 3, 9, 32), 1, 3, 1),
    ],
)
def test_groups(module, shape, dim, size, groups):
    found = groups_of(shape, layer_of(module), None, 32)
    assert (found.dim, found.size, found.groups) == (dim, size, groups)


def test_a_number_of_groups_overrides_heads():
    assert groups_of((4, 6, 9, 32), layer_of(Attention()), 3, 32).groups == 3
    assert groups_of((4, 7, 96), layer_of(nn.Linear(96, 8)), 6, 32).groups == 6


def test_heads_are_those_of_the_nearest_attention():
    network = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=2)
    layers = describe(network, None)
    assert layers["patch_embed.proj"].num_heads == 3
    assert layers["layers.1.blocks.1.mlp.fc1"].num_heads == 6
    assert layers["layers.2.blocks.0.norm1"].num_heads == 12
    assert layers["norm"].num_heads == layers["head.fc"].num_heads == 24
    assert describe(timm.create_model("resnet10t"), None)["fc"].num_heads is None


@pytest.mark.parametrize(
    "name", ["deit_tiny_patch16_224", "litv2_s", "lit_s", "swin_tiny_patch4_window7_224", "hvt_s_1", "pvt_v2_b0"]
)
def test_attention_is_found_in_every_network(name):
    with torch.device("meta"):
        layers = describe(backbones.create(name), None)
    assert sum(layer.tag == "matmul" for layer in layers.values()) >= 2
    assert layers[""].tag == "functional"


def test_of_parameters():
    x, layer = torch.randn(3, 4, requires_grad=True), nn.Linear(4, 4, bias=False)
    table = nn.Parameter(torch.randn(9, 2))
    bias = table[torch.randint(9, (5, 5))].permute(2, 0, 1)[None] + torch.randn(3, 1, 5, 5)
    for tensor in (layer.weight, layer.weight.t(), layer.weight.bfloat16().t(), bias):
        assert of_parameters(tensor)
    for tensor in (x, x.t(), layer(x), layer(x.detach()), x + table[:3, :1], torch.randn(3)):
        assert not of_parameters(tensor)


def test_rules_by_index_and_operand():
    rules = parse_policy(
        "on fc: 3 5\nby_index: 0, 2\nenable: true # all but the middle\nlevel: 16\nend\non gelu:\nlevel: 9\n"
    )
    assert rules == {"fc": [{"trigger": [3, 5]}, {"by_index": ["0", "2"], "enable": "true", "level": "16"}]}
    tags = {"a": "fc", "b": "fc", "c": "fc", "mm": "matmul"}
    assert units(tags)["mm.quant2"] == ("matmul-2", 0)
    settings = deploy(rules, units(tags))
    assert [settings[name].enable for name in tags if name != "mm"] == [True, False, True]
    assert settings["c"] == Setting(levels=16)


def test_policy_files(tmp_path):
    path = tmp_path / "policy.txt"
    path.write_text("on fc:\nby_index: all\nenable: True\n\non matmul:\nby_tag: matmul-1\nenable: True\n")
    layers = describe(timm.create_model("test_vit2"), path)
    assert layers["blocks.0.mlp.fc1"].setting == Setting()
    assert not layers["blocks.0.attn"].setting.enable  # one operand alone saves nothing
    assert not layers["blocks.0.norm1"].setting.enable
    path.write_text(path.read_text().replace("by_tag: matmul-1", "by_index: all"))
    assert describe(timm.create_model("test_vit2"), path)["blocks.0.attn"].setting.enable


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("on lstm:", "no kind of layer 'lstm'"),
        ("enable: True", "before any"),
        ("on fc:\nlevels: 3", "no setting 'levels'"),
        ("on fc:\nlevel: many", "expected a number"),
        ("on fc:\nlevel: 500", "levels is 500, expected 2 to 256"),
    ],
)
def test_wrong_files_are_named(tmp_path, text, message):
    path = tmp_path / "policy.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"policy .*policy.txt: .*{message}"):
        describe(nn.Sequential(nn.Linear(4, 4)), path)


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match=r"policy /nowhere.txt: cannot be read"):
        read_rules("/nowhere.txt")


def test_settings_are_checked():
    assert Policy(fc=Setting(levels=2)).fc.levels == 2
    for wrong in ({"levels": 1}, {"levels": 257}, {"decay": 1.0}, {"decay": -0.1}):
        with pytest.raises(ValueError, match="expected"):
            Setting(**wrong)
