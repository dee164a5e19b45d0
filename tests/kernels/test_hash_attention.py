import json
from pathlib import Path

import pytest
import torch
from comparison import DEVICE, DTYPES, check_kernels, counted_launches
from safetensors.torch import load_file
from torch.nn.functional import linear

from kernels.hash_attention import (
    hash_attention,
    hash_attention_backward_op,
    hash_attention_op,
    hash_attention_quadratic,
    hash_attention_reference,
)

GOLDEN = Path(__file__).parent.parent / "goldens" / "ecoformer" / "attn_infer_b8_m5"
KERNELS = {
    "hash_attention_context_kernel",
    "hash_attention_forward_kernel",
    "hash_attention_backward_sums_kernel",
    "hash_attention_backward_kernel",
}


def inputs(batch=2, heads=3, num_tokens=7, bits=8, head_dim=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(num_tokens)
    codes = torch.randn(batch, heads, num_tokens, bits, generator=generator).sign()
    value = torch.randn(batch, heads, num_tokens, head_dim, generator=generator)
    return codes.to(dtype), value.to(dtype)


def by_loops(codes, value):
    """Apply the definition, one pair of tokens at a time."""
    output = torch.zeros_like(value)
    batch, heads, num_tokens, bits = codes.shape
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in (batch, heads, num_tokens))).tolist():
        numerator, denominator = (bits + 1) * value[b, h, i], 0.0
        for j in range(num_tokens):
            similarity = float(codes[b, h, i] @ codes[b, h, j])
            numerator = numerator + similarity * value[b, h, j]
            denominator += similarity + bits + 1
        output[b, h, i] = numerator / denominator
    return output


@pytest.mark.parametrize("form", [hash_attention, hash_attention_reference, hash_attention_quadratic])
def test_equals_the_definition(form):
    codes, value = inputs()
    codes[0, 0, 0, 0] = 0  # the sign of an exact zero
    torch.testing.assert_close(form(codes, value), by_loops(codes, value), rtol=1e-12, atol=1e-12)


def test_both_forms_have_the_same_gradients():
    leaves = [tensor.requires_grad_() for tensor in inputs()]
    upstream = torch.randn_like(leaves[1])
    linear_form = torch.autograd.grad(hash_attention_reference(*leaves), leaves, upstream)
    quadratic_form = torch.autograd.grad(hash_attention_quadratic(*leaves), leaves, upstream)
    torch.testing.assert_close(linear_form, quadratic_form, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", [hash_attention_reference, hash_attention_quadratic])
def test_gradients(form):
    assert torch.autograd.gradcheck(form, [tensor.requires_grad_() for tensor in inputs(1, 2, 4, 3, 2)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "heads", "num_tokens", "bits", "head_dim"),
    [
        (2, 3, 1, 16, 20),
        (1, 2, 63, 16, 60),
        (2, 1, 100, 5, 33),
        (1, 1, 64, 16, 64),
        (1, 2, 300, 16, 16),  # the sum over tokens is split
        (1, 1, 9, 64, 128),
        (1, 1, 3, 1, 1),
    ],
)
def test_kernels(kernels_required, dtype, batch, heads, num_tokens, bits, head_dim):
    codes, value = inputs(batch, heads, num_tokens, bits, head_dim)
    check_kernels(hash_attention, hash_attention_reference, {"codes": codes, "value": value}, dtype, launches=KERNELS)


@pytest.mark.parametrize(("batch", "num_tokens"), [(0, 7), (2, 0)])
def test_kernels_on_nothing(kernels_required, batch, num_tokens):
    codes, value = inputs(batch, num_tokens=num_tokens)
    tensors = {"codes": codes, "value": value}
    check_kernels(hash_attention, hash_attention_reference, tensors, torch.float32, launches=set())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_read_heads_in_place(kernels_required, dtype):
    codes, value = (tensor.transpose(1, 2).contiguous() for tensor in inputs(2, 3, 19, 16, 20))

    def split(function):
        return lambda codes, value: function(codes.transpose(1, 2), value.transpose(1, 2))

    tensors = {"codes": codes, "value": value}
    check_kernels(split(hash_attention), split(hash_attention_reference), tensors, dtype, launches=KERNELS)
    output = split(hash_attention)(codes.to(DEVICE, dtype), value.to(DEVICE, dtype))
    assert output.transpose(1, 2).is_contiguous()


def test_kernels_read_slices_and_expanded_gradients(kernels_required):
    codes, value = inputs(1, 2, 9, 8, 6)

    def every_second(function):
        return lambda codes, value: function(codes[..., ::2], value[..., ::2]).sum()

    tensors = {"codes": codes, "value": value}
    check_kernels(
        every_second(hash_attention), every_second(hash_attention_reference), tensors, torch.float32, launches=KERNELS
    )


def test_kernels_take_codes_of_another_dtype(kernels_required):
    codes, value = (tensor.to(DEVICE) for tensor in inputs(dtype=torch.float32))
    output = hash_attention(codes.half(), value)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, hash_attention_reference(codes, value))


def test_half_precision_does_not_overflow(kernels_required):
    # all tokens share a code: the context is 300 * 300
    codes = torch.ones(1, 1, 300, 4, device=DEVICE, dtype=torch.float16)
    value = torch.full((1, 1, 300, 4), 300.0, device=DEVICE, dtype=torch.float16)
    expected = (4 * 300 * 300 + 5 * 300) / (9 * 300)
    for form in (hash_attention, hash_attention_reference, hash_attention_quadratic):
        torch.testing.assert_close(form(codes, value), torch.full_like(value, expected))


