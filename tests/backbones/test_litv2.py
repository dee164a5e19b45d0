import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backbones.lit import LIT, RelativeAttention
from backbones.lit_stages import Stage
from backbones.litv2 import ConvFFN, HiLo, LITv2, LITv2Dense
from backbones.positions import relative_index


def plain_attention(q, k, v, scale):
    return torch.softmax(q @ k.transpose(-1, -2) * scale, dim=-1) @ v


def hilo_by_loops(module, x):
    """HiLo of one map (H, W, C), sides divisible by the window, one window and one head at a time."""
    height, width, _ = x.shape
    dim, s, scale = module.head_dim, module.window_size, module.scale
    out = torch.zeros(height, width, (module.hi_heads + module.lo_heads) * dim, dtype=x.dtype)
    qkv = module.h_qkv(x)
    hi = torch.zeros(height, width, module.hi_heads * dim, dtype=x.dtype)
    for top in range(0, height, s):
        for left in range(0, width, s):
            window = qkv[top : top + s, left : left + s].reshape(s * s, 3, module.hi_heads, dim)
            for head in range(module.hi_heads):
                attended = plain_attention(*window[:, :, head].unbind(1), scale)
                hi[top : top + s, left : left + s, head * dim : (head + 1) * dim] = attended.view(s, s, dim)
    out[..., : module.hi_heads * dim] = module.h_proj(hi)
    pooled = torch.stack(
        [
            x[top : top + s, left : left + s].mean(dim=(0, 1))
            for top in range(0, height, s)
            for left in range(0, width, s)
        ]
    )
    q = module.l_q(x).view(height * width, module.lo_heads, dim)
    k, v = module.l_kv(pooled).view(len(pooled), 2, module.lo_heads, dim).unbind(1)
    lo = [plain_attention(q[:, head], k[:, head], v[:, head], scale) for head in range(module.lo_heads)]
    out[..., module.hi_heads * dim :] = module.l_proj(torch.cat(lo, dim=-1)).view(height, width, -1)
    return out


@pytest.mark.parametrize(("window", "size"), [(2, (4, 6)), (3, (3, 6))])
def test_hilo_is_its_definition(window, size):
    torch.manual_seed(0)
    module = HiLo(16, num_heads=4, qkv_bias=True, window_size=window, alpha=0.5).double()
    x = torch.randn(2, *size, 16, dtype=torch.float64)
    expected = torch.stack([hilo_by_loops(module, one) for one in x])
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("alpha", "window", "lo", "hi"), [(0.9, 2, 7, 1), (0, 2, 0, 8), (1, 2, 8, 0), (0.2, 1, 8, 0)])
def test_heads_are_split_by_alpha(alpha, window, lo, hi):
    module = HiLo(32, num_heads=8, window_size=window, alpha=alpha)
    assert (module.lo_heads, module.hi_heads) == (lo, hi)
    names = {name.partition(".")[0] for name in module.state_dict()}
    assert names == ({"l_q", "l_kv", "l_proj"} if lo else set()) | ({"h_qkv", "h_proj"} if hi else set())


@pytest.mark.parametrize("alpha", [0, 0.5, 1])
def test_padding_enters_as_zeros(alpha):
    module = HiLo(16, num_heads=4, qkv_bias=True, window_size=2, alpha=alpha, pad=True).double()
    x = torch.randn(2, 5, 7, 16, dtype=torch.float64)
    padded = module(F.pad(x, (0, 0, 0, 1, 0, 1)))
    assert torch.equal(module(x), padded[:, :5, :7])


def test_without_padding_low_frequencies_drop_the_rest():
    module = HiLo(16, num_heads=4, window_size=2, alpha=1.0)
    x = torch.randn(1, 5, 4, 16)
    changed = x.clone()
    changed[:, 4] += 1  # the row that no window has
    assert torch.equal(module(x)[:, :4], module(changed)[:, :4])
    module.pad = True
    assert not torch.equal(module(x)[:, :4], module(changed)[:, :4])


