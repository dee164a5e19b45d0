import functools

import pytest
import torch
from comparison import DEVICE, DTYPES, check_kernels, counted_launches

from kernels.attention import attention, attention_reference

FORWARD = {"attention_fwd_kernel"}
KERNELS = FORWARD | {"attention_bwd_q_kernel", "attention_bwd_kv_kernel"}
BIAS_KERNELS = KERNELS | {"attention_bwd_bias_kernel"}


def inputs(batch=2, num_heads=2, q_length=5, k_length=7, head_dim=16, v_dim=None, bias=None, mask=None, seed=0):
    """Tensors by name; `bias` is (batch, heads) of the bias, `mask` (batch, heads, rows) of the mask."""
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator)
    return {
        "q": draw(batch, num_heads, q_length, head_dim),
        "k": draw(batch, num_heads, k_length, head_dim),
        "v": draw(batch, num_heads, k_length, v_dim or head_dim),
        "bias": None if bias is None else draw(*bias, q_length, k_length),
        "mask": None if mask is None else torch.rand(*mask, k_length, generator=generator) < 0.3,
    }


CASES = {
    "one_query_one_key": {"q_length": 1, "k_length": 1},
    "one_key_of_many_queries": {"q_length": 33, "k_length": 1, "bias": (1, 2)},
    "one_query": {"q_length": 1, "k_length": 63, "bias": (2, 1)},
    "odd_lengths": {"batch": 1, "q_length": 63, "k_length": 100, "head_dim": 20},
    "reduced_keys": {"batch": 1, "q_length": 100, "k_length": 25, "head_dim": 60, "v_dim": 36},
    "bias_of_heads": {"batch": 1, "q_length": 49, "k_length": 49, "head_dim": 32, "bias": (1, 2)},
    "bias_of_images_and_mask": {"q_length": 17, "k_length": 63, "head_dim": 20, "bias": (2, 1), "mask": (2, 1, 1)},
    "full_bias": {"batch": 1, "q_length": 40, "k_length": 33, "bias": (1, 2), "mask": (1, 2, 1)},
    "one_bias": {"batch": 3, "q_length": 35, "k_length": 20, "bias": (1, 1)},
    "mask_of_keys": {"num_heads": 1, "q_length": 34, "k_length": 70, "head_dim": 60, "mask": (2, 1, 1)},
    "mask_of_images": {"num_heads": 1, "q_length": 34, "k_length": 70, "head_dim": 20, "mask": (2, 1, 34)},
    "mask_of_heads_and_bias": {"q_length": 35, "k_length": 40, "mask": (1, 2, 35), "bias": (1, 2)},
    "full_mask_and_one_bias": {"q_length": 33, "k_length": 20, "mask": (2, 2, 33), "bias": (1, 1)},
    "one_key_masked": {"q_length": 33, "k_length": 1, "mask": (1, 1, 33)},
    "largest_heads": {"batch": 1, "num_heads": 1, "q_length": 33, "k_length": 40, "head_dim": 128, "v_dim": 100},
    "small_heads": {"q_length": 9, "k_length": 8, "head_dim": 3, "v_dim": 1},
}


@pytest.mark.usefixtures("kernels_required")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_reference(name, dtype):
    launches = BIAS_KERNELS if "bias" in CASES[name] else KERNELS
    # With one key the scores have no gradient: differences of sums of head_dim products remain.
    floor = 1e-5 if CASES[name]["k_length"] == 1 else 1e-6
    check_kernels(attention, attention_reference, inputs(**CASES[name]), dtype, launches=launches, floor=floor)


