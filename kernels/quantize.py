"""Group-wise 8-bit quantisation with a running range, for activations kept until the backward pass.

Mesa (arXiv 2111.11124). What layers do with the codes is in `kernels/quantized_layers.py`; the Triton
kernels of both are in `kernels/quantize_triton.py`, which is imported when they run.

Groups: the channels of (B, C) and (B, N, C) fall into `groups` blocks of neighbours, and so do the heads of
(B, heads, N, d). Every group has a span and a shift, tensors of shape (groups,): code q stands for
q * span / (levels - 1) + shift.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import choose_path


class RunningRange(NamedTuple):
    """Running span (maximum minus minimum) and shift (minimum) of every group, and how often it was updated.

    `span` and `shift` are (groups,), start anywhere; `updates` has one element, 0 at the start.
    """

    span: Tensor
    shift: Tensor
    updates: Tensor


@torch.no_grad()
def update_range(x: Tensor, running: RunningRange, *, decay: float = 0.9) -> None:
    """Move `running`, in place, towards the range of `x`: the first update takes it, later ones 1 - `decay` of the way.

    `x` is (B, C), (B, N, C) or (B, heads, N, d). Groups with an infinite range keep theirs; an empty `x` changes
    nothing. Raises `ValueError` when shapes do not fit and `TypeError` when `x` is not floating point.
    """
    span, shift, updates = running
    check_groups("update_range", x, span, shift)
    if updates.numel() != 1:
        raise ValueError(f"update_range: updates has shape {tuple(updates.shape)}, expected one element")
    if x.numel() == 0:
        return
    low, high = (extreme.to(span.dtype) for extreme in group_range(x, span.numel()))
    for state, new in ((span, high - low), (shift, low)):
        moved = torch.where(updates == 0, new, state - (1 - decay) * (state - new))
        state.copy_(torch.where((high - low).isfinite(), moved, state))
    updates += 1


def group_range(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return minimum and maximum of every group of a non-empty `x`, (groups,) in its dtype; see the module.

    Raises `ValueError` when `x` is empty or has no such groups and `TypeError` when it is not floating point.
    """
    _check_groups("group_range", x, groups)
    if x.numel() == 0:
        raise ValueError(f"group_range: x has shape {tuple(x.shape)}, expected at least one element")
    if takes_triton("group_range", x):
        low, high = group_range_op(x, groups)
        return low, high
    return group_range_reference(x, groups)


def quantize(
    x: Tensor, span: Tensor, shift: Tensor, *, levels: int = 256, seed: Tensor | None = None, upstream: bool = False
) -> Tensor:
    """Return the codes of `x`, uint8 of its shape; values outside [shift, shift + span] get the nearest code.

    `x` is (B, C), (B, N, C) or (B, heads, N, d), `span` and `shift` are (groups,), `levels` is 2 to 256. With a `seed`,
    one int64 in [0, 2 ** 31) on the device of `x`, codes are rounded at random, right on average, the same for the same
    seed; without, to the nearest (even). Half precision is computed in float32. NaN gets code 0.
    With `upstream`, codes are those of the official code without its noise, in PyTorch: the arithmetic is that of the
    dtype of `x`, and values above the range wrap modulo 256, which restores them as small ones.
    Not differentiable. Raises `ValueError` when shapes, devices or `levels` do not fit and `TypeError` when `x` is not
    floating point.
    """
    check_groups("quantize", x, span, shift)
    check_levels("quantize", levels)
    if seed is not None and (seed.numel() != 1 or seed.dtype != torch.int64 or seed.device != x.device):
        raise ValueError(
            f"quantize: seed is {seed.dtype} {tuple(seed.shape)} on {seed.device}, expected one int64 as x"
        )
    if not upstream and takes_triton("quantize", x):
        codes: Tensor = quantize_op(x, span, shift, levels, seed)
        return codes
    return quantize_reference(x, span, shift, levels=levels, seed=seed, upstream=upstream)


def dequantize(
    codes: Tensor,
    span: Tensor,
    shift: Tensor,
    *,
    levels: int = 256,
    dtype: torch.dtype = torch.float32,
    upstream: bool = False,
) -> Tensor:
    """Return what the uint8 `codes` stand for, in the floating point `dtype`; arguments as for `quantize`.

    Raises as `quantize`, and `TypeError` when `codes` is not uint8 or `dtype` not floating point.
    """
    if not dtype.is_floating_point:
        raise TypeError(f"dequantize: dtype is {dtype}, expected a floating point type")
    check_groups("dequantize", codes, span, shift, codes=True)
    check_levels("dequantize", levels)
    if not upstream and dtype != torch.float64 and takes_triton("dequantize", codes):
        x: Tensor = dequantize_op(codes, span, shift, levels, dtype)
        return x
    return dequantize_reference(codes, span, shift, levels=levels, dtype=dtype, upstream=upstream)


def takes_triton(op: str, tensor: Tensor) -> bool:
    """Return whether the kernels of `op` run: float64 always takes PyTorch."""
    return tensor.dtype != torch.float64 and choose_path(op, tensor, has_triton=True) == "triton"


def check_groups(op: str, x: Tensor, span: Tensor, shift: Tensor, *, codes: bool = False) -> None:
    """Raise unless `span` and `shift` describe groups of `x`, which is floating point or uint8 `codes`."""
    if span.ndim != 1 or span.shape != shift.shape:
        raise ValueError(
            f"{op}: span and shift have shapes {tuple(span.shape)} and {tuple(shift.shape)}, expected (groups,)"
        )
    if not x.device == span.device == shift.device:
        raise ValueError(f"{op}: span and shift are on {span.device} and {shift.device}, expected {x.device}")
    _check_groups(op, x, span.numel(), codes=codes)


