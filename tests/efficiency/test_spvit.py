"""SPViT's networks: what gates do, what they cost, and what is left of a network that is pruned by them."""

import argparse
import json
import os
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import backbones
from backbones import load_checkpoint
from backbones.spvit import SPViTDeiT, collapse
from backbones.spvit_architecture import (
    MIXERS,
    PUBLISHED_ARCHITECTURES,
    Architecture,
    BlockChoice,
)
from backbones.spvit_swin import SPViTSwin
from efficiency import spvit
from efficiency.spvit_gates import GatedAttention, drawn_gates, expected_gates

DEIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 5}
SWIN = {"img_size": 56, "embed_dim": 12, "depths": (4, 2), "num_heads": (3, 6), "num_classes": 5}
SOURCES = {
    "deit": lambda **options: timm.create_model("deit_tiny_patch16_224", **DEIT | options),
    "swin": lambda **options: timm.create_model("swin_tiny_patch4_window7_224", **SWIN | options),
}
families = pytest.mark.parametrize("family", SOURCES)


def source(family, **options):
    torch.manual_seed(0)
    model = SOURCES[family](**options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def images(family, batch=3):
    generator = torch.Generator().manual_seed(1)
    side = DEIT["img_size"] if family == "deit" else SWIN["img_size"]
    return torch.randn(batch, 3, side, side, generator=generator)


def searched(family, seed=0):
    """A super-network with every mixer among its choices, and with statistics of batches it has seen."""
    network = spvit.convert(source(family))
    torch.manual_seed(seed)
    with torch.no_grad():
        for i, block in enumerate(spvit.blocks_of(network)):
            block.attn.thresholds.copy_(torch.tensor([1.0, 1.0, 1.0]) - 2 * (torch.arange(3) >= (i + seed) % 4))
            block.attn.head_probs.normal_(std=block.attn.alpha)
            block.mlp.ffn_thresholds.normal_()
        network.train()
        for _ in range(3):
            network(images(family))
    return network.eval()


# -- super-networks ---------------------------------------------------------------------------------------------------


@families
def test_conversion_keeps_the_function_and_takes_every_weight(family):
    model = source(family)
    before = model(images(family))
    network = spvit.convert(model)
    torch.testing.assert_close(network(images(family)), before)
    assert not network.training
    fresh = {"head_probs", "ffn_thresholds", "kernel_thresholds", "kernel_thresholds_full"}
    kept = sum(
        p.numel() for name, p in network.named_parameters() if name.split(".")[-1] not in fresh and ".bn_" not in name
    )
    assert kept == sum(p.numel() for p in model.parameters())


@families
def test_conversion_follows_data_type_mode_and_rates(family):
    network = spvit.convert(source(family, drop_path_rate=0.3, drop_rate=0.1).double().train())
    assert {p.dtype for p in network.parameters()} == {torch.float64}
    assert all(module.training for module in network.modules())
    assert network.drop_rate == 0.1
    assert max(m.drop_prob for m in network.modules() if hasattr(m, "drop_prob")) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: timm.create_model("test_resnet"), "got a ResNet"),
        (lambda: timm.create_model("deit_tiny_distilled_patch16_224"), "got a VisionTransformerDistilled"),
        (lambda: source("deit", init_values=1e-4), "VisionTransformer: expected .* but blocks.0.ls1.gamma differs"),
        (lambda: source("deit", qkv_bias=False), "qk.bias differs"),
        (lambda: source("deit", act_layer="relu"), "ReLU"),
        (lambda: source("swin", window_size=5), "relative_position_bias_table differs"),
        (lambda: spvit.convert(source("deit")), "has gates already"),
        (lambda: spvit.prune(searched("swin")), "pruned already"),
    ],
)
def test_networks_that_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        spvit.convert(make())


def test_temperature_is_the_familys_unless_given():
    assert spvit.convert(source("deit")).blocks[0].attn.alpha == 0.01
    assert spvit.convert(source("swin")).architecture.alpha == 100
    assert spvit.prune(spvit.convert(source("swin"), alpha=2.0)).architecture.alpha == 2
    with pytest.raises(ValueError, match="alpha 0: expected a positive"):
        spvit.convert(source("deit"), alpha=0)


# -- gates ------------------------------------------------------------------------------------------------------------


