import copy
import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import backbones
import backbones.convert
from backbones.attention import global_attention, split_projections
from backbones.ecoformer import EcoFormerAttention, KernelHashing, StraightThroughSign, hashed_attention
from backbones.ecoformer_networks import PVTv2, TwinsSVT
from efficiency import kernel_hashing
from efficiency.ecoformer import convert, fit, fit_at_next_pass, hashed_layers, unfitted_layers
from efficiency.energy import count_operations, total
from efficiency.kernel_hashing import fit_hash_functions

GOLDENS = Path(__file__).parents[1] / "goldens" / "ecoformer"
PYRAMID = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4), "num_classes": 5}
SOURCES = {
    "pvt_v2_b0": {**PYRAMID, "mlp_ratios": (2, 2, 2, 2)},
    "twins_svt_small": {**PYRAMID, "depths": (2, 2, 2, 2), "mlp_ratios": (2, 2, 2, 2), "wss": (4, 4, 2, 2)},
    "deit_tiny_patch16_224": {"img_size": 64, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
    "hvt_s_1": {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
}


def make(name, seed=0, **options):
    torch.manual_seed(seed)
    return timm.create_model(name, **{**SOURCES.get(name, PYRAMID), **options}).eval()


def images(size=64, batch=2, seed=0):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def tokens(count=40, dim=24, batch=2, seed=0):
    return torch.randn(batch, count, dim, generator=torch.Generator().manual_seed(seed))


def functions(network):
    return {name: copy.deepcopy(layer.hashing.state_dict()) for name, layer in hashed_layers(network).items()}


def same(first, second):
    return {name: all(torch.equal(first[name][key], second[name][key]) for key in first[name]) for name in first}


# -- the layer --------------------------------------------------------------------------------------------------------


def test_the_layer_is_the_official_formula_term_by_term():
    torch.manual_seed(0)
    layer = EcoFormerAttention(24, 3, num_bits=8, num_anchors=5).double()
    layer.hashing.mvec.uniform_()
    x = tokens().double()
    unit = layer.unit_queries(x)
    difference = unit.unsqueeze(3) - layer.hashing.anchor.unsqueeze(2)  # (B, heads, N, m, d)
    distance = difference.square().sum(-1)
    kernel = torch.exp(-distance / (2 * distance.mean((2, 3), keepdim=True))) - layer.hashing.mvec
    codes = torch.einsum("hkj,bhnj->bhnk", layer.hashing.A, kernel).sign()
    value = layer.to_v(x).unflatten(2, (3, 8)).transpose(1, 2)
    numerator = codes @ (codes.transpose(2, 3) @ value) + 9 * value
    denominator = (codes * codes.sum(2, keepdim=True)).sum(-1, keepdim=True) + 40 * 9
    expected = layer.proj((numerator / denominator).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_the_largest_tensor_of_a_layer_is_linear_in_tokens_and_anchors():
    """No difference of every token with every anchor, let alone of every pair of tokens."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, torch.Tensor))
            return output

    layer = EcoFormerAttention(64, 2)
    with Sizes():
        layer(tokens(500, 64, batch=1)).sum().backward()
    assert max(sizes) <= 500 * max(64, 2 * 25, 2 * 16)


def test_sign_and_its_gradient():
    x = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, torch.nan], requires_grad=True)
    codes = StraightThroughSign.apply(x)
    codes.backward(torch.arange(1.0, 9.0))
    assert codes.tolist() == [-1, -1, -1, 0, 1, 1, 1, 0]
    assert x.grad.tolist() == [0, 0, 3, 4, 5, 0, 0, 0]


def test_a_token_of_zeros_disturbs_nothing():
    layer = EcoFormerAttention(24, 3, qkv_bias=False)
    x = tokens()
    x[0, 7] = 0
    x.requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert layer.to_qk.weight.grad.isfinite().all()


def test_autocast_hashes_what_it_is_given_in_float32():
    torch.manual_seed(0)
    layer, x = EcoFormerAttention(24, 3), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        unit = layer.unit_queries(x)
        y = layer(x)
    assert unit.dtype == torch.float32
    assert y.dtype == torch.bfloat16
    seen = []
    layer.hashing.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    assert seen == [(torch.float32, torch.float32)]


def test_bad_arguments_of_the_layer():
    with pytest.raises(ValueError, match="num_heads=5 does not divide dim=24"):
        EcoFormerAttention(24, 5)
    with pytest.raises(ValueError, match="num_bits=16, num_anchors=1: expected at least 1 and at least 2"):
        EcoFormerAttention(24, 3, num_anchors=1)
    with pytest.raises(ValueError, match=r"EcoFormerAttention takes no masks, got \['attn_mask'\]"):
        EcoFormerAttention(24, 3)(tokens(), attn_mask=torch.ones(40, 40))
    with pytest.raises(ValueError, match="attention='linear': expected 'ecoformer' or 'msa'"):
        PVTv2(attention="linear", **PYRAMID)


# -- conversion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kept"),
    [("pvt_v2_b0", 1), ("twins_svt_small", 2), ("deit_tiny_patch16_224", 0), ("hvt_s_1", 0)],
)
def test_conversion_keeps_query_value_and_output(name, kept):
    network = make(name)
    before = {key: (split_projections(m), m.proj) for key, m in network.named_modules() if key.endswith(".attn")}
    assert convert(network, num_bits=8, num_anchors=6) is network
    layers = hashed_layers(network)
    assert len(layers) == len(before) - kept
    for key, layer in layers.items():
        (weight, bias), proj = before[key]
        assert torch.equal(layer.to_qk.weight, weight[0])
        assert torch.equal(layer.to_v.weight, weight[2])
        assert torch.equal(layer.to_v.bias, bias[2])
        assert layer.proj is proj
        assert layer.hashing.A.shape[1:] == (8, 6)
    assert network(images()).shape[0] == 2
    network(images()).sum().backward()
    assert all(layer.to_qk.weight.grad.any() for layer in layers.values())
    assert sorted(unfitted_layers(network)) == sorted(layers)


def test_a_converted_network_is_the_registered_one():
    source = make("pvt_v2_b0")
    for module in [m for m in source.modules() if hasattr(m, "attn")]:
        module.attn = global_attention(module.attn)
    converted = convert(source)
    registered = make("pvt_v2_b0_ecoformer", mlp_ratios=(2, 2, 2, 2))
    registered.load_state_dict(converted.state_dict())
    assert torch.equal(registered(images()), converted(images()))


def test_stages_can_be_chosen():
    names = hashed_layers(convert(make("twins_svt_small"), stages=[1, 3]))
    assert {name.split(".")[1] for name in names} == {"1", "3"}
    with pytest.raises(
        ValueError, match=r"stages=\[2, 4\]: there is no attention in \[4\], only in stages \[0, 1, 2, 3"
    ):
        convert(make("pvt_v2_b0"), stages=[2, 4])
    with pytest.raises(ValueError, match=r"stages=\[0\]: there is no attention in \[0\], only in stages \[\]"):
        convert(make("deit_tiny_patch16_224"), stages=[0])


def test_conversion_inside_a_larger_network():
    features = backbones.create_features("pvt_v2_b0", depths=(1, 1, 1, 1))
    network = nn.ModuleDict({"backbone": features})
    convert(network)
    assert {name.split(".")[3] for name in hashed_layers(network)} == {"0", "1", "2"}
    assert [m.shape[2] for m in network["backbone"](images(96))] == [24, 12, 6, 3]


def test_what_cannot_be_converted():
    with pytest.raises(ValueError, match=r"ResNet has no plain self-attention to exchange; expected one of Attention"):
        convert(timm.create_model("test_resnet"))
    swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), device="meta")
    with pytest.raises(ValueError, match="SwinTransformer has no plain self-attention"):
        convert(swin)
    normed = timm.layers.Attention(24, 2, qk_norm=True, norm_layer=nn.LayerNorm)
    with pytest.raises(ValueError, match="Attention: expected plain self-attention"):
        hashed_attention(normed)


def test_conversion_keeps_type_mode_and_dropout():
    layer = timm.layers.Attention(24, 2, proj_drop=0.25).to(torch.bfloat16).eval()
    hashed = hashed_attention(layer)
    assert {tensor.dtype for tensor in hashed.state_dict().values()} == {torch.bfloat16}
    assert not hashed.training
    assert hashed.proj_drop.p == 0.25
    assert hashed.to_qk.bias is None
    assert not hashed.hashing.fitted  # rounding keeps what tells it


# -- weight files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "target"), [("pvt_v2_b0", PVTv2), ("twins_svt_small", TwinsSVT)])
def test_weights_go_from_timm_to_msa_to_ecoformer(source, target, tmp_path):
    first = make(source)
    options = {key: value for key, value in SOURCES[source].items() if key != "wss"}
    torch.save(first.state_dict(), tmp_path / "timm.pth")
    msa = target("msa", **options)
    report = backbones.load_checkpoint(msa, tmp_path / "timm.pth")
    assert (report.missing, report.unexpected, report.mismatched) == ([], [], {})
    assert all(".sr." in name or ".attn.norm." in name for name in report.ignored)
    torch.save({"state_dict": msa.state_dict()}, tmp_path / "msa.ckpt")
    eco = target(**options).eval()
    report = backbones.load_checkpoint(eco, tmp_path / "msa.ckpt")
    assert (report.missing, report.unexpected, report.mismatched, report.ignored) == ([], [], {}, [])
    assert len(unfitted_layers(eco)) == len(hashed_layers(eco))
    directly = convert(make(source))
    assert {key: torch.equal(layer.to_qk.weight, hashed_layers(directly)[key].to_qk.weight)
            for key, layer in hashed_layers(eco).items()} == dict.fromkeys(hashed_layers(directly), True)  # fmt: skip


def test_official_names_count_as_fitted(tmp_path):
    network = make("pvt_v2_b0_ecoformer", mlp_ratios=(2, 2, 2, 2))
    for layer in hashed_layers(network).values():
        layer.hashing.mvec.uniform_()
    official = {}
    for name, tensor in network.state_dict().items():
        stage = name.split(".")[1] if name.startswith("stages.") else ""
        new = name.replace("patch_embed.", "patch_embed1.").replace("mlp.dwconv.", "mlp.dwconv.dwconv.")
        for ours, theirs in (("downsample.", "patch_embed{}."), ("blocks.", "block{}."), ("norm.", "norm{}.")):
            if stage:
                prefix = f"stages.{stage}.{ours}"
                new = new.replace(prefix, theirs.format(int(stage) + 1)) if new.startswith(prefix) else new
        official[new] = tensor
    assert "block1.0.attn.fast_attention.ksh.A" in official
    assert "norm4.weight" in official
    torch.save({"model": official, "epoch": 29}, tmp_path / "pvtv2_b0_ecoformer.pth")
    other = make("pvt_v2_b0_ecoformer", seed=1, mlp_ratios=(2, 2, 2, 2))
    assert unfitted_layers(other)
    report = backbones.load_checkpoint(other, tmp_path / "pvtv2_b0_ecoformer.pth")
    assert report.layout == "official PVTv2 names"
    assert (report.missing, report.unexpected, report.mismatched, report.ignored) == ([], [], {}, [])
    assert unfitted_layers(other) == []
    assert torch.equal(other(images()), network(images()))


def test_an_official_file_can_be_converted(tmp_path):
    keys = json.loads((GOLDENS / "fullsize_pvt_v2_b0_ecoformer.json").read_text())["keys"]
    torch.save({"model": {name: torch.ones(shape) for name, shape in keys}}, tmp_path / "official.pth")
    written = backbones.convert.convert(tmp_path / "official.pth", tmp_path / "ours.pth", "pvt_v2_b0_ecoformer")
    assert len(written.report.loaded) == len(keys)
    timm.create_model("pvt_v2_b0_ecoformer").load_state_dict(torch.load(tmp_path / "ours.pth")["model"])


# -- hash functions ---------------------------------------------------------------------------------------------------


def test_fit_changes_the_functions_and_nothing_else():
    network = convert(make("deit_tiny_patch16_224").train(), num_bits=4)
    weights = {key: value.clone() for key, value in network.named_parameters()}
    before = functions(network)
    with torch.inference_mode():
        fit(network, images())
    assert not any(same(before, functions(network)).values())
    assert unfitted_layers(network) == []
    assert all(torch.equal(weights[key], value) for key, value in network.named_parameters())
    assert network.training
    assert not any(layer._forward_pre_hooks for layer in hashed_layers(network).values())
    anchors = next(iter(hashed_layers(network).values())).hashing.anchor
    torch.testing.assert_close(anchors.norm(dim=-1), torch.ones(anchors.shape[:-1]))


def test_the_pass_that_fits_goes_on_with_the_fitted_functions():
    network = convert(make("deit_tiny_patch16_224"), num_bits=4)
    fit_at_next_pass(network)
    first = network(images())
    assert torch.equal(network(images()), first)
    before = functions(network)
    fit_at_next_pass(network, only_unfitted=True)
    network(images(seed=1))
    assert all(same(before, functions(network)).values())
    fit_at_next_pass(network)
    network(images(seed=1))
    assert not any(same(before, functions(network)).values())


def test_fitting_under_checkpointing_and_autocast_is_done_once():
    network = convert(make("deit_tiny_patch16_224"), num_bits=4).train()
    network.set_grad_checkpointing()
    fit_at_next_pass(network)
    with torch.autocast("cpu", torch.bfloat16):
        scores = network(images())
    before = functions(network)
    scores.float().sum().backward()
    assert all(same(before, functions(network)).values())
    assert all(state["A"].dtype == torch.float32 and state["A"].isfinite().all() for state in before.values())


def test_state_of_the_fit_is_in_the_state_dict():
    network = convert(make("deit_tiny_patch16_224"), num_bits=4)
    other = copy.deepcopy(network)
    fit(network, images())
    other.load_state_dict(network.state_dict())
    assert unfitted_layers(other) == []
    assert torch.equal(other(images()), network(images()))


def test_too_few_tokens_say_so():
    network = convert(make("pvt_v2_b0"))
    with pytest.raises(
        ValueError, match=r"stages\.1\.blocks\.0\.attn: 16 tokens cannot fit hash functions of 25 anchors"
    ):
        fit(network, images(32, batch=4))
    assert not any(layer._forward_pre_hooks for layer in hashed_layers(network).values())
    with pytest.raises(ValueError, match="8 tokens cannot fit hash functions of 4 anchors and 10 neighbours"):
        fit_hash_functions(KernelHashing(1, 6, 4, 4), torch.randn(1, 1, 8, 6), torch.arange(4))
    with pytest.raises(ValueError, match="all alike"):
        fit_hash_functions(KernelHashing(1, 6, 4, 4), torch.ones(1, 1, 16, 6), torch.arange(4))


def test_similarities_in_parts_are_those_at_once(monkeypatch):
    torch.manual_seed(0)
    unit = nn.functional.normalize(torch.randn(2, 3, 50, 8, dtype=torch.float64), dim=-1)
    whole = kernel_hashing.SignedNeighbours(unit, 10)
    monkeypatch.setattr(kernel_hashing, "CHUNK", 2 * 3 * 50 * 7)
    parts = kernel_hashing.SignedNeighbours(unit, 10)
    y = torch.randn(2, 3, 50, dtype=torch.float64)
    cosine = unit @ unit.transpose(2, 3)
    dense = torch.zeros_like(cosine)
    dense.scatter_(-1, cosine.topk(10).indices, 1.0).scatter_(-1, (-cosine).topk(10).indices, -1.0)
    for similarity in (whole, parts):
        torch.testing.assert_close(similarity.times(y), (dense @ y.unsqueeze(-1)).squeeze(-1))
        torch.testing.assert_close(similarity.transposed_times(y), (dense.mT @ y.unsqueeze(-1)).squeeze(-1))


def test_neighbours_near_and_far_at_once_count_as_far():
    torch.manual_seed(0)
    unit = nn.functional.normalize(torch.randn(1, 1, 12, 8), dim=-1)
    similarity = kernel_hashing.SignedNeighbours(unit, 8)
    sums = similarity.times(torch.ones(1, 1, 12))
    assert sums.tolist() == [[[4.0 - 8.0] * 12]]  # 8 of 12 far, of which 4 near too


def test_fitted_codes_say_more_of_similarity_than_random_ones():
    """On clustered tokens, the mean code product of nearest pairs minus that of farthest pairs rises."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(6, 8, generator=generator)
    x = centres[torch.randint(6, (4, 1, 60), generator=generator)] + torch.randn(4, 1, 60, 8, generator=generator)
    unit = nn.functional.normalize(x.double(), dim=-1)
    torch.manual_seed(0)
    hashing = KernelHashing(1, 8, 16, 12).double()
    index = torch.randperm(60)[:12]
    hashing.anchor.copy_(unit[:1, :, index])
    hashing.mvec.copy_(hashing.kernel(unit, hashing.anchor).mean((0, 2), keepdim=True))

    def contrast():
        codes = hashing(unit).sign()
        similarity = kernel_hashing.SignedNeighbours(unit, 10)
        return float(sum((codes[..., bit] * similarity.times(codes[..., bit])).sum() for bit in range(16)))

    before = contrast()
    bits = fit_hash_functions(hashing, unit, index)
    assert any(bit.accepted for bit in bits)
    assert contrast() > before
    assert all(bit.relaxed_losses[-1] < bit.relaxed_losses[0] for bit in bits)


# -- energy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pvt_v2_b0_ecoformer", (0.54, 0.56, 2.49)),
        ("pvt_v2_b0_msa", (2.02, 1.99, 9.25)),
        ("twins_svt_small_ecoformer", (2.72, 2.81, 12.59)),
        ("twins_svt_small_msa", (5.96, 5.91, 27.36)),
    ],
)
def test_the_published_table(name, expected):
    with torch.device("meta"):
        network = timm.create_model(name)
    operations = total(count_operations(network, (1, 3, 224, 224)))
    counts = (operations.multiplications, operations.additions, operations.energy_pj)
    assert tuple(round(count / 1e9, 2) for count in counts) == expected


def test_operations_of_known_layers():
    network = nn.Sequential(nn.Conv2d(3, 8, 2, stride=2, groups=1), nn.Flatten(2), nn.Linear(16, 5), nn.LayerNorm(5))
    counted = count_operations(network, (1, 3, 8, 8))
    counts = {name: value.multiplications for name, value in counted.items()}
    assert counts == {"0": 8 * 16 * (3 * 4 + 1), "2": 8 * 16 * 5, "3": 2 * 8 * 5}
    assert all(value.multiplications == value.additions for value in counted.values())
    assert not any(module._forward_hooks for module in network.modules())


def test_keys_of_a_query_in_every_kind_of_attention():
    """Spatial reduction of 8 x 8 and windows of 4 x 4 on maps of 16 x 16 tokens, 8 channels, 1 head."""
    pvt = count_operations(make("pvt_v2_b0"), (1, 3, 64, 64))["stages.0.blocks.0.attn"]
    twins = count_operations(make("twins_svt_small"), (1, 3, 64, 64))
    assert pvt.additions == 2 * 256 * 4 * 8
    assert pvt.multiplications == pvt.additions + 256 * 4
    assert twins["blocks.0.0.attn"].additions == 2 * 256 * 16 * 8
    assert twins["blocks.0.1.attn"].additions == 2 * 256 * 4 * 8
