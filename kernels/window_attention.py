"""Attention within the windows of a map or a clip, with an optional bias, shift and reduced keys.

Windows as in Swin (arXiv 2103.14030), section 3.2, the Hi-Fi heads of LITv2 (arXiv 2205.13213), section 3.2, and, along
time as well, Video Swin (arXiv 2106.13230). The kernels, in `kernels/window_attention_triton.py`, decode the positions
of tokens themselves: no window is copied out of a map.
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import MAX_HEAD_DIM, attention_reference
from kernels.dispatch import KERNEL_DTYPES, cast_for_autocast, choose_path

Axes = tuple[int, int, int]


class Geometry(NamedTuple):
    """How maps are cut into windows, each time along (t, h, w); maps of images have one frame."""

    grid: Axes
    kv_grid: Axes
    window: Axes
    kv_window: Axes
    shift: Axes
    mask_padding: bool

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, window: Sequence[int], kv_window: Sequence[int], shift: Sequence[int], mask: bool
    ) -> "Geometry":
        """Return the geometry of maps `q` and `k`; sizes of two axes are those of an image."""
        return cls(
            _axes(q.shape[1:-2], 1),
            _axes(k.shape[1:-2], 1),
            _axes(window, 1),
            _axes(kv_window, 1),
            _axes(shift, 0),
            mask,
        )

    @property
    def windows(self) -> Axes:
        """Number of windows along each axis."""
        return _count(self.grid, self.window)


def _axes(sizes: Sequence[int], of_image: int) -> Axes:
    t, h, w = sizes if len(sizes) == 3 else (of_image, *sizes)
    return t, h, w


def _count(grid: Axes, window: Axes) -> Axes:
    t, h, w = (-(-size // side) for size, side in zip(grid, window, strict=True))
    return t, h, w


def _divides(window: Axes, grid: Axes) -> bool:
    return not any(size % side for size, side in zip(grid, window, strict=True))


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Sequence[int],
    kv_window: Sequence[int] | None = None,
    bias: Tensor | None = None,
    shift: Sequence[int] | None = None,
    mask_padding: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Attend from every token of a map to the tokens of its window.

    `q` is (B, H, W, heads, d) or (B, T, H, W, heads, d); `k` (B, *kv_grid, heads, d) and `v` (B, *kv_grid, heads, dv)
    are on the same or a reduced grid. One floating dtype, any strides: views of a packed projection are not copied.
    Returns a map like `q` with dv channels per head, laid out so that `flatten(-2)` is free. `scale` defaults to
    d ** -0.5. Under autocast `q`, `k` and `v` are cast to its dtype first. The kernels are not twice differentiable.

    `window` is the tokens per window and axis, (h, w) or (t, h, w), `kv_window` the same of the keys (default: the same
    window). Windows begin at the first token; both grids must have equally many. Where they end behind a map, the
    missing keys do not exist, or, unless `mask_padding`, are zero keys with zero values.

    `bias` is (1 or heads, window tokens, kv_window tokens) in any floating dtype, shared by all windows. With `shift`
    (per axis, below the window) the map is rolled by -shift before it is cut, and back afterwards; tokens that came
    around an edge and tokens that did not are hidden from each other. That needs windows that divide the grid and keys
    on the same one.

    The kernels take what those of `kernels.attention.attention` take. Raises `ValueError` for sizes or devices that do
    not fit and `TypeError` for dtypes.
    """
    q, k, v = cast_for_autocast(q, k, v)
    geometry = _check_arguments(q, k, v, window, kv_window, bias, shift, mask_padding)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    fits = q.dtype in KERNEL_DTYPES and max(q.shape[-1], v.shape[-1]) <= MAX_HEAD_DIM
    if fits and choose_path("window_attention", q, has_triton=True) == "triton":
        sizes = [*geometry.window, *geometry.kv_window, *geometry.shift]
        output: Tensor = torch.ops.frugal.window_attention(q, k, v, bias, sizes, mask_padding, scale)[0]
        return output
    # Faster without gradients; elsewhere than on the CPU the backends disagree about queries without a key.
    if bias is not None and q.device.type == "cpu" and not torch.is_grad_enabled():
        return _attention_sdpa(q, k, v, geometry, bias, scale)
    return _attention_products(q, k, v, geometry, bias, scale)


