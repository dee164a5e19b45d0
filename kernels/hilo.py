"""HiLo attention: some heads attend within windows of a map, the others to the map averaged over such windows.

"Fast Vision Transformers with HiLo Attention" (arXiv 2205.13213), section 3.2. The kernels are those of
`kernels.window_attention` and `kernels.attention`, run as one operation whose gradients go straight into packed
projections. Both branches project the same map; on a CPU one joint projection was not measurably faster than two, so
the operation begins after them.
"""

import torch
from torch import Tensor

from kernels.attention import MAX_HEAD_DIM, attention, attention_reference
from kernels.dispatch import KERNEL_DTYPES, cast_for_autocast, choose_path
from kernels.window_attention import Geometry, empty_lse, window_attention, window_attention_reference


def hilo(hi_qkv: Tensor, lo_q: Tensor, lo_kv: Tensor, window: int, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Attend at high frequencies within windows and at low ones to a pooled map.

    `hi_qkv` is (B, H, W, 3, h, d): queries, keys and values of the h Hi-Fi heads, which attend within windows of
    `window` x `window` tokens; it divides H and W. `lo_q` is (B, H, W, l, d): queries of the l Lo-Fi heads, which
    attend to all of `lo_kv` (B, H', W', 2, l, d), keys and values of the pooled map. One floating dtype, any strides.
    `scale` defaults to d ** -0.5. Returns the outputs, (B, H, W, h * d) and (B, H, W, l * d), before their projections.

    The kernels take what those of `kernels.attention.attention` take. Raises `ValueError` for shapes or devices that do
    not fit and `TypeError` for dtypes.
    """
    hi_qkv, lo_q, lo_kv = cast_for_autocast(hi_qkv, lo_q, lo_kv)
    _check_arguments(hi_qkv, lo_q, lo_kv, window)
    scale = hi_qkv.shape[-1] ** -0.5 if scale is None else float(scale)
    fits = hi_qkv.dtype in KERNEL_DTYPES and hi_qkv.shape[-1] <= MAX_HEAD_DIM
    if fits and choose_path("hilo", hi_qkv, has_triton=True) == "triton":
        hi, lo, _, _ = torch.ops.frugal.hilo(hi_qkv, lo_q, lo_kv, window, scale)
        return hi.flatten(3), lo.flatten(3)
    q, k, v = hi_qkv.unbind(3)
    return window_attention(q, k, v, (window, window), scale=scale).flatten(3), lo_fi(lo_q, lo_kv, scale)


def lo_fi(lo_q: Tensor, lo_kv: Tensor, scale: float | None = None) -> Tensor:
    """Attend from every token of a map to all of the pooled one, as the Lo-Fi heads of `hilo` do."""
    return _as_map(attention(*_lo_heads(lo_q, lo_kv), scale=scale), lo_q)


def _check_arguments(hi_qkv: Tensor, lo_q: Tensor, lo_kv: Tensor, window: int) -> None:
    for name, tensor, layout in (
        ("hi_qkv", hi_qkv, "(B, H, W, 3, h, d)"),
        ("lo_q", lo_q, "(B, H, W, l, d)"),
        ("lo_kv", lo_kv, "(B, H', W', 2, l, d)"),
    ):
        if tensor.ndim != layout.count(",") + 1:
            raise ValueError(f"hilo: {name} has shape {tuple(tensor.shape)}, expected {layout}")
        if not tensor.is_floating_point() or tensor.dtype != hi_qkv.dtype:
            raise TypeError(f"hilo: {name} is {tensor.dtype}, expected one floating dtype for hi_qkv, lo_q and lo_kv")
        if tensor.device != hi_qkv.device:
            raise ValueError(f"hilo: {name} is on {tensor.device}, but hi_qkv is on {hi_qkv.device}")
    batch, height, width, three, _, dim = hi_qkv.shape
    if three != 3 or window < 1 or height % window or width % window:
        shape = tuple(hi_qkv.shape)
        raise ValueError(f"hilo: hi_qkv has shape {shape}, expected 3 projections of a map that {window=} divides")
    if lo_q.shape[:3] != hi_qkv.shape[:3] or lo_q.shape[4] != dim:
        expected = (batch, height, width, lo_q.shape[3], dim)
        raise ValueError(f"hilo: lo_q has shape {tuple(lo_q.shape)}, expected {expected} to go with hi_qkv")
    if (lo_kv.shape[0], *lo_kv.shape[3:]) != (batch, 2, *lo_q.shape[3:]):
        expected = (batch, *lo_kv.shape[1:3], 2, *lo_q.shape[3:])
        raise ValueError(f"hilo: lo_kv has shape {tuple(lo_kv.shape)}, expected {expected} to go with lo_q")


def hilo_reference(
    hi_qkv: Tensor, lo_q: Tensor, lo_kv: Tensor, window: int, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Compute `hilo` as it is written; differentiable in its three tensors."""
    q, k, v = hi_qkv.unbind(3)
    hi = window_attention_reference(q, k, v, (window, window), scale=scale)
    return hi.flatten(3), _as_map(attention_reference(*_lo_heads(lo_q, lo_kv), scale=scale), lo_q)


def _lo_heads(lo_q: Tensor, lo_kv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views q (B, l, H * W, d), k and v (B, l, H' * W', d)."""
    k, v = lo_kv.flatten(1, 2).unbind(2)
    return lo_q.flatten(1, 2).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _as_map(heads: Tensor, lo_q: Tensor) -> Tensor:
    """(B, l, H * W, d) to (B, H, W, l * d)."""
    return heads.transpose(1, 2).reshape(lo_q.shape).flatten(3)


def _hi_maps(hi_qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views q, k and v, each (B, 1, H, W, h, d)."""
    q, k, v = hi_qkv.unsqueeze(1).unbind(4)
    return q, k, v


def _geometry(hi_qkv: Tensor, window: int) -> Geometry:
    _, height, width = hi_qkv.shape[:3]
    grid, side = (1, height, width), (1, window, window)
    return Geometry(grid, grid, side, side, shift=(0, 0, 0), mask_padding=True)


def _empty_outputs(hi_qkv: Tensor, lo_q: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, height, width, _, _, dim = hi_qkv.shape
    hi = hi_qkv.new_empty(batch, height, width, hi_qkv.shape[4], dim)
    lo = lo_q.new_empty(lo_q.shape)
    lo_lse = lo_q.new_empty(batch, lo_q.shape[3], height * width, dtype=torch.float32)
    return hi, lo, empty_lse(_hi_maps(hi_qkv)[0], _geometry(hi_qkv, window)), lo_lse


@torch.library.custom_op("frugal::hilo", mutates_args=())
def _hilo_op(
    hi_qkv: Tensor, lo_q: Tensor, lo_kv: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return both outputs, (B, H, W, heads, d), and, for the backward pass only, the log-sum-exps of both."""
    from kernels import attention_triton, window_attention_triton

    hi, lo, hi_lse, lo_lse = outputs = _empty_outputs(hi_qkv, lo_q, window)
    geometry = _geometry(hi_qkv, window)
    q, k, v = _hi_maps(hi_qkv)
    window_attention_triton.launch_forward(q, k, v, None, geometry, scale, hi.unsqueeze(1), hi_lse)
    attention_triton.launch_forward(
        *_lo_heads(lo_q, lo_kv), None, None, scale, lo.flatten(1, 2).transpose(1, 2), lo_lse
    )
    return outputs


@_hilo_op.register_fake
def _hilo_fake(
    hi_qkv: Tensor, lo_q: Tensor, lo_kv: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_outputs(hi_qkv, lo_q, window)


@torch.library.custom_op("frugal::hilo_backward", mutates_args=())
def _hilo_backward_op(
    dhi: Tensor,
    dlo: Tensor,
    hi_qkv: Tensor,
    lo_q: Tensor,
    lo_kv: Tensor,
    window: int,
    scale: float,
    hi: Tensor,
    lo: Tensor,
    hi_lse: Tensor,
    lo_lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `hi_qkv`, `lo_q` and `lo_kv`, contiguous."""
    from kernels import attention_triton, window_attention_triton

    gradients = dhi_qkv, dlo_q, dlo_kv = _empty_gradients(hi_qkv, lo_q, lo_kv)
    no_bias = hi_qkv.new_empty(0)
    q, k, v = _hi_maps(hi_qkv)
    window_attention_triton.launch_backward(
        dhi.unsqueeze(1),
        q,
        k,
        v,
        None,
        _geometry(hi_qkv, window),
        scale,
        hi.unsqueeze(1),
        hi_lse,
        *_hi_maps(dhi_qkv),
        no_bias,
    )
    q, k, v = _lo_heads(lo_q, lo_kv)
    dlo, lo = (x.flatten(1, 2).transpose(1, 2) for x in (dlo, lo))
    attention_triton.launch_backward(dlo, q, k, v, None, None, scale, lo, lo_lse, *_lo_heads(dlo_q, dlo_kv), no_bias)
    return gradients


@_hilo_backward_op.register_fake
def _hilo_backward_fake(
    dhi: Tensor,
    dlo: Tensor,
    hi_qkv: Tensor,
    lo_q: Tensor,
    lo_kv: Tensor,
    window: int,
    scale: float,
    hi: Tensor,
    lo: Tensor,
    hi_lse: Tensor,
    lo_lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(hi_qkv, lo_q, lo_kv)


def _empty_gradients(hi_qkv: Tensor, lo_q: Tensor, lo_kv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return hi_qkv.new_empty(hi_qkv.shape), lo_q.new_empty(lo_q.shape), lo_kv.new_empty(lo_kv.shape)


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    *tensors, ctx.window, ctx.scale = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx, dhi, dlo, dhi_lse, dlo_lse):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    hi_qkv, lo_q, lo_kv, *outputs = ctx.saved_tensors
    gradients = torch.ops.frugal.hilo_backward(dhi, dlo, hi_qkv, lo_q, lo_kv, ctx.window, ctx.scale, *outputs)
    return *gradients, None, None


_hilo_op.register_autograd(_differentiate, setup_context=_save_for_backward)