def test_drawn_gates_have_their_probability_and_the_gradient_of_their_relaxation():
    torch.manual_seed(0)
    thresholds = torch.full((20_000,), 0.4, dtype=torch.float64, requires_grad=True)
    gates = drawn_gates(thresholds, training=True)
    assert set(gates.tolist()) == {0.0, 1.0}
    assert float(gates.detach().mean()) == pytest.approx(float(thresholds.detach()[0].sigmoid()), abs=0.01)
    gates.sum().backward()
    assert thresholds.grad.min() > 0
    assert thresholds.grad.max() <= 0.25  # the slope of a sigmoid


def test_expected_gates_are_those_of_evaluation():
    thresholds = torch.tensor([-0.1, 0.0, 1e-6, 2.0], dtype=torch.float64, requires_grad=True)
    gates = expected_gates(thresholds)
    assert gates.tolist() == [0, 0, 1, 1] == drawn_gates(thresholds, training=False).tolist()
    gates.sum().backward()
    p = thresholds.detach().sigmoid()
    slope = (p - 0.5).sigmoid()
    torch.testing.assert_close(thresholds.grad, slope * (1 - slope) * p * (1 - p))


def test_the_official_cut_of_gradients_changes_nothing():
    """Behind an open gate the earlier ones are detached there; `Gated.choose` does without."""
    torch.manual_seed(0)
    layer = GatedAttention(6, 3, alpha=0.01).double().train()
    results = [torch.randn(2, 5, 6, dtype=torch.float64) for _ in range(3)]
    for state in range(8):
        torch.manual_seed(state)
        weight = torch.randn(2, 5, 6, dtype=torch.float64)
        gradients = []
        for cut in (False, True):
            torch.manual_seed(state)
            if cut:
                one, two, three = drawn_gates(layer.thresholds, True).cumprod(0)
                first = one.detach() if one and two else one
                second = two.detach() if one and two and three else two
                y = (
                    three * results[2]
                    + second * (1 - three) * results[1]
                    + first * (1 - second) * (1 - three) * results[0]
                )
            else:
                y = layer.choose(*results)
            gradients.append(torch.autograd.grad((y * weight).sum(), layer.thresholds)[0])
        torch.testing.assert_close(gradients[0], gradients[1])


@families
def test_all_parameters_learn_whatever_is_drawn(family):
    """So that DDP waits for none."""
    network = searched(family).train()
    for _ in range(4):
        network.zero_grad()
        network(images(family)).square().sum().backward()
        assert [name for name, p in network.named_parameters() if p.grad is None] == []


@families
def test_recomputed_blocks_draw_the_same_gates_and_count_a_batch_once(family):
    outcomes = []
    for enable in (False, True):
        network = searched(family).train()
        network.set_grad_checkpointing(enable)
        torch.manual_seed(3)
        network(images(family)).square().sum().backward()
        gradients = {name: p.grad for name, p in network.named_parameters()}
        outcomes.append(gradients | dict(network.named_buffers()))
    assert [name for name, tensor in outcomes[0].items() if not torch.equal(tensor, outcomes[1][name])] == []


def test_state_dict_says_which_units_are_open():
    network = searched("deit")
    for block, choice in zip(network.blocks, spvit.found_architecture(network).blocks, strict=True):
        indicators = block.mlp.state_dict()["assigned_indicator_index"]
        assert indicators.nonzero().flatten().tolist() == choice.units()


# -- cost -------------------------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("seed", range(4))
def test_cost_is_that_of_the_pruned_network(family, seed):
    network = searched(family, seed)
    size = network.img_size
    cost = spvit.cost(network, size)
    pruned = spvit.prune(network)
    assert cost.total == pruned.architecture.macs(size, 5)
    assert cost.total - cost.mixers - cost.feed_forward == pruned.architecture.costs(size, 5).fixed


def test_the_loss_pulls_every_gate_towards_the_target():
    for target, sign in ((0.0, 1), (1.0, -1)):
        network = searched("deit")
        loss = spvit.target_loss(spvit.cost(network, 32), target, weight=2.0)
        assert loss.item() == pytest.approx(2 * (target - spvit.found_architecture(network).macs(32, 5) / 1e9) ** 2)
        loss.backward()
        for block in network.blocks:
            assert (block.mlp.ffn_thresholds.grad * sign > 0).all()
            gates = expected_gates(block.attn.thresholds)
            reachable = torch.cat([torch.ones(1), gates.cumprod(0)[:-1]]).bool()  # others are behind a closed one
            assert (block.attn.thresholds.grad[reachable] * sign > 0).all()


