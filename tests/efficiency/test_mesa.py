import copy
import gc
import weakref

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import backbones
from efficiency.mesa import Codes, convert, find, pack_bits, unpack_bits
from efficiency.mesa_policy import Policy, Setting
from efficiency.saved_bytes import autocast, count_saved_bytes

OFF = Policy(*[Setting(enable=False)] * 10)


def vit(**options):
    torch.manual_seed(0)
    return timm.create_model("test_vit2", **options).train()


def batch(size=2, seed=1, pixels=64):
    return torch.randn(size, 3, pixels, pixels, generator=torch.Generator().manual_seed(seed))


def train_step(network, images, dtype=torch.float32):
    """Output, gradients by name and what was kept."""
    network.zero_grad()
    torch.manual_seed(2)
    with autocast(images.device, dtype), count_saved_bytes(network) as saved:
        output = network(images)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    (output.float() * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    return output.detach(), gradients, saved


def cosines(gradients, exact):
    assert gradients.keys() == exact.keys()
    pairs = {name: (gradients[name].flatten().double(), exact[name].flatten().double()) for name in exact}
    return {name: F.cosine_similarity(a, b, dim=0).item() for name, (a, b) in pairs.items() if b.norm() > 1e-6}


NETWORKS = {
    "deit_tiny_patch16_224": {"img_size": 64, "depth": 3},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 4, "depths": (1, 2, 1, 1), "embed_dim": 48},
    "pvt_v2_b0": {"depths": (1, 1, 1, 1)},
    # A batch norm takes away most of the gradient of what is added before it: single small gradients are noise there.
    "litv2_s": {"embed_dim": 32, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]},
    "lit_s": {"embed_dim": 32, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "img_size": 64},
    "resnet10t": {},
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_is_exact_and_gradients_point_the_same_way(name, dtype):
    torch.manual_seed(0)
    plain = backbones.create(name, num_classes=10, **NETWORKS[name]).train()
    network = convert(copy.deepcopy(plain))
    images = batch(4)
    expected, exact, before = train_step(plain, images, dtype)
    output, gradients, after = train_step(network, images, dtype)
    assert torch.equal(output, expected)
    weights = find(network).saved.kept["copies of weights"]
    assert after.total - weights < (0.5 if dtype == torch.float32 else 0.8) * (before.total - weights)
    if name in ("litv2_s", "lit_s", "resnet10t"):
        gradients, exact = ({"all": torch.cat([g.flatten() for g in gs.values()])} for gs in (gradients, exact))
    assert min(cosines(gradients, exact).values()) > (0.999 if dtype == torch.float32 else 0.998)


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 0.40), (torch.bfloat16, 0.60)], ids=str)
def test_deit_s_keeps_its_share(dtype, share):
    """Blocks of DeiT-S at the batch and image size of the benchmark; two of them, as the rest keep the same."""
    plain = timm.create_model("deit_small_patch16_224", depth=2).train()
    kept = []
    for network in (plain, convert(copy.deepcopy(plain))):
        with autocast(torch.device("cpu"), dtype), count_saved_bytes(network) as saved:
            network(batch(16, pixels=224))
        kept.append(saved.total)
    assert kept[1] <= share * kept[0]


def test_what_is_kept_is_counted_by_kind():
    network = convert(vit())
    _, _, saved = train_step(network, batch())
    own = find(network).saved
    assert own.total == saved.total
    assert own.plain == saved.plain
    plain = vit()
    _, _, before = train_step(plain, batch())
    assert own.plain_total == before.total == before.plain_total
    # one byte in place of four, and ranges; what has no gradient stays
    assert own.kept["gelu"] < 0.26 * own.plain["gelu"]
    assert own.kept["layernorm"] < 0.32 * own.plain["layernorm"]  # mean and deviation of 64 channels
    assert set(own.plain) == {"fc", "conv", "gelu", "layernorm", "matmul", "other"}


def test_saved_bytes_by_hand():
    layer = nn.Linear(64, 64)
    network = nn.Sequential(layer, nn.Sigmoid(), nn.Linear(64, 64))
    x = torch.randn(32, 64)
    with count_saved_bytes(network) as saved:
        network(x)
    assert saved.total == 2 * x.nbytes  # the input; the sigmoid's output is the input of the last layer
    convert(network)
    with count_saved_bytes(network) as saved:
        network(x)
    ranges = 2 * 2 * 4  # span and shift of two groups of 32 channels
    assert saved.total == x.nbytes + x.numel() + ranges
    assert saved.plain_total == 2 * x.nbytes


def test_nothing_changes_in_evaluation_and_without_gradients():
    network = convert(vit())
    with torch.no_grad():
        network(batch())
    network.eval()(batch()).sum().backward()
    assert find(network).saved is None
    assert not find(network).ranges
    assert network.state_dict().keys() == vit().state_dict().keys()