@pytest.mark.usefixtures("kernels_required")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [False, True], ids=["mask_of_keys", "mask_of_pairs"])
def test_views_of_a_packed_projection(rows, dtype):
    # (B, N, 3, H, d), the output of qkv; keys and values of another length are strided rows of it
    packed = torch.randn(2, 45, 3, 2, 20, generator=torch.Generator().manual_seed(3))
    bias = torch.randn(45, 2, 23, generator=torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(5)
    mask = torch.rand((46, 90, 2) if rows else (23, 2), generator=generator) < 0.3

    def attend(function, packed, bias, mask):
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        k, v = k[:, :, ::2], v[:, :, ::2].mT.contiguous().mT
        mask = mask[::2, ::2].permute(2, 1, 0)[:, None] if rows else mask.T[:, None, None]
        return function(q, k, v, bias.permute(1, 0, 2)[None], mask, 0.3).transpose(1, 2)

    kernel, reference = (functools.partial(attend, function) for function in (attention, attention_reference))
    check_kernels(kernel, reference, {"packed": packed, "bias": bias, "mask": mask}, dtype, launches=BIAS_KERNELS)


@pytest.mark.usefixtures("kernels_required")
def test_views_are_not_copied(monkeypatch):
    packed = torch.randn(2, 9, 3, 2, 16, device=DEVICE)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    monkeypatch.setattr(torch.Tensor, "contiguous", None)
    monkeypatch.setattr(torch.Tensor, "clone", None)
    output = attention(q, k, v)
    assert output.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("setting", "dtype"),
    [("triton", torch.float32), *(("reference", t) for t in (torch.float32, torch.float16, torch.bfloat16))],
    ids=str,
)
@pytest.mark.parametrize("bias", [None, (1, 2)], ids=str)
@pytest.mark.parametrize("hidden_by", ["mask of keys", "mask of pairs", "bias"])
def test_queries_without_a_key_get_zeros_and_give_no_gradient(
    hidden_by, bias, dtype, setting, kernels_required, monkeypatch
):
    monkeypatch.setenv("FRUGAL_KERNELS", setting)
    rows = 1 if hidden_by == "mask of keys" else 35
    tensors = inputs(q_length=35, k_length=40, bias=bias, mask=(2, 1, rows))
    hidden = tensors["mask"].to(DEVICE)
    hidden[1, :, -20:] = True  # the only row of a mask of keys
    hidden[..., 3] = True
    if hidden_by == "bias":
        tensors["bias"] = torch.zeros(2, 1, 35, 40).masked_fill(hidden.cpu(), -torch.inf)
        tensors["mask"] = None
    leaves = {
        name: t.to(DEVICE, dtype).requires_grad_() for name, t in tensors.items() if t is not None and name != "mask"
    }
    output = attention(**leaves, mask=None if hidden_by == "bias" else hidden)
    without_key = hidden.all(-1).expand(2, 2, 35)
    assert bool(without_key.any())
    assert torch.equal((output == 0).all(-1), without_key)
    gradients = torch.autograd.grad(output.float().square().sum() + output.sum(), list(leaves.values()))
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    dq, dk, dv = gradients[:3]
    assert torch.equal((dq == 0).all(-1), without_key)
    never_seen = hidden.all(-2).expand(2, 2, 40)
    assert bool(never_seen.any())
    for gradient in (dk, dv):
        assert torch.equal((gradient == 0).all(-1), never_seen)


@pytest.mark.usefixtures("kernels_required")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_bias_hides_keys(dtype):
    tensors = inputs(q_length=40, k_length=70, bias=(1, 2))
    tensors["bias"][0, :, 3] = -torch.inf  # a query without a key
    tensors["bias"][0, 0, 5:20, :35] = -torch.inf  # no visible key in the first tile
    check_kernels(attention, attention_reference, tensors, dtype, launches=BIAS_KERNELS)


@pytest.mark.usefixtures("kernels_required")
def test_bias_without_a_gradient():
    tensors = inputs(bias=(1, 2))
    check_kernels(attention, attention_reference, tensors, torch.float32, launches=KERNELS, no_grad=("bias",))


@pytest.mark.usefixtures("kernels_required")
@pytest.mark.parametrize("bias", [None, (1, 2)], ids=str)
def test_large_scores_do_not_overflow(bias):
    tensors = inputs(q_length=33, k_length=40, bias=bias)
    tensors["q" if bias is None else "bias"] *= 40
    scores = tensors["q"] @ tensors["k"].mT / 4 + (0 if bias is None else tensors["bias"])
    assert float(scores.max().exp()) == torch.inf
    check = functools.partial(check_kernels, attention, attention_reference, tensors, torch.float32)
    check(launches=FORWARD, no_grad=tuple(tensors))
    # Weights recomputed from a log-sum-exp of this size are off by its rounding.
    rounding = torch.finfo(torch.float32).eps * float(scores.abs().max())
    check(launches=KERNELS if bias is None else BIAS_KERNELS, floor=rounding)