# -- pruning ----------------------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_pruned_equals_gated(family, seed, dtype, tolerance):
    network = searched(family, seed).to(dtype)
    found = spvit.found_architecture(network)
    assert {block.mixer for block in found.blocks} == set(MIXERS)
    pruned = spvit.prune(network)
    for size in (None, (70, 45)):
        x = images(family) if size is None else torch.randn(2, 3, *size)
        expected = network(x.to(dtype))
        assert expected.std() > 0.1
        torch.testing.assert_close(pruned(x.to(dtype)), expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(
            collapse(spvit.prune(network))(x.to(dtype)), expected, rtol=tolerance, atol=tolerance
        )
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in network.parameters())


@families
def test_official_blocks_differ_where_the_official_network_does(family):
    network = searched(family)
    pruned, official = spvit.prune(network), spvit.prune(network, official_blocks=True)
    assert not torch.allclose(pruned(images(family)), official(images(family)), atol=1e-3)
    added = set(official.state_dict()) - set(pruned.state_dict())
    assert {name.split(".")[-2] for name in added} == {"norm1"}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_network_without_hidden_units_or_mixers():
    network = spvit.convert(source("deit"))
    with torch.no_grad():
        network.blocks[1].attn.kernel_thresholds.fill_(-1)
        network.blocks[1].mlp.ffn_thresholds.fill_(-1)
    pruned = spvit.prune(network)
    assert pruned.blocks[1].mlp.fc1.out_features == 0
    torch.testing.assert_close(pruned(images("deit")), network(images("deit")))


@families
def test_plain_weights_are_pruned_by_position(family):
    model = source(family)
    found = spvit.found_architecture(searched(family))
    pruned = spvit.prune_plain(model, found)
    plain = spvit.split_network(model)
    for block, own, choice in zip(spvit.blocks_of(plain), spvit.blocks_of(pruned), found.blocks, strict=True):
        assert torch.equal(own.mlp.fc1.weight, block.mlp.fc1.weight[choice.units()])
        assert torch.equal(own.mlp.fc1.bias, block.mlp.fc1.bias[choice.units()])
        assert torch.equal(own.mlp.fc2.weight, block.mlp.fc2.weight[:, choice.units()])
        if choice.mixer in ("1x1", "3x3"):
            assert torch.equal(own.attn.v.weight, block.attn.v.weight)
            assert own.attn.head_probs.eq(1).all()


def test_architectures_of_other_networks_are_refused():
    found = spvit.found_architecture(searched("deit"))
    with pytest.raises(ValueError, match=r"the architecture has embed_dim 24; expected 48 as the network has"):
        spvit.prune_plain(source("deit", embed_dim=48), found)
    with pytest.raises(ValueError, match="expected an architecture found among as many"):
        spvit.prune_plain(source("deit", mlp_ratio=2.0), found)
    with pytest.raises(ValueError, match="does not say which hidden units stay"):
        spvit.prune_plain(timm.create_model("deit_tiny_patch16_224"), PUBLISHED_ARCHITECTURES["spvit_deit_ti_l200_t10"])


# -- files ------------------------------------------------------------------------------------------------------------


def test_architecture_survives_json(tmp_path):
    found = spvit.found_architecture(searched("swin"))
    (tmp_path / "found.json").write_text(found.to_json())
    assert Architecture.read(str(tmp_path / "found.json")) == found
    assert Architecture.read(found.to_dict()) == found
    assert Architecture.read("spvit_swin_t_l28_t32") is PUBLISHED_ARCHITECTURES["spvit_swin_t_l28_t32"]
    assert all(len(line) < 120 for line in found.to_json().splitlines())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "vit"}, "family 'vit': expected 'deit' or 'swin'"),
        ({"depths": [3]}, r"4 blocks; expected the 3 of depths \(3,\)"),
        ({"num_heads": [5]}, "num_heads 5 does not divide the 24 channels"),
        ({"blocks": [{"mixer": "5x5", "width": 1}]}, "mixer '5x5': expected one of skip, 1x1, 3x3, msa"),
        ({"blocks": [{"mixer": "msa", "width": 3, "kept": "c"}]}, "kept 'c' names 2 units"),
        ({"colour": 1}, "colour"),
    ],
)
def test_architecture_files_that_are_refused(change, message, tmp_path):
    plain = spvit.found_architecture(searched("deit")).to_dict()
    (tmp_path / "found.json").write_text(json.dumps(plain | change))
    with pytest.raises(ValueError, match=message):
        Architecture.read(tmp_path / "found.json")