def _check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Sequence[int],
    kv_window: Sequence[int] | None,
    bias: Tensor | None,
    shift: Sequence[int] | None,
    mask_padding: bool,
) -> Geometry:
    axes = len(window)
    kv_window, shift = kv_window or window, shift or (0,) * axes
    if axes not in (2, 3):
        raise ValueError(f"window_attention: window is {tuple(window)}, expected (h, w) or (t, h, w)")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != axes + 3:
            layout = "(B, H, W, heads, d)" if axes == 2 else "(B, T, H, W, heads, d)"
            raise ValueError(f"window_attention: {name} has shape {tuple(tensor.shape)}, expected {layout}")
        if not tensor.is_floating_point() or tensor.dtype != q.dtype:
            raise TypeError(f"window_attention: {name} is {tensor.dtype}, expected one floating dtype for q, k and v")
    batch, num_heads, head_dim = q.shape[0], *q.shape[-2:]
    if k.shape[0] != batch or k.shape[-2:] != q.shape[-2:]:
        expected = (batch, *k.shape[1:-2], num_heads, head_dim)
        raise ValueError(f"window_attention: k has shape {tuple(k.shape)}, expected {expected} to go with q")
    if v.shape[:-1] != k.shape[:-1]:
        expected = (*k.shape[:-1], v.shape[-1])
        raise ValueError(f"window_attention: v has shape {tuple(v.shape)}, expected {expected} to go with k")
    for name, sizes in (("kv_window", kv_window), ("shift", shift)):
        if len(sizes) != axes:
            raise ValueError(f"window_attention: {name} is {tuple(sizes)}, expected {axes} numbers like window")
    geometry = Geometry.of(q, k, window, kv_window, shift, mask_padding)
    _check_windows(geometry)
    if bias is not None:
        if not bias.is_floating_point():
            raise TypeError(f"window_attention: bias is {bias.dtype}, expected a floating dtype")
        queries, keys = prod(window), prod(kv_window)
        if bias.ndim != 3 or bias.shape[0] not in (1, num_heads) or bias.shape[1:] != (queries, keys):
            allowed = f"(1 or {num_heads}, {queries}, {keys})"
            raise ValueError(f"window_attention: bias has shape {tuple(bias.shape)}, expected {allowed}")
    for name, other in (("k", k), ("v", v), ("bias", bias)):
        if other is not None and other.device != q.device:
            raise ValueError(f"window_attention: {name} is on {other.device}, but q is on {q.device}")
    return geometry


def _check_windows(geometry: Geometry) -> None:
    grid, kv_grid, window, kv_window, shift, _ = geometry
    if min(*window, *kv_window) < 1:
        raise ValueError(f"window_attention: windows {window} and {kv_window}, expected at least one token per axis")
    windows, kv_windows = geometry.windows, _count(kv_grid, kv_window)
    if windows != kv_windows:
        raise ValueError(
            f"window_attention: k has {kv_windows} windows {kv_window} on {kv_grid}, expected {windows} to go with q, "
            f"that is windows {window} on {grid} (t, h, w)"
        )
    if any(shift):
        if any(not 0 <= step < side for step, side in zip(shift, window, strict=True)):
            raise ValueError(f"window_attention: shift is {shift}, expected less than the window {window} (t, h, w)")
        if not _divides(window, grid) or (kv_grid, kv_window) != (grid, window):
            raise ValueError(
                f"window_attention: shift {shift} needs windows that divide the grid, and keys like queries; found "
                f"windows {window} on {grid} and {kv_window} on {kv_grid} (t, h, w)"
            )