@pytest.mark.usefixtures("kernels_required")
def test_bias_may_be_more_precise():
    tensors = {name: t.to(DEVICE) for name, t in inputs(bias=(1, 2)).items() if t is not None}
    bias = tensors.pop("bias").requires_grad_()
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    output = attention(**halves, bias=bias)
    expected = attention_reference(**{name: tensor.double() for name, tensor in halves.items()}, bias=bias.double())
    assert output.dtype == torch.float16
    torch.testing.assert_close(output.double(), expected, rtol=1e-3, atol=1e-3)
    (gradient,) = torch.autograd.grad(output.float().square().sum(), bias)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), bias)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, expected_gradient, rtol=5e-3, atol=5e-3)


@pytest.mark.usefixtures("kernels_required")
def test_expanded_output_gradient():
    tensors = {name: t.to(DEVICE).requires_grad_() for name, t in inputs().items() if t is not None}
    gradients = torch.autograd.grad(attention(**tensors).sum(), list(tensors.values()))
    expected = torch.autograd.grad(attention_reference(**tensors).sum(), list(tensors.values()))
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("setting", ["triton", "reference"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"batch": 0, "bias": (1, 2)},
        {"q_length": 0, "mask": (1, 1, 0)},
        {"k_length": 0},
        {"k_length": 0, "bias": (2, 2), "mask": (2, 1, 5)},
    ],
    ids=str,
)
def test_empty_tensors(sizes, setting, kernels_required, monkeypatch):
    monkeypatch.setenv("FRUGAL_KERNELS", setting)
    launches = FORWARD if "k_length" in sizes and setting == "triton" else set()
    check_kernels(attention, attention_reference, inputs(**sizes), torch.float32, launches=launches)


@pytest.mark.usefixtures("kernels_required")
def test_repeats_bit_by_bit():
    tensors = inputs(q_length=35, k_length=40, bias=(1, 1))
    tensors = [tensor.to(DEVICE).requires_grad_() for tensor in tensors.values() if tensor is not None]
    first, second = (torch.autograd.grad(attention(*tensors).square().sum(), tensors) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def operator_arguments(requires_grad):
    tensors = {name: t.to(DEVICE) for name, t in inputs(1, k_length=6, bias=(1, 2), mask=(1, 1, 5)).items()}
    for name in ("q", "k", "v", "bias"):
        tensors[name].requires_grad_(requires_grad)
    return (*tensors.values(), 0.25)


@pytest.mark.usefixtures("kernels_required")
def test_operators_are_well_defined():
    arguments = operator_arguments(requires_grad=True)
    torch.library.opcheck(torch.ops.frugal.attention, arguments)
    q, k, v = arguments[:3]
    torch.library.opcheck(torch.ops.frugal.attention, (q, k, v, None, None, 0.25))
    arguments = operator_arguments(requires_grad=False)
    output, lse = torch.ops.frugal.attention(*arguments)
    for bias_gradient in (True, False):
        backward = (torch.randn_like(output), *arguments, output, lse, bias_gradient)
        torch.library.opcheck(torch.ops.frugal.attention_backward, backward)


@pytest.mark.usefixtures("kernels_required")
def test_compiles_to_one_graph():
    *tensors, scale = operator_arguments(requires_grad=True)
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    leaves = tensors[:4]
    gradients = torch.autograd.grad(compiled(*tensors, scale).square().sum(), leaves)
    expected = torch.autograd.grad(attention(*tensors, scale).square().sum(), leaves)
    assert all(torch.equal(one, other) for one, other in zip(gradients, expected, strict=True))


def test_definition():
    """The reference, one query and one key at a time."""
    tensors = inputs(q_length=3, k_length=4, head_dim=5, v_dim=2, bias=(1, 2), mask=(1, 2, 3))
    q, k, v, bias, mask = (tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors.values())
    expected = torch.zeros(2, 2, 3, 2, dtype=torch.float64)
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(3)).tolist():
        seen = [j for j in range(4) if not mask[0, h, i, j]]
        weights = torch.stack([(0.7 * (q[b, h, i] * k[b, h, j]).sum() + bias[0, h, i, j]).exp() for j in seen])
        assert seen
        expected[b, h, i] = sum(w * v[b, h, j] for w, j in zip(weights / weights.sum(), seen, strict=True))
    output = attention_reference(q, k, v, bias, mask, 0.7)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", [attention, attention_reference])
