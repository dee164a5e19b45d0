"""Triton kernels of `kernels/boundary_max_pool.py`.

Forward: a program takes one proposal and a block of channels of one half. Backward: a program takes a block of channels
and time steps and looks at all proposals in order, so that nothing is added atomically.
"""

# Arguments of Triton functions have no Python types.
# mypy: disallow-untyped-defs=False
# ruff: noqa: ANN001, ANN201, ANN202

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_C = 32
MAX_BLOCK_T = 64


@triton.jit
def _bound(windows_ptr, length):
    """Load one bound: an existing time step."""
    bound = tl.load(windows_ptr).to(tl.float64)
    bound = tl.where(bound == bound, bound, 0.0)
    bound = tl.minimum(tl.maximum(bound, 0.0), (length - 1).to(tl.float64))
    return bound.to(tl.int32)


@triton.jit(do_not_specialize=["length", "num_windows", "channels"])
def boundary_max_pool_fwd_kernel(
    feature_ptr, windows_ptr, output_ptr, positions_ptr, length, num_windows, channels,
    BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Find the first maximum of each channel in one window: [BLOCK_C, BLOCK_T], then over its columns."""
    proposal = tl.program_id(0).to(tl.int64)  # image * num_windows + window
    half = tl.program_id(2)
    row = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_rows = row < channels // 2
    channel = (proposal // num_windows) * channels + half * (channels // 2) + row
    first = _bound(windows_ptr + proposal * 4 + half * 2, length)
    last = tl.maximum(_bound(windows_ptr + proposal * 4 + half * 2 + 1, length), first)

    best = tl.full([BLOCK_C, BLOCK_T], float("-inf"), dtype=tl.float32)
    position = tl.zeros([BLOCK_C, BLOCK_T], dtype=tl.int32) + first
    first_nan = tl.zeros([BLOCK_C, BLOCK_T], dtype=tl.int32) + length
    for start in range(first, last + 1, BLOCK_T):
        times = start + tl.arange(0, BLOCK_T)
        mask = in_rows[:, None] & (times <= last)[None, :]
        offsets = (channel * length)[:, None] + times[None, :]
        number = tl.load(feature_ptr + offsets, mask=mask, other=float("-inf")).to(tl.float32)
        larger = number > best
        best = tl.where(larger, number, best)
        position = tl.where(larger, times[None, :], position)
        first_nan = tl.where((number != number) & (first_nan == length), times[None, :], first_nan)
    maximum = tl.max(best, axis=1)
    place = tl.min(tl.where(best == maximum[:, None], position, length), axis=1)
    first_nan = tl.min(first_nan, axis=1)
    maximum = tl.where(first_nan < length, float("nan"), maximum)
    place = tl.where(first_nan < length, first_nan, place)
    offsets = channel * num_windows + proposal % num_windows
    tl.store(output_ptr + offsets, maximum.to(output_ptr.dtype.element_ty), mask=in_rows)
    tl.store(positions_ptr + offsets, place, mask=in_rows)


@triton.jit(do_not_specialize=["length", "num_windows", "num_rows"])
def boundary_max_pool_bwd_kernel(
    grad_ptr, positions_ptr, grad_feature_ptr, length, num_windows, num_rows,
    BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Sum, for every time step, the gradients of the windows whose maximum it was: [BLOCK_C, BLOCK_T]."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)  # (image, channel)
    times = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_rows = rows < num_rows
    total = tl.zeros([BLOCK_C, BLOCK_T], dtype=tl.float32)
    for window in range(num_windows):
        place = tl.load(positions_ptr + rows * num_windows + window, mask=in_rows, other=-1)
        grad = tl.load(grad_ptr + rows * num_windows + window, mask=in_rows, other=0.0).to(tl.float32)
        total += tl.where(place[:, None] == times[None, :], grad[:, None], 0.0)
    mask = in_rows[:, None] & (times < length)[None, :]
    offsets = (rows * length)[:, None] + times[None, :]
    tl.store(grad_feature_ptr + offsets, total.to(grad_feature_ptr.dtype.element_ty), mask=mask)


def forward(feature: Tensor, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Return maxima and positions (int32), both (B, C, S)."""
    batch, channels, length = feature.shape
    num_windows = windows.shape[1]
    output = feature.new_empty(batch, channels, num_windows)
    positions = feature.new_empty(batch, channels, num_windows, dtype=torch.int32)
    if output.numel():
        grid = (batch * num_windows, triton.cdiv(channels // 2, BLOCK_C), 2)
        boundary_max_pool_fwd_kernel[grid](
            feature.contiguous(), windows.contiguous(), output, positions, length, num_windows, channels,
            BLOCK_C=BLOCK_C, BLOCK_T=16,
        )  # fmt: skip
    return output, positions


def backward(grad: Tensor, positions: Tensor, length: int) -> Tensor:
    """Return the gradient (B, C, length) of the feature in the dtype of `grad`."""
    batch, channels, num_windows = grad.shape
    grad_feature = grad.new_empty(batch, channels, length)
    if grad_feature.numel():
        block_t = min(triton.next_power_of_2(length), MAX_BLOCK_T)
        grid = (triton.cdiv(batch * channels, BLOCK_C), triton.cdiv(length, block_t))
        boundary_max_pool_bwd_kernel[grid](
            grad.contiguous(), positions.contiguous(), grad_feature, length, num_windows, batch * channels,
            BLOCK_C=BLOCK_C, BLOCK_T=block_t,
        )  # fmt: skip
    return grad_feature
