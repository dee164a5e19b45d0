"""Attention with an additive bias and a mask: softmax(q kᵀ · scale + bias) v.

"Attention Is All You Need" (arXiv 1706.03762), equation 1. The kernels, in `kernels/attention_triton.py`, follow
FlashAttention-2 (arXiv 2307.08691): the scores never reach memory, only their log-sum-exp per query. Every gradient,
that of the bias included, is summed in a fixed order.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import KERNEL_DTYPES, cast_for_autocast, choose_path

MAX_HEAD_DIM = 128


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attend from every query to every key that it may see.

    `q` is (B, H, Lq, d), `k` (B, H, Lk, d) and `v` (B, H, Lk, dv), of one floating dtype and with any strides: views of
    a packed projection are not copied. `bias` is (1 or B, 1 or H, Lq, Lk) in any floating dtype, -inf where a query may
    not see a key. `mask` is (1 or B, 1 or H, 1 or Lq, Lk) bool, True where a key is not seen; of key padding (B, Lk) it
    is `padding[:, None, None]`. `scale` defaults to d ** -0.5.
    Returns (B, H, Lq, dv) in the dtype of `q`, laid out so that `transpose(1, 2).flatten(2)` is free after the kernels.
    A query that sees no key gets zeros, and gives no gradient. The kernels are not twice differentiable. Under autocast
    `q`, `k` and `v` are cast to its dtype first.

    The kernels take float32, float16 and bfloat16 and d and dv up to 128; everything else runs in PyTorch, even when
    `FRUGAL_KERNELS=triton`. Raises `ValueError` for shapes or devices that do not fit and `TypeError` for dtypes.
    """
    q, k, v = cast_for_autocast(q, k, v)
    _check_arguments(q, k, v, bias, mask)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    fits = q.dtype in KERNEL_DTYPES and max(q.shape[-1], v.shape[-1]) <= MAX_HEAD_DIM
    if fits and choose_path("attention", q, has_triton=True) == "triton":
        output: Tensor = torch.ops.frugal.attention(q, k, v, bias, mask, scale)[0]
        return output
    # PyTorch's own drops the bias from the graph of empty tensors, and away from the CPU its backends disagree about
    # queries without a key, which a mask alone lets us find beforehand.
    empty = q.numel() == 0 or k.numel() == 0
    if not empty and (mask is None or bias is None or q.device.type == "cpu"):
        return _attention_sdpa(q, k, v, bias, mask, scale)
    return attention_reference(q, k, v, bias, mask, scale)


def _check_arguments(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None) -> None:
    for name, tensor, layout in (("q", q, "(B, H, Lq, d)"), ("k", k, "(B, H, Lk, d)"), ("v", v, "(B, H, Lk, dv)")):
        if tensor.ndim != 4:
            raise ValueError(f"attention: {name} has shape {tuple(tensor.shape)}, expected {layout}")
        if not tensor.is_floating_point() or tensor.dtype != q.dtype:
            raise TypeError(f"attention: {name} is {tensor.dtype}, expected one floating dtype for q, k and v")
    batch, num_heads, q_length, head_dim = q.shape
    if k.shape[:2] != q.shape[:2] or k.shape[3] != head_dim:
        expected = (batch, num_heads, k.shape[2], head_dim)
        raise ValueError(f"attention: k has shape {tuple(k.shape)}, expected {expected} to go with q")
    if v.shape[:3] != k.shape[:3]:
        expected = (*k.shape[:3], v.shape[3])
        raise ValueError(f"attention: v has shape {tuple(v.shape)}, expected {expected} to go with k")
    if bias is not None:
        if not bias.is_floating_point():
            raise TypeError(f"attention: bias is {bias.dtype}, expected a floating dtype")
        _check_scores_shape("bias", bias, ((1, batch), (1, num_heads), (q_length,), (k.shape[2],)))
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"attention: mask is {mask.dtype}, expected torch.bool")
        _check_scores_shape("mask", mask, ((1, batch), (1, num_heads), (1, q_length), (k.shape[2],)))
    for name, other in (("k", k), ("v", v), ("bias", bias), ("mask", mask)):
        if other is not None and other.device != q.device:
            raise ValueError(f"attention: {name} is on {other.device}, but q is on {q.device}")


