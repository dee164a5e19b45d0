"""Operations under torch.autocast: dtypes of what comes out and of gradients, on both paths."""

import pytest
import torch
from comparison import DEVICE, counted_launches

from kernels.attention import attention
from kernels.dispatch import cast_for_autocast
from kernels.hash_attention import hash_attention
from kernels.hilo import hilo
from kernels.ms_deform_attn import ms_deform_attn
from kernels.window_attention import window_attention

# Sums of bfloat16 are wrong in Triton's interpreter.
PATHS = [("reference", torch.bfloat16), ("reference", torch.float16), ("triton", torch.float16)]


def leaves(*shapes):
    """Random leaves in float32, float16, bfloat16, float32, ..."""
    generator = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    return [
        torch.randn(shape, generator=generator).to(DEVICE, dtypes[number % 3]).requires_grad_()
        for number, shape in enumerate(shapes)
    ]


def windows(q, k, v, bias):
    return window_attention(q, k, v, (2, 3), bias=bias)


def both_branches(hi_qkv, lo_q, lo_kv):
    return torch.cat(hilo(hi_qkv, lo_q, lo_kv, 2), -1)


SHAPES = {
    attention: ((2, 2, 5, 16), (2, 2, 7, 16), (2, 2, 7, 8), (1, 2, 5, 7)),
    windows: ((1, 4, 5, 2, 16), (1, 4, 5, 2, 16), (1, 4, 5, 2, 8), (2, 6, 6)),
    both_branches: ((1, 4, 6, 3, 2, 16), (1, 4, 6, 1, 16), (1, 2, 3, 2, 1, 16)),
    hash_attention: ((2, 2, 9, 8), (2, 2, 9, 16)),
}


@pytest.mark.parametrize(("path", "dtype"), PATHS, ids=str)
@pytest.mark.parametrize("op", SHAPES)
def test_mixed_dtypes_become_that_of_autocast(op, path, dtype, kernels_required, monkeypatch):
    monkeypatch.setenv("FRUGAL_KERNELS", path)
    tensors = leaves(*SHAPES[op])
    with torch.autocast(DEVICE, dtype), counted_launches() as counts:
        output = op(*tensors)
    assert bool(counts) == (path == "triton")
    assert output.dtype == dtype
    gradients = torch.autograd.grad(output.float().square().sum(), tensors)
    doubles = [tensor.detach().double().requires_grad_() for tensor in tensors]
    truth = op(*doubles)
    torch.testing.assert_close(output.double(), truth, rtol=0.02, atol=0.02)
    expected = torch.autograd.grad(truth.square().sum(), doubles)
    for tensor, gradient, true in zip(tensors, gradients, expected, strict=True):
        assert gradient.dtype == tensor.dtype
        torch.testing.assert_close(gradient.double(), true, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("path", ["reference", "triton"])
@pytest.mark.parametrize("op", SHAPES)
def test_autocast_compiles_to_one_graph(op, path, kernels_required, monkeypatch):
    monkeypatch.setenv("FRUGAL_KERNELS", path)
    torch.compiler.reset()

    def autocast_inside(*tensors):
        with torch.autocast(DEVICE, torch.float16):
            return op(*tensors)

    tensors = leaves(*SHAPES[op])
    expected = autocast_inside(*tensors)
    output = torch.compile(autocast_inside, backend="aot_eager", fullgraph=True)(*tensors)
    assert output.dtype == torch.float16
    torch.testing.assert_close(output, expected)
    gradients = torch.autograd.grad(output.float().sum(), tensors)
    assert [gradient.dtype for gradient in gradients] == [tensor.dtype for tensor in tensors]


def test_a_compiled_function_follows_autocast():
    torch.compiler.reset()
    tensors = [tensor.detach() for tensor in leaves(*SHAPES[hash_attention])]
    compiled = torch.compile(hash_attention, backend="aot_eager", fullgraph=True)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(DEVICE, dtype):
            output, expected = compiled(*tensors), hash_attention(*tensors)
        assert output.dtype == dtype
        torch.testing.assert_close(output, expected)
    assert compiled(*tensors).dtype == tensors[1].dtype


@pytest.mark.parametrize("op", SHAPES)
def test_float64_stays(op):
    tensors = [tensor.detach().double() for tensor in leaves(*SHAPES[op])]
    expected = op(*tensors)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(op(*tensors), expected)


@pytest.mark.parametrize("path", ["reference", "triton"])
def test_sums_of_hash_attention_do_not_overflow(path, kernels_required, monkeypatch):
    monkeypatch.setenv("FRUGAL_KERNELS", path)
    codes, value = torch.ones(1, 1, 64, 4, device=DEVICE), torch.full((1, 1, 64, 16), 3e4, device=DEVICE)
    with torch.autocast(DEVICE, torch.float16):
        output = hash_attention(codes, value)
    torch.testing.assert_close(output.float(), hash_attention(codes, value), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("path", "dtype"), PATHS, ids=str)
def test_deformable_attention_keeps_its_dtypes(path, dtype, kernels_required, monkeypatch):
    monkeypatch.setenv("FRUGAL_KERNELS", path)
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.rand(shape, generator=generator).to(DEVICE)  # noqa: E731
    tensors = [draw(1, 20, 2, 8).to(dtype), draw(1, 3, 2, 1, 2, 2), draw(1, 3, 2, 1, 2)]
    value, locations, weights = (tensor.requires_grad_() for tensor in tensors)

    def sampled():
        return ms_deform_attn(value, [(4, 5)], locations, weights)

    expected = sampled()
    with torch.autocast(DEVICE, dtype), counted_launches() as counts:
        output = sampled()
    assert bool(counts) == (path == "triton")
    assert output.dtype == dtype
    assert torch.equal(output, expected)
    gradients = torch.autograd.grad(output.float().square().sum(), tensors)
    assert [gradient.dtype for gradient in gradients] == [dtype, torch.float32, torch.float32]


def test_casting():
    floats = [torch.zeros(1, device=DEVICE, dtype=dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    others = [torch.zeros(1, device=DEVICE, dtype=dtype) for dtype in (torch.float64, torch.int64)]
    assert all(one is other for one, other in zip(cast_for_autocast(*floats), floats, strict=True))
    with torch.autocast(DEVICE, torch.bfloat16):
        assert {tensor.dtype for tensor in cast_for_autocast(*floats)} == {torch.bfloat16}
        assert cast_for_autocast(floats[2])[0] is floats[2]
        assert [tensor.dtype for tensor in cast_for_autocast(*others)] == [torch.float64, torch.int64]
        with torch.autocast(DEVICE, enabled=False):
            assert cast_for_autocast(floats[0])[0] is floats[0]
        meta = torch.zeros(1, device="meta")  # has no autocast
        assert cast_for_autocast(meta)[0] is meta