def window_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Sequence[int],
    kv_window: Sequence[int] | None = None,
    bias: Tensor | None = None,
    shift: Sequence[int] | None = None,
    mask_padding: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Compute `window_attention` as it is written; differentiable in `q`, `k`, `v` and `bias`."""
    shift = shift or (0,) * len(window)
    geometry = Geometry.of(q, k, window, kv_window or window, shift, mask_padding)
    queries = _cut(q, geometry.window, geometry.shift)  # (B, windows, heads, tokens, d)
    keys, values = (_cut(x, geometry.kv_window, geometry.shift) for x in (k, v))
    output = attention_reference(queries, keys, values, bias, _hidden_keys(geometry, q.device), scale)
    return _join(output, q, geometry)


def _attention_products(
    q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, bias: Tensor | None, scale: float
) -> Tensor:
    """Compute `window_attention` with batched products: in small windows faster than PyTorch's fused attention."""
    layout = (q.shape[0], prod(geometry.windows), q.shape[-2])
    queries = _cut(q, geometry.window, geometry.shift).flatten(0, 2)  # (B * windows * heads, tokens, d)
    keys, values = (_cut(x, geometry.kv_window, geometry.shift).flatten(0, 2) for x in (k, v))
    scores = torch.baddbmm(q.new_zeros(1, 1, 1), queries, keys.mT, beta=0, alpha=scale)
    added, hidden, without_key = bias, _hidden_keys(geometry, q.device), None
    if hidden is not None:  # (windows, 1 or heads, 1 or M, N)
        added = (q.new_zeros(()) if bias is None else bias).masked_fill(hidden, -torch.inf)
    if added is not None and bias is not None:
        without_key = added.isneginf().all(-1, keepdim=True)
        added = added.masked_fill(without_key, 0)
    if added is not None:
        scores = scores.view(*layout, *scores.shape[1:]).add(added.to(q.dtype)).flatten(0, 2)
    output = torch.bmm(scores.softmax(-1), values).view(*layout, queries.shape[1], v.shape[-1])
    if without_key is not None:
        output = output.masked_fill(without_key, 0)
    return _join(output, q, geometry)


def _attention_sdpa(q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, bias: Tensor, scale: float) -> Tensor:
    """Compute `window_attention` with PyTorch's own."""
    queries = _cut(q, geometry.window, geometry.shift).flatten(0, 1)  # (B * windows, heads, tokens, d)
    keys, values = (_cut(x, geometry.kv_window, geometry.shift).flatten(0, 1) for x in (k, v))
    added, hidden = bias.to(q.dtype)[None], _hidden_keys(geometry, q.device)
    if hidden is not None:
        added = added.masked_fill(hidden, -torch.inf).repeat(q.shape[0], 1, 1, 1)
    output = F.scaled_dot_product_attention(queries, keys, values, attn_mask=added, scale=scale)
    return _join(output.unflatten(0, (q.shape[0], prod(geometry.windows))), q, geometry)