@pytest.mark.parametrize("mask", [None, (2, 1, 1), (2, 1, 5)], ids=str)
@pytest.mark.parametrize("bias", [None, (1, 2), (2, 1)], ids=str)
def test_reference_gradients(function, bias, mask):
    tensors = {name: t for name, t in inputs(k_length=4, head_dim=3, bias=bias, mask=mask).items() if t is not None}
    if mask is not None:
        tensors["mask"][1, :, -1:] = True
    leaves = {name: t.double().requires_grad_() for name, t in tensors.items() if t.is_floating_point()}
    fixed = {name: t for name, t in tensors.items() if not t.is_floating_point()}
    call = lambda *values: function(**dict(zip(leaves, values, strict=True)), **fixed)  # noqa: E731
    assert torch.autograd.gradcheck(call, list(leaves.values()))


@pytest.mark.parametrize("change", [{"dtype": torch.float64}, {"head_dim": 130}, {"v_dim": 130}], ids=str)
def test_what_the_kernels_do_not_take_runs_in_pytorch(change, kernels_required):
    sizes = {name: size for name, size in change.items() if name != "dtype"}
    dtype = change.get("dtype", torch.float32)
    tensors = {name: t.to(DEVICE, dtype) for name, t in inputs(**sizes).items() if t is not None}
    with counted_launches() as counts:
        output = attention(**tensors)
    assert not counts
    torch.testing.assert_close(output, attention_reference(**tensors))


@pytest.mark.parametrize("bias", [None, (1, 2)], ids=str)
@pytest.mark.parametrize("mask", [None, (2, 1, 1), (1, 2, 5), (2, 2, 5)], ids=str)
def test_pytorch_path_equals_the_reference(bias, mask, monkeypatch):
    monkeypatch.setenv("FRUGAL_KERNELS", "reference")
    tensors = inputs(bias=bias, mask=mask)
    tensors = {name: t.double() if torch.is_tensor(t) and t.is_floating_point() else t for name, t in tensors.items()}
    torch.testing.assert_close(attention(**tensors), attention_reference(**tensors), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(attention(**tensors, scale=2.0), attention_reference(**tensors, scale=2.0))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": lambda q: q[0]}, ValueError, r"q has shape \(2, 5, 16\), expected \(B, H, Lq, d\)"),
        ({"v": lambda v: v[..., 0]}, ValueError, r"v has shape \(2, 2, 7\), expected \(B, H, Lk, dv\)"),
        ({"q": lambda q: q.long()}, TypeError, "q is torch.int64, expected one floating dtype"),
        ({"k": lambda k: k.half()}, TypeError, "k is torch.float16, expected one floating dtype for q, k and v"),
        ({"k": lambda k: k[..., :8]}, ValueError, r"k has shape \(2, 2, 7, 8\), expected \(2, 2, 7, 16\)"),
        ({"v": lambda v: v[:, :, :3]}, ValueError, r"v has shape \(2, 2, 3, 16\), expected \(2, 2, 7, 16\)"),
        ({"bias": lambda b: b[0]}, ValueError, r"bias has shape \(2, 5, 7\), expected \(1 or 2, 1 or 2, 5, 7\)"),
        ({"bias": lambda b: b[..., :1]}, ValueError, r"bias has shape \(1, 2, 5, 1\), expected"),
        ({"bias": lambda b: b > 0}, TypeError, "bias is torch.bool, expected a floating dtype"),
        ({"mask": lambda m: m[:, 0]}, ValueError, r"\(2, 5, 7\), expected \(1 or 2, 1 or 2, 1 or 5, 7\)"),
        ({"mask": lambda m: m[:, :, 1:]}, ValueError, r"mask has shape \(2, 1, 4, 7\), expected"),
        ({"mask": lambda m: m.float()}, TypeError, "mask is torch.float32, expected torch.bool"),
        ({"k": lambda k: k.to("meta")}, ValueError, "k is on meta, but q is on cpu"),
    ],
)
def test_bad_arguments(change, error, message):
    tensors = inputs(bias=(1, 2), mask=(2, 1, 5))
    tensors |= {name: edit(tensors[name]) for name, edit in change.items()}
    with pytest.raises(error, match=message):
        attention(**tensors)