def test_disabled_kinds_stay_exact():
    plain, network = vit(), convert(vit(), OFF)
    _, exact, before = train_step(plain, batch())
    _, gradients, after = train_step(network, batch())
    assert after.total == before.total
    assert all(torch.equal(gradients[name], exact[name]) for name in exact)
    only = convert(vit(), Policy(*[Setting(enable=tag == 2) for tag in range(10)]))
    train_step(only, batch())
    assert {place.rpartition(":")[0].rpartition(".")[2] for place in find(only).ranges} == {"act"}


def test_two_levels_are_coarser_than_256():
    plain = vit()
    _, exact, _ = train_step(plain, batch())
    worst = []
    for levels in (2, 16, 256):
        setting = Setting(levels=levels)
        _, gradients, _ = train_step(convert(vit(), Policy(fc=setting)), batch())
        worst.append(cosines(gradients, exact)["blocks.0.mlp.fc2.weight"])
    assert worst[0] < worst[1] < worst[2]
    assert worst[0] < 0.98


class Functional(nn.Module):
    """Attention and an activation without modules of their own."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.qkv, self.proj = 2, nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 32)).permute(2, 0, 3, 1, 4)
        return self.proj(((q @ k.transpose(2, 3) / 6).softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_attention_that_is_written_out_is_covered():
    torch.manual_seed(0)
    plain = nn.Sequential(Functional(), nn.LayerNorm(64), nn.Linear(64, 3))
    network = convert(copy.deepcopy(plain))
    x = torch.randn(3, 40, 64)
    _, exact, before = train_step(plain, x)
    _, gradients, after = train_step(network, x)
    assert min(cosines(gradients, exact).values()) > 0.999
    assert after.total - x.nbytes < 0.28 * (before.total - x.nbytes)
    attention = [place for place in find(network).ranges if place.startswith("0:")]
    assert len(attention) == 4  # q, k, v and the probabilities, which softmax and product share
    assert all(len(find(network).ranges[place].span) == 2 for place in attention)


def test_relu_keeps_one_bit_and_an_exact_gradient():
    network = convert(nn.Sequential(nn.Conv2d(3, 20, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()))
    x = torch.randn(2, 3, 16, 16)
    network(x).sum().backward()
    kept = find(network).saved.kept
    # 20 channels fill three bytes; the pooling reads the same memory and has codes of it, in one group
    assert kept["relu"] == 2 * 3 * 16 * 16 + (2 * 20 * 16 * 16 + 2 * 4)
    mask = torch.rand(3, 13, 5) > 0.5
    assert torch.equal(unpack_bits(pack_bits(mask), 13), mask)
    plain = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    compressed, x = convert(copy.deepcopy(plain)), torch.randn(32, 64)
    _, exact, _ = train_step(plain, x)
    _, gradients, _ = train_step(compressed, x)  # the input of the linear layer belongs to the caller
    assert all(torch.equal(gradients[name], exact[name]) for name in exact)


class Views(nn.Module):
    """An operation on several views of a tensor."""

    def __init__(self, *views):
        super().__init__()
        self.views = views

    def forward(self, x):
        return sum(F.silu(view(x)).sum() for view in self.views)


def test_a_tensor_in_another_view_is_packed_once():
    views = Views(lambda x: x, lambda x: x.transpose(1, 2), lambda x: x.unflatten(2, (8, 8)), lambda x: x[:, 1:])
    network = convert(nn.Sequential(nn.Linear(64, 64), views))
    network(torch.randn(4, 16, 64)).backward()
    saved = find(network).saved
    assert saved.plain["other"] == 4 * 16 * 64 * 4
    # the part has codes of its own
    assert 4 * (16 + 15) * 64 <= saved.kept["other"] < 4 * (16 + 15) * 64 + 64


def test_what_is_kept_anyway_is_not_packed():
    network = convert(nn.Sequential(nn.Linear(64, 64), Views(torch.flatten, lambda x: x)))
    network(torch.randn(4, 16, 64)).backward()
    saved = find(network).saved
    assert saved.kept["other"] == saved.plain["other"] == 4 * 16 * 64 * 4  # one dimension has no groups


def test_codes_are_freed_with_the_graph():
    network = convert(vit())
    output = network(batch())
    gc.collect()
    alive = [weakref.ref(thing) for thing in gc.get_objects() if isinstance(thing, Codes)]
    assert alive
    del output
    gc.collect()
    assert not any(reference() for reference in alive)


def test_the_first_of_two_passes_keeps_its_own_range():
    network = convert(nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1)))
    small, large = torch.randn(32, 64), 100 * torch.randn(32, 64)
    first, _ = network(small).sum(), network(large).sum()
    first.backward()
    gradient = network[0].weight.grad.clone()
    network.zero_grad()
    plain = nn.Sequential(*copy.deepcopy(network).children())
    for module in plain.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    plain.zero_grad()
    plain(small).sum().backward()
    assert F.cosine_similarity(gradient.flatten(), plain[0].weight.grad.flatten(), dim=0) > 0.999


def test_running_ranges_follow_and_clamp():
    network = convert(nn.Sequential(nn.Linear(64, 64), nn.SiLU()))
    x = torch.randn(32, 64)
    network(x)
    running = find(network).ranges["1:0"]
    first = running.span.clone()
    network(3 * x)
    assert (running.span > first).all()
    assert (running.span < 1.25 * first).all()  # a tenth of the way
    assert running.updates == 2


def test_rounding_follows_the_seed_and_changes_from_pass_to_pass():
    def gradient(network, seed):
        network.zero_grad()
        torch.manual_seed(seed)
        network(batch()).sum().backward()
        return network.blocks[0].mlp.fc2.weight.grad.clone()

    network, other = convert(vit()), convert(vit())
    first = gradient(network, 1)
    assert torch.equal(first, gradient(other, 1))
    assert not torch.equal(first, gradient(network, 1))  # another pass
    assert not torch.equal(first, gradient(convert(vit()), 2))
    torch.manual_seed(5)
    network(batch())
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))  # nothing was taken from the generator


def test_state_continues_a_training():
    straight, resumed = convert(vit()), convert(vit())
    for seed in (1, 2):
        train_step(straight, batch(seed=seed))
    state = copy.deepcopy(find(straight).state_dict())
    _, expected, _ = train_step(straight, batch(seed=3))
    find(resumed).load_state_dict(state)
    _, gradients, _ = train_step(resumed, batch(seed=3))
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_a_copy_has_its_own_state():
    network = convert(vit())
    train_step(network, batch())
    twin = copy.deepcopy(network)
    assert find(twin) is not find(network)
    before = {name: running.span.clone() for name, running in find(network).ranges.items()}
    train_step(twin, 5 * batch(seed=7))
    assert all(torch.equal(before[name], running.span) for name, running in find(network).ranges.items())
    assert any(not torch.equal(before[name], running.span) for name, running in find(twin).ranges.items())


def test_an_error_leaves_no_trace():
    network = convert(vit())
    with pytest.raises((RuntimeError, AssertionError)):
        network(torch.randn(1, 5, 64, 64))
    x = torch.randn(64, 64, requires_grad=True)
    exact = x.exp()
    assert exact.grad_fn._saved_result.data_ptr() == exact.data_ptr()
    _, gradients, _ = train_step(network, batch())
    _, expected, _ = train_step(convert(vit()), batch())
    assert cosines(gradients, expected)["head.weight"] > 0.99


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_keep_their_inputs_alone(reentrant):
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.checkpointed = nn.Linear(64, 64), False
            mlps = [nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in "ab"]
            self.blocks = nn.ModuleList(mlps)

        def forward(self, x):
            x = self.first(x)
            for block in self.blocks:
                x = x + (checkpoint(block, x, use_reentrant=reentrant) if self.checkpointed else block(x))
            return x.sum((0, 1))

    torch.manual_seed(0)
    plain, network = Blocks(), convert(Blocks())
    network.load_state_dict(plain.state_dict())
    x = torch.randn(4, 16, 64)
    _, exact, _ = train_step(plain, x)
    _, _, without = train_step(network, x)
    network.checkpointed = True
    passes = find(network).passes
    _, gradients, saved = train_step(network, x)
    assert find(network).passes == passes + 1
    assert saved.total < 0.6 * without.total
    assert min(cosines(gradients, exact).values()) > 0.999


def test_gradients_accumulate():
    together, apart = convert(vit()), convert(vit())
    sums = {}
    torch.manual_seed(0)
    for seed in (1, 2):
        together(batch(seed=seed)).sum().backward()
        apart.zero_grad()
        apart(batch(seed=seed)).sum().backward()
        sums = {name: sums.get(name, 0) + p.grad for name, p in apart.named_parameters()}
    for name, parameter in together.named_parameters():
        torch.testing.assert_close(parameter.grad, sums[name], rtol=1e-4, atol=1e-6)


def test_float16_with_a_gradient_scaler_trains_alike():
    losses = []
    for network in (vit(num_classes=4), convert(vit(num_classes=4))):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)  # overflows at first
        for _ in range(20):
            with autocast(torch.device("cpu"), torch.float16):
                loss = F.cross_entropy(network(batch(4)).float(), torch.arange(4))
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        losses.append(loss.item())
        assert 1 <= scaler.get_scale() < 2.0**20
    assert losses[1] == pytest.approx(losses[0], abs=0.02)
    assert losses[1] < 1.0
    assert all(running.span.isfinite().all() for running in find(network).ranges.values())


def test_changes_in_place_are_noticed():
    class Careless(nn.Module):
        def forward(self, x):
            y = x.exp()
            self.kept = y
            return y.sum()

    network = convert(nn.Sequential(nn.Linear(8, 8), Careless()))  # too small to be compressed
    loss = network(torch.randn(2, 8))
    with torch.no_grad():
        network[1].kept.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


def test_a_second_conversion_is_refused():
    network = convert(vit())
    with pytest.raises(ValueError, match="already"):
        convert(nn.Sequential(network))
    with pytest.raises(ValueError, match="num_groups is 0"):
        convert(vit(), num_groups=0)