def _cut(x: Tensor, window: Axes, shift: Axes) -> Tensor:
    """Cut maps (B, T, H, W, heads, d), or without T, into (B, windows, heads, tokens, d), zero-padded at their ends."""
    x = _clip(x)
    if any(shift):
        x = x.roll([-step for step in shift], dims=(1, 2, 3))
    if not _divides(window, _axes(x.shape[1:4], 1)):
        past = [-size % side for size, side in zip(x.shape[1:4], window, strict=True)]
        x = F.pad(x, (0, 0, 0, 0, 0, past[2], 0, past[1], 0, past[0]))
    (t, h, w), (batch, frames, height, width, num_heads, dim) = window, x.shape
    x = x.view(batch, frames // t, t, height // h, h, width // w, w, num_heads, dim).permute(0, 1, 3, 5, 7, 2, 4, 6, 8)
    return x.reshape(batch, frames * height * width // (t * h * w), num_heads, t * h * w, dim)


def _join(windows: Tensor, q: Tensor, geometry: Geometry) -> Tensor:
    """Put windows (B, windows, heads, tokens, d) together, undoing what `_cut` does to `q`."""
    batch, _, num_heads, _, dim = windows.shape
    (t, h, w), (wt, wh, ww) = geometry.windows, geometry.window
    x = windows.view(batch, t, h, w, num_heads, wt, wh, ww, dim).permute(0, 1, 5, 2, 6, 3, 7, 4, 8)
    x = x.reshape(batch, t * wt, h * wh, w * ww, num_heads, dim)
    if any(geometry.shift):
        x = x.roll(geometry.shift, dims=(1, 2, 3))
    frames, height, width = geometry.grid
    return x[:, :frames, :height, :width].reshape(*q.shape[:-1], dim)


def _hidden_keys(geometry: Geometry, device: torch.device) -> Tensor | None:
    """Return (windows, 1, 1 or queries, keys), True where a key is hidden, None if all are seen."""
    if any(geometry.shift):
        # what came around the edges, in bits of one number per token
        ends = zip(geometry.grid, geometry.shift, strict=True)
        t, y, x = ((torch.arange(size, device=device) >= size - step).int() for size, step in ends)
        label = 4 * t[:, None, None] + 2 * y[:, None] + x
        label = _cut(label[None, ..., None, None], geometry.window, (0, 0, 0))[0, :, :, :, 0]  # (windows, 1, N)
        return label[..., None] != label[:, :, None]
    if geometry.mask_padding and not _divides(geometry.kv_window, geometry.kv_grid):
        exists = torch.ones((1, *geometry.kv_grid, 1, 1), dtype=torch.bool, device=device)
        return ~_cut(exists, geometry.kv_window, (0, 0, 0))[0, :, :, None, :, 0]
    return None


def _clip(x: Tensor) -> Tensor:
    """View a map (B, H, W, heads, d) as a clip of one frame; a clip stays what it is."""
    return x.unsqueeze(1) if x.ndim == 5 else x


def _empty_map(like: Tensor, dim: int) -> Tensor:
    return like.new_empty((*like.shape[:-1], dim))


def empty_lse(q: Tensor, geometry: Geometry) -> Tensor:
    """Return an empty log-sum-exp for each query of each window, padding included: row by row of windows, float32."""
    windows_t, windows_h, windows_w = geometry.windows
    shape = (q.shape[0], windows_t, windows_h, q.shape[-2], windows_w, prod(geometry.window))
    return q.new_empty(shape, dtype=torch.float32)


def _empty_gradients(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, bias_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (_empty_map(tensor, tensor.shape[-1]) for tensor in (q, k, v))
    return dq, dk, dv, q.new_empty(0) if bias is None or not bias_gradient else bias.new_empty(bias.shape)


def _geometry_of(q: Tensor, k: Tensor, sizes: Sequence[int], mask_padding: bool) -> Geometry:
    """Return the geometry from the argument `sizes` of the operators: window, kv_window and shift."""
    return Geometry.of(q, k, sizes[:3], sizes[3:6], sizes[6:], mask_padding)


@torch.library.custom_op("frugal::window_attention", mutates_args=())
def _window_attention_op(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sizes: Sequence[int], mask_padding: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output and, for the backward pass only, what `empty_lse` describes."""
    from kernels.window_attention_triton import launch_forward

    geometry = _geometry_of(q, k, sizes, mask_padding)
    output, lse = _empty_map(q, v.shape[-1]), empty_lse(q, geometry)
    launch_forward(_clip(q), _clip(k), _clip(v), bias, geometry, scale, _clip(output), lse)
    return output, lse


@_window_attention_op.register_fake
def _window_attention_fake(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sizes: Sequence[int], mask_padding: bool, scale: float
) -> tuple[Tensor, Tensor]:
    return _empty_map(q, v.shape[-1]), empty_lse(q, _geometry_of(q, k, sizes, mask_padding))


@torch.library.custom_op("frugal::window_attention_backward", mutates_args=())
def _window_attention_backward_op(
    doutput: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    sizes: Sequence[int],
    mask_padding: bool,
    scale: float,
    output: Tensor,
    lse: Tensor,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and bias, the last one empty unless `bias_gradient`."""
    from kernels.window_attention_triton import launch_backward

    dq, dk, dv, dbias = _empty_gradients(q, k, v, bias, bias_gradient)
    launch_backward(
        _clip(doutput),
        _clip(q),
        _clip(k),
        _clip(v),
        bias,
        _geometry_of(q, k, sizes, mask_padding),
        scale,
        _clip(output),
        lse,
        _clip(dq),
        _clip(dk),
        _clip(dv),
        dbias,
    )
    return dq, dk, dv, dbias


@_window_attention_backward_op.register_fake
def _window_attention_backward_fake(
    doutput: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    sizes: Sequence[int],
    mask_padding: bool,
    scale: float,
    output: Tensor,
    lse: Tensor,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_gradients(q, k, v, bias, bias_gradient)


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    q, k, v, bias, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, bias, *output)


def _differentiate(ctx, doutput, dlse):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    q, k, v, bias, output, lse = ctx.saved_tensors
    bias_gradient = ctx.needs_input_grad[3]
    dq, dk, dv, dbias = torch.ops.frugal.window_attention_backward(
        doutput, q, k, v, bias, *ctx.options, output, lse, bias_gradient
    )
    return dq, dk, dv, dbias if bias_gradient else None, None, None, None


_window_attention_op.register_autograd(_differentiate, setup_context=_save_for_backward)