@pytest.mark.parametrize("arguments", [{"num_heads": 5}, {"window_size": 0}, {"alpha": 1.5}])
def test_hilo_names_bad_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        HiLo(16, **{"num_heads": 4, **arguments})


def test_conv_ffn_convolves_before_the_activation():
    module = ConvFFN(4, 8).double()
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    hidden = module.fc1(x).permute(0, 3, 1, 2).contiguous()
    expected = module.fc2(F.gelu(module.dwconv.dwconv(hidden)).permute(0, 2, 3, 1))
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


def test_initialisation():
    torch.manual_seed(0)
    network = LITv2(embed_dim=48, depths=(1, 1, 1, 1))
    block = network.layers[2].blocks[0]
    assert block.attn.l_q.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.mlp.dwconv.dwconv.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)
    assert block.attn.l_q.bias.abs().max() == 0
    assert network.layers[0].downsample.dconv.conv_offset.weight.abs().max() == 0


def test_relative_bias_is_the_indexed_table():
    attention = RelativeAttention(8, num_heads=2, grid_size=(3, 4)).double()
    indexed = attention.relative_position_bias_table[relative_index(3, 4)].permute(2, 0, 1)
    assert torch.equal(attention.bias(3, 4), indexed)
    assert torch.equal(attention.relative_position_index, relative_index(3, 4))
    table = attention.relative_position_bias_table.t().view(1, 2, 5, 7)
    resized = F.interpolate(table, size=(9, 5), mode="bicubic").view(2, -1)
    assert torch.equal(attention.bias(5, 3), resized[:, relative_index(5, 3)])


@pytest.mark.parametrize("network", [LIT, LITv2])
def test_inference_in_parts_equals_the_whole(network, monkeypatch):
    torch.manual_seed(0)
    network = network(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), num_classes=3).double().eval()
    images = torch.randn(5, 3, 64, 64, dtype=torch.float64)
    whole = network(images).detach()
    calls = []
    monkeypatch.setattr("backbones.lit_stages.TOKENS_IN_CACHE", 300)
    original = Stage._blocks
    monkeypatch.setattr(Stage, "_blocks", lambda stage, x: calls.append(len(x)) or original(stage, x))
    with torch.no_grad():
        torch.testing.assert_close(network(images), whole, rtol=1e-12, atol=1e-12)
        assert network(images[:0]).shape == (0, 3)
    assert calls[:6] == [2, 2, 1, 5, 5, 5]


def test_only_returned_stages_are_built():
    pyramid = LITv2Dense(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), out_indices=(1, 2))
    assert pyramid.channels == [16, 32]
    assert pyramid.strides == [8, 16]
    maps = pyramid(torch.randn(1, 3, 50, 70))
    assert [tuple(x.shape) for x in maps] == [(1, 16, 6, 9), (1, 32, 3, 4)]
    sum(x.square().sum() for x in maps).backward()
    assert all(p.grad is not None for p in pyramid.parameters())


def test_flavours_differ_in_the_norm_of_the_first_map():
    names = {
        flavour: {name for name, _ in LITv2Dense(embed_dim=24, flavour=flavour).named_children()}
        for flavour in ("segmentation", "detection")
    }
    assert names["segmentation"] - names["detection"] == {"norm0"}
    with pytest.raises(ValueError, match="flavour='panoptic'"):
        LITv2Dense(flavour="panoptic")


def test_stages_must_exist():
    with pytest.raises(ValueError, match=r"indices \[0, 4\]: expected stages 0 to 3"):
        LITv2Dense(out_indices=(0, 4))
    with pytest.raises(ValueError, match="has_msa"):
        LITv2(depths=(1, 1, 1, 1), has_msa=(0, 0))


def test_batch_norm_of_merging_can_be_synchronised():
    network = nn.SyncBatchNorm.convert_sync_batchnorm(LITv2(embed_dim=24, depths=(1, 1, 1, 1)))
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in network.modules()) == 3