def test_missing_architecture_names_the_published_ones():
    with pytest.raises(ValueError, match=r"nowhere.json: no such architecture .* one of spvit_deit_ti_l200_t10"):
        Architecture.read("nowhere.json")


def test_units_are_numbered_from_the_first_bit():
    choice = BlockChoice.of_mask("msa", [True, False, False, False, False, True])
    assert (choice.width, choice.kept, choice.units()) == (2, "84", [0, 5])


def test_indicators_of_an_official_file(tmp_path):
    masks = [[i % 3 == block % 3 for i in range(96)] for block in range(4)]
    vectors = {f"blocks.{i}.mlp.{'assigned_indicator_index'}": torch.tensor(m).float() for i, m in enumerate(masks)}
    content = {"model": vectors, "amp": {"loss_scaler0": {"loss_scale": 65536.0}}, "args": argparse.Namespace(lr=1)}
    torch.save(content, tmp_path / "found.pth")
    assert spvit.read_indicators(tmp_path / "found.pth") == masks
    mixers = [block.mixer for block in spvit.found_architecture(searched("deit")).blocks]
    architecture = spvit.split_network(source("deit")).architecture.with_blocks(mixers, [32] * 4)
    known = spvit.with_indicators(architecture, masks)
    assert [block.units() for block in known.blocks] == [list(range(i % 3, 96, 3)) for i in range(4)]
    with pytest.raises(
        ValueError, match=r"the indicators keep \[32, 32, 32\] hidden units; expected \[32, 32, 32, 32\]"
    ):
        spvit.with_indicators(architecture, masks[:3])
    torch.save({"model": {"head.bias": torch.ones(1)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="holds no vector named"):
        spvit.read_indicators(tmp_path / "other.pth")


@pytest.mark.parametrize(
    ("file", "name", "model"),
    [
        ("spvit_deit_sm_l30_t32_search_10epoch.pth", "spvit_deit_sm_l30_t32", "deit_small_patch16_224"),
        ("spvit_swin_t_l28_t32_search_12epoch.pth", "spvit_swin_t_l28_t32", "swin_tiny_patch4_window7_224"),
    ],
)
def test_real_indicators_prune_the_full_network(file, name, model):
    path = Path(os.environ.get("FRUGAL_DATA", "nowhere")) / "spvit" / file
    if not path.exists():
        pytest.skip("FRUGAL_DATA names no folder with spvit/*.pth")
    architecture = spvit.with_indicators(PUBLISHED_ARCHITECTURES[name], spvit.read_indicators(path))
    pruned = spvit.prune_plain(timm.create_model(model), architecture, official_blocks=True)
    expected = backbones.create(name).state_dict()
    assert {key: t.shape for key, t in pruned.state_dict().items()} == {key: t.shape for key, t in expected.items()}


@pytest.mark.parametrize(("cls", "name"), [(SPViTDeiT, "spvit_deit"), (SPViTSwin, "spvit_swin")])
@pytest.mark.parametrize("collapsed", [False, True])
def test_official_releases_load(cls, name, collapsed, tmp_path):
    """With the index tables and masks that official files hold."""
    official = spvit.prune(searched(name[6:]), official_blocks=True)
    state = dict(collapse(official).state_dict() if collapsed else official.state_dict())
    for key in [key for key in state if key.endswith("norm1.weight")]:
        state[key.replace("norm1.weight", "attn_mask")] = torch.zeros(4, 49, 49)
        state[key.replace("norm1.weight", "attn.relative_position_index")] = torch.zeros(49, 49, dtype=torch.int64)
    torch.save({"model": state, "optimizer": {}, "epoch": 129}, tmp_path / "release.pth")
    options = {"img_size": official.img_size, "num_classes": 5, "collapsed": collapsed}
    network = backbones.create(name, architecture=official.architecture, official_blocks=True, **options)
    report = load_checkpoint(network, tmp_path / "release.pth")
    assert (report.missing, report.unexpected, report.mismatched) == ([], [], {})
    x = images(name[6:])
    torch.testing.assert_close(network.eval()(x), official(x))
    assert isinstance(network, cls)
