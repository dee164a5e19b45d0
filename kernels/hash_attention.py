"""Attention on binary codes: similarity is the inner product of the codes, so its cost is linear in the tokens.

EcoFormer (arXiv 2209.09004), with the normaliser of the official implementation. The Triton kernels
are in `kernels/hash_attention_triton.py`, which is imported when they run.
"""

import torch
from torch import Tensor

from kernels.dispatch import cast_for_autocast, choose_path, without_autocast

MAX_BITS, MAX_HEAD_DIM = 64, 128  # a tile of the kernels holds them whole


def hash_attention(codes: Tensor, value: Tensor) -> Tensor:
    """Attend over `value` with the codes of shared queries and keys; time and memory are linear in the tokens N.

    `codes` is (B, heads, N, bits), entries -1, 0 or 1 in a floating point type; `value` is (B, heads, N, d). With the
    shift c = bits + 1, which makes every similarity h_i h_j + c positive, output i is
    (sum_j (h_i h_j) v_j + c v_i) / (sum_j (h_i h_j) + N c), shape (B, heads, N, d) in the dtype of `value`, with the
    heads next to each other in memory: `transpose(1, 2).flatten(2)` copies nothing when the kernels ran. As in the
    official code, which published weights need, the shift meets only the token's own value in the numerator, so rows of
    weights do not add up to 1. Half precision is computed in float32; under autocast both tensors are cast
    to its dtype first. Gradients are those for real-valued codes: a straight-through sign before this operation passes
    them on.
    Runs in Triton up to 64 bits and head dimension 128; larger ones and float64 take PyTorch.
    Raises `ValueError` when shapes or devices do not fit and `TypeError` when a tensor is not floating point.
    """
    codes, value = cast_for_autocast(codes, value)
    _check_arguments(codes, value)
    fits = codes.shape[-1] <= MAX_BITS and value.shape[-1] <= MAX_HEAD_DIM
    fits = fits and torch.float64 not in (codes.dtype, value.dtype)
    if fits and choose_path("hash_attention", value, has_triton=True) == "triton":
        output: Tensor = hash_attention_op(codes, value)[0]
        return output
    return hash_attention_reference(codes, value)


def _check_arguments(codes: Tensor, value: Tensor) -> None:
    for name, tensor in {"codes": codes, "value": value}.items():
        if not tensor.is_floating_point():
            raise TypeError(f"hash_attention: {name} is {tensor.dtype}, expected a floating point tensor")
        if tensor.ndim != 4 or tensor.shape[-1] == 0:
            expected = "(B, heads, N, bits)" if name == "codes" else "(B, heads, N, d)"
            raise ValueError(f"hash_attention: {name} has shape {tuple(tensor.shape)}, expected {expected}")
    if codes.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"hash_attention: codes is for (batch, heads, tokens) = {tuple(codes.shape[:3])}, "
            f"expected {tuple(value.shape[:3])} as in value"
        )
    if codes.device != value.device:
        raise ValueError(f"hash_attention: codes is on {codes.device}, expected {value.device} as value")


def hash_attention_reference(codes: Tensor, value: Tensor) -> Tensor:
    """Compute `hash_attention` in its linear form: first all values by code, then every token reads them."""
    h, v = _at_least_float32(codes), _at_least_float32(value)
    shift, num_tokens = codes.shape[-1] + 1, codes.shape[-2]
    with without_autocast(value):  # sums over all tokens would overflow float16
        context = h.transpose(-2, -1) @ v  # (B, heads, bits, d)
        total = h.sum(-2, keepdim=True)  # (B, heads, 1, bits)
        denominator = (h * total).sum(-1, keepdim=True) + num_tokens * shift
        return ((h @ context + shift * v) / denominator).to(value.dtype)


def hash_attention_quadratic(codes: Tensor, value: Tensor) -> Tensor:
    """Compute `hash_attention` in its quadratic form, from the similarities of all pairs of tokens."""
    h, v = _at_least_float32(codes), _at_least_float32(value)
    shift = codes.shape[-1] + 1
    similarity = h @ h.transpose(-2, -1)  # (B, heads, N, N)
    denominator = (similarity + shift).sum(-1, keepdim=True)
    return ((similarity @ v + shift * v) / denominator).to(value.dtype)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@torch.library.custom_op("frugal::hash_attention", mutates_args=())
def hash_attention_op(codes: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernels: output, and for backward the context (B, heads, bits, d) and the sum of codes in float32."""
    from kernels.hash_attention_triton import forward

    return forward(codes, value)


@hash_attention_op.register_fake
def _(codes: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, num_tokens, bits = codes.shape
    head_dim = value.shape[-1]
    output = value.new_empty(batch, num_tokens, heads, head_dim).transpose(1, 2)
    context = value.new_empty(batch, heads, bits, head_dim, dtype=torch.float32)
    return output, context, value.new_empty(batch, heads, bits, dtype=torch.float32)


@torch.library.custom_op("frugal::hash_attention_backward", mutates_args=())
def hash_attention_backward_op(
    grad: Tensor, codes: Tensor, value: Tensor, context: Tensor, total: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the kernels: the gradients of codes and value."""
    from kernels.hash_attention_triton import backward

    return backward(grad, codes, value, context, total)


@hash_attention_backward_op.register_fake
def _(grad: Tensor, codes: Tensor, value: Tensor, context: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(codes), torch.empty_like(value)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    codes, value = inputs
    _, context, total = output
    ctx.save_for_backward(codes, value, context, total)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    # context and total are for this backward only, nothing else reads them
    codes, value, context, total = ctx.saved_tensors  # type: ignore[attr-defined]
    return hash_attention_backward_op(grad, codes, value, context, total)


hash_attention_op.register_autograd(_backward, setup_context=_setup_context)