def _check_scores_shape(name: str, tensor: Tensor, sizes: tuple[tuple[int, ...], ...]) -> None:
    """Raise `ValueError` unless every size of `tensor` is among the `sizes` of its dimension."""
    if tensor.ndim != 4 or any(size not in allowed for size, allowed in zip(tensor.shape, sizes, strict=True)):
        expected = ", ".join(" or ".join(map(str, allowed)) for allowed in sizes)
        raise ValueError(f"attention: {name} has shape {tuple(tensor.shape)}, expected ({expected})")


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute `attention` as it is written; differentiable in `q`, `k`, `v` and `bias`."""
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)  # (B, H, Lq, Lk)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(mask, -torch.inf)
    without_key = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(without_key, 0).softmax(-1).masked_fill(without_key, 0)
    return weights.to(v.dtype) @ v


def _attention_sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float) -> Tensor:
    """Compute `attention` with PyTorch's own."""
    if bias is None and mask is not None:
        without_key = mask.all(-1, keepdim=True)
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=~mask | without_key, scale=scale)
        return output.masked_fill(without_key, 0)
    added = None if bias is None else bias.to(q.dtype)
    if added is not None and mask is not None:
        added = added.masked_fill(mask, -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=scale)


def _empty_heads_inside(like: Tensor, batch: int, num_heads: int, length: int, dim: int) -> Tensor:
    """Return an empty (B, H, L, d) whose memory is (B, L, H, d), the layout of projections."""
    return like.new_empty(batch, length, num_heads, dim).transpose(1, 2)


def _empty_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, num_heads, q_length, _ = q.shape
    lse = q.new_empty(batch, num_heads, q_length, dtype=torch.float32)
    return _empty_heads_inside(q, batch, num_heads, q_length, v.shape[3]), lse


def _empty_gradients(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, bias_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (_empty_heads_inside(tensor, *tensor.shape) for tensor in (q, k, v))
    if bias is None or not bias_gradient:
        return dq, dk, dv, q.new_empty(0)
    return dq, dk, dv, bias.new_empty(bias.shape)


@torch.library.custom_op("frugal::attention", mutates_args=())
def _attention_op(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output and, for the backward pass only, the log-sum-exp of the scores, (B, H, Lq) float32."""
    from kernels.attention_triton import launch_forward

    output, lse = _empty_outputs(q, v)
    launch_forward(q, k, v, bias, mask, scale, output, lse)
    return output, lse


@_attention_op.register_fake
def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return _empty_outputs(q, v)


@torch.library.custom_op("frugal::attention_backward", mutates_args=())
def _attention_backward_op(
    doutput: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    output: Tensor,
    lse: Tensor,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and bias, the last one empty unless `bias_gradient`."""
    from kernels.attention_triton import launch_backward

    gradients = _empty_gradients(q, k, v, bias, bias_gradient)
    launch_backward(doutput, q, k, v, bias, mask, scale, output, lse, *gradients)
    return gradients


@_attention_backward_op.register_fake
def _attention_backward_fake(
    doutput: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    output: Tensor,
    lse: Tensor,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_gradients(q, k, v, bias, bias_gradient)


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    q, k, v, bias, mask, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, bias, mask, *output)


def _differentiate(ctx, doutput, dlse):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    q, k, v, bias, mask, output, lse = ctx.saved_tensors
    bias_gradient = ctx.needs_input_grad[3]
    dq, dk, dv, dbias = torch.ops.frugal.attention_backward(
        doutput, q, k, v, bias, mask, ctx.scale, output, lse, bias_gradient
    )
    return dq, dk, dv, dbias if bias_gradient else None, None, None


_attention_op.register_autograd(_differentiate, setup_context=_save_for_backward)