def test_kernels_repeat_themselves(kernels_required):
    codes, value = (tensor.to(DEVICE, torch.float32) for tensor in inputs(num_tokens=300))
    assert torch.equal(hash_attention(codes, value), hash_attention(codes, value))


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float64, 8), (torch.float32, 65)])
def test_what_does_not_fit_takes_the_reference(kernels_required, dtype, bits):
    with counted_launches() as counts:
        hash_attention(*(tensor.to(DEVICE) for tensor in inputs(bits=bits, dtype=dtype)))
    assert not counts


@pytest.mark.parametrize("num_tokens", [5, 0])
def test_registration(kernels_required, num_tokens):
    codes, value = (
        tensor.to(DEVICE).requires_grad_() for tensor in inputs(2, 2, num_tokens, 4, 3, dtype=torch.float32)
    )
    torch.library.opcheck(hash_attention_op, (codes, value))
    output, context, total = (tensor.detach() for tensor in hash_attention_op(codes, value))
    arguments = (torch.randn_like(output), codes.detach(), value.detach(), context, total)
    torch.library.opcheck(hash_attention_backward_op, arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"codes": lambda c: c[0]}, ValueError, r"codes has shape \(3, 7, 8\), expected \(B, heads, N, bits\)"),
        ({"value": lambda v: v[..., :0]}, ValueError, r"value has shape \(2, 3, 7, 0\), expected \(B, heads, N, d\)"),
        ({"codes": lambda c: c[:, :, 1:]}, ValueError, r"\(2, 3, 6\), expected \(2, 3, 7\) as in value"),
        ({"codes": lambda c: c.to(torch.int8)}, TypeError, "codes is torch.int8, expected a floating point tensor"),
        ({"value": lambda v: v.to("meta")}, ValueError, "codes is on cpu, expected meta as value"),
    ],
)
def test_bad_arguments(change, error, message):
    codes, value = inputs()
    arguments = {"codes": codes, "value": value}
    arguments |= {name: edit(arguments[name]) for name, edit in change.items()}
    with pytest.raises(error, match=message):
        hash_attention(**arguments)


class Sign(torch.autograd.Function):
    """Sign with the straight-through gradient of EcoFormer."""

    @staticmethod
    def forward(ctx, scores):
        ctx.save_for_backward(scores)
        return scores.sign()

    @staticmethod
    def backward(ctx, grad):
        (scores,) = ctx.saved_tensors
        return grad * (scores.abs() < 1)


def ecoformer_layer(x, weights, heads):
    """EcoFormer's attention layer around the operation: kernelised hashing before it, a projection after it."""

    def project(name):
        projected = linear(x, weights[f"sd.{name}.weight"], weights[f"sd.{name}.bias"])
        return projected.unflatten(-1, (heads, -1)).transpose(1, 2)

    anchor, mvec, directions = (weights[f"sd.fast_attention.ksh.{name}"] for name in ("anchor", "mvec", "A"))
    unit = torch.nn.functional.normalize(project("to_qk"), dim=-1)
    distance = (unit[:, :, :, None] - anchor[:, :, None]).square().sum(-1)  # (B, heads, N, anchors)
    kernel = torch.exp(-distance / (2 * distance.mean((-2, -1), keepdim=True))) - mvec
    codes = Sign.apply(kernel @ directions.transpose(-2, -1))
    output = hash_attention(codes, project("to_v")).transpose(1, 2).flatten(2)
    return linear(output, weights["sd.proj.weight"], weights["sd.proj.bias"])


def golden():
    return json.loads(GOLDEN.with_suffix(".json").read_text()), load_file(GOLDEN.with_suffix(".safetensors"))


def test_golden_output():
    _, tensors = golden()
    output = hash_attention(tensors["codes_f64"].double(), tensors["v_f64"])
    torch.testing.assert_close(output, tensors["attn_out_f64"], rtol=1e-12, atol=1e-12)


def test_golden_layer():
    meta, tensors = golden()
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    trained = ["to_qk.weight", "to_v.weight", "proj.weight"]
    leaves = [weights["x"].requires_grad_(), *(weights[f"sd.{name}"].requires_grad_() for name in trained)]
    output = ecoformer_layer(weights["x"], weights, meta["num_heads"])
    torch.testing.assert_close(output, tensors["y_f64"], rtol=1e-9, atol=1e-9)
    names = ["grad_x_f64", *(f"grad_{name.replace('.', '_')}_f64" for name in trained)]
    for name, grad in zip(names, torch.autograd.grad(output, leaves, weights["grad_y"]), strict=True):
        torch.testing.assert_close(grad, tensors[name], rtol=1e-9, atol=1e-9, msg=name)


def test_golden_layer_with_kernels(kernels_required):
    meta, tensors = golden()
    tensors = {name: tensor.to(DEVICE) for name, tensor in tensors.items()}
    x = tensors["x"].requires_grad_()
    with counted_launches() as counts:
        output = ecoformer_layer(x, tensors, meta["num_heads"])
        (grad,) = torch.autograd.grad(output, x, tensors["grad_y"])
    assert set(counts) == KERNELS
    torch.testing.assert_close(output, tensors["y"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, tensors["grad_x"], rtol=1e-4, atol=1e-6)