def check_levels(op: str, levels: int) -> None:
    """Raise unless `levels` fit in a byte."""
    if not 2 <= levels <= 256:
        raise ValueError(f"{op}: levels is {levels}, expected 2 to 256")


def _check_groups(op: str, x: Tensor, groups: int, *, codes: bool = False) -> None:
    name = "codes" if codes else "x"
    if codes and x.dtype != torch.uint8:
        raise TypeError(f"{op}: codes is {x.dtype}, expected torch.uint8")
    if not codes and not x.is_floating_point():
        raise TypeError(f"{op}: x is {x.dtype}, expected a floating point tensor")
    if x.ndim not in (2, 3, 4):
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, expected (B, C), (B, N, C) or (B, heads, N, d)")
    size, kind = (x.shape[1], "heads") if x.ndim == 4 else (x.shape[-1], "channels")
    if groups < 1 or size % groups:
        raise ValueError(f"{op}: {name} has {size} {kind}, expected a multiple of the {groups} groups")


def group_range_reference(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Compute `group_range`."""
    grouped = _grouped(x, groups)
    return grouped.amin(0).amin(1), grouped.amax(0).amax(1)  # faster than both dimensions at once


def quantize_reference(
    x: Tensor, span: Tensor, shift: Tensor, *, levels: int = 256, seed: Tensor | None = None, upstream: bool = False
) -> Tensor:
    """Compute `quantize`."""
    dtype = x.dtype if upstream else _compute_dtype(x.dtype)
    scale = _scale(span, levels, dtype, upstream)
    position = _grouped(x.to(dtype), span.numel()) - shift.to(dtype)[:, None]
    position *= scale[:, None]
    if seed is not None:
        noise = rounding_noise(x.numel(), seed).view_as(position)
        # Officially a float16 position becomes float32 where noise is added.
        position = position + noise - 0.5 if upstream else position.add_(noise.to(dtype) - 0.5)
    if upstream:
        position = torch.where(position > 0, position, 0).round_()  # NaN becomes 0, too
        position = torch.where(position.isinf(), 255, position % 256)  # infinity does not wrap
    else:
        position = position.clamp_(0, levels - 1).round_().nan_to_num_()
    return position.to(torch.uint8).view(x.shape)


def dequantize_reference(
    codes: Tensor,
    span: Tensor,
    shift: Tensor,
    *,
    levels: int = 256,
    dtype: torch.dtype = torch.float32,
    upstream: bool = False,
) -> Tensor:
    """Compute `dequantize`."""
    compute = dtype if upstream else _compute_dtype(dtype)
    grouped = _grouped(codes, span.numel()).to(compute)
    if upstream:
        grouped = grouped / _scale(span, levels, compute, upstream)[:, None]
    else:
        grouped = grouped * (span.to(compute).abs() / (levels - 1))[:, None]
    return (grouped + shift.to(compute)[:, None]).to(dtype).view(codes.shape)


def rounding_noise(count: int, seed: Tensor) -> Tensor:
    """Return numbers in (0, 1), the noise of the first `count` elements: a hash of their index and `seed`."""
    dtype = torch.int32 if count <= 2**31 else torch.int64
    index = torch.arange(count, device=seed.device, dtype=dtype).to(torch.int32)
    index ^= _mix(seed.to(torch.int32))
    return ((_mix(index) >> 9) & 0x7FFFFF).float().add_(0.5).mul_(2.0**-23)


def _mix(number: Tensor) -> Tensor:
    """Hash int32 in place, as unsigned numbers (two rounds of multiplication and shift)."""
    number ^= (number >> 16) & 0xFFFF
    number *= 0x7FEB352D
    number ^= (number >> 15) & 0x1FFFF
    number *= 0x846CA68B - 2**32
    number ^= (number >> 16) & 0xFFFF
    return number


def _grouped(x: Tensor, groups: int) -> Tensor:
    """View `x` as (outer, groups, inner), in the order of its elements."""
    if x.ndim == 4:
        return x.reshape(x.shape[0], groups, x.shape[1] // groups * x.shape[2] * x.shape[3])
    return x.reshape(x.shape[:-1].numel(), groups, x.shape[-1] // groups)


def _scale(span: Tensor, levels: int, dtype: torch.dtype, upstream: bool) -> Tensor:
    """Return codes per unit, (groups,); infinite for a constant group."""
    if upstream:
        return ((levels - 1) / span.abs()).to(dtype)  # PyTorch rounds a number divided by a tensor twice
    span = span.to(dtype)
    return torch.full_like(span, levels - 1) / span.abs()


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@torch.library.custom_op("frugal::group_range", mutates_args=())
def group_range_op(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Run the kernel of `group_range`."""
    from kernels.quantize_triton import group_range

    return group_range(x, groups)


@group_range_op.register_fake
def _(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(groups), x.new_empty(groups)


@torch.library.custom_op("frugal::quantize", mutates_args=())
def quantize_op(x: Tensor, span: Tensor, shift: Tensor, levels: int, seed: Tensor | None) -> Tensor:
    """Run the kernel of `quantize`."""
    from kernels.quantize_triton import quantize

    return quantize(x, span, shift, levels, seed)


@quantize_op.register_fake
def _(x: Tensor, span: Tensor, shift: Tensor, levels: int, seed: Tensor | None) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.uint8)


@torch.library.custom_op("frugal::dequantize", mutates_args=())
def dequantize_op(codes: Tensor, span: Tensor, shift: Tensor, levels: int, dtype: torch.dtype) -> Tensor:
    """Run the kernel of `dequantize`."""
    from kernels.quantize_triton import dequantize

    return dequantize(codes, span, shift, levels, dtype)


@dequantize_op.register_fake
def _(codes: Tensor, span: Tensor, shift: Tensor, levels: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)
