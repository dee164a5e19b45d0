"""Triton kernels of `kernels/ms_deform_attn.py`. A row is one (batch, query, head); a program takes a few rows.

Forward and the gradients of locations and weights are sums in a fixed order. The gradient of the value scatters with
float32 atomic additions, whose order, and so last bits, differ between runs; under
`torch.use_deterministic_algorithms(True)` it adds 64-bit integers in fixed point instead, whose order does not matter.
"""

# Arguments of Triton functions have no Python types.
# mypy: disallow-untyped-defs=False
# ruff: noqa: ANN001, ANN201, ANN202

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CONFIGS = [triton.Config({"BLOCK_R": rows}, num_warps=warps) for rows, warps in ((16, 4), (32, 4), (16, 2), (64, 8))]
if os.environ.get("TRITON_INTERPRET") == "1":
    CONFIGS = CONFIGS[:1]
KEY = ["HEADS", "HEAD_DIM", "LEVELS", "POINTS"]


@triton.jit
def _rows_of(num_rows, num_queries, length, HEADS: tl.constexpr, BLOCK_R: tl.constexpr):
    """Return this program's rows, which of them exist, and where row 0 of their image and head lies in value / d."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    image = rows // (num_queries.to(tl.int64) * HEADS)
    return rows, rows < num_rows, image * length * HEADS + rows % HEADS


@triton.jit
def _place(locations_ptr, shapes_ptr, sample, in_rows, level):
    """Return the upper left pixel (x, y) of each sample, its distance from there, and the level's size and start."""
    height = tl.load(shapes_ptr + 3 * level)
    width = tl.load(shapes_ptr + 3 * level + 1)
    start = tl.load(shapes_ptr + 3 * level + 2)
    x = tl.load(locations_ptr + 2 * sample, mask=in_rows, other=0.0).to(tl.float32) * width.to(tl.float32) - 0.5
    y = tl.load(locations_ptr + 2 * sample + 1, mask=in_rows, other=0.0).to(tl.float32) * height.to(tl.float32) - 0.5
    # Far outside, no pixel is near: any such place will do, and one that fits an integer.
    near = (x >= -1) & (x < width) & (y >= -1) & (y < height)
    x = tl.where(near, x, -2.0)
    y = tl.where(near, y, -2.0)
    left = tl.floor(x)
    top = tl.floor(y)
    return left.to(tl.int64), top.to(tl.int64), x - left, y - top, height, width, start


@triton.jit
def _corner(origin, x, y, height, width, start, in_rows, columns, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Return offsets into value and mask, both [BLOCK_R, BLOCK_D], of the pixels (x, y) of one level."""
    inside = in_rows & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    offsets = (origin + (start + y * width + x) * HEADS) * HEAD_DIM
    return offsets[:, None] + columns[None, :], inside[:, None] & (columns < HEAD_DIM)[None, :]


@triton.autotune(CONFIGS, key=KEY)
@triton.jit(do_not_specialize=["num_rows", "num_queries", "length"])
def ms_deform_attn_fwd_kernel(
    value_ptr, shapes_ptr, locations_ptr, weights_ptr, output_ptr, num_rows, num_queries, length,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Sum the weighted samples of each row: [BLOCK_R, BLOCK_D]."""
    rows, in_rows, origin = _rows_of(num_rows, num_queries, length, HEADS, BLOCK_R)
    columns = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    for level in range(LEVELS):
        for point in tl.static_range(POINTS):
            sample = (rows * LEVELS + level) * POINTS + point
            x, y, right, down, height, width, start = _place(locations_ptr, shapes_ptr, sample, in_rows, level)
            weight = tl.load(weights_ptr + sample, mask=in_rows, other=0.0).to(tl.float32)
            for dy in tl.static_range(2):
                for dx in tl.static_range(2):
                    offsets, mask = _corner(
                        origin, x + dx, y + dy, height, width, start, in_rows, columns, HEADS, HEAD_DIM
                    )
                    share = (right if dx else 1 - right) * (down if dy else 1 - down)
                    pixel = tl.load(value_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
                    total += (weight * share)[:, None] * pixel
    offsets = (rows * HEAD_DIM)[:, None] + columns[None, :]
    mask = in_rows[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(output_ptr + offsets, total.to(output_ptr.dtype.element_ty), mask=mask)


@triton.autotune(CONFIGS, key=[*KEY, "FIXED_POINT"], reset_to_zero=["grad_value_ptr"])
@triton.jit(do_not_specialize=["num_rows", "num_queries", "length"])
def ms_deform_attn_bwd_kernel(
    grad_ptr, value_ptr, shapes_ptr, locations_ptr, weights_ptr, scale_ptr,
    grad_value_ptr, grad_locations_ptr, grad_weights_ptr, num_rows, num_queries, length,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr,
    FIXED_POINT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Scatter each row's gradient to the pixels it read; sum what location and weight of each sample get over d."""
    rows, in_rows, origin = _rows_of(num_rows, num_queries, length, HEADS, BLOCK_R)
    columns = tl.arange(0, BLOCK_D)
    mask = in_rows[:, None] & (columns < HEAD_DIM)[None, :]
    grad = tl.load(grad_ptr + (rows * HEAD_DIM)[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if FIXED_POINT:
        scale = tl.load(scale_ptr)
    for level in range(LEVELS):
        for point in tl.static_range(POINTS):
            sample = (rows * LEVELS + level) * POINTS + point
            x, y, right, down, height, width, start = _place(locations_ptr, shapes_ptr, sample, in_rows, level)
            weight = tl.load(weights_ptr + sample, mask=in_rows, other=0.0).to(tl.float32)
            bilinear = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
            along_x = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)  # its derivatives
            along_y = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
            for dy in tl.static_range(2):
                for dx in tl.static_range(2):
                    offsets, mask = _corner(
                        origin, x + dx, y + dy, height, width, start, in_rows, columns, HEADS, HEAD_DIM
                    )
                    pixel = tl.load(value_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
                    share_x = right if dx else 1 - right
                    share_y = down if dy else 1 - down
                    bilinear += (share_x * share_y)[:, None] * pixel
                    along_x += ((2 * dx - 1) * share_y)[:, None] * pixel
                    along_y += ((2 * dy - 1) * share_x)[:, None] * pixel
                    part = (weight * share_x * share_y)[:, None] * grad
                    if FIXED_POINT:
                        part = (part * scale).to(tl.int64)
                    tl.atomic_add(grad_value_ptr + offsets, part, mask=mask, sem="relaxed")
            grad_weight = tl.sum(bilinear * grad, axis=1)
            grad_x = tl.sum(along_x * grad, axis=1) * weight * width.to(tl.float32)
            grad_y = tl.sum(along_y * grad, axis=1) * weight * height.to(tl.float32)
            tl.store(grad_weights_ptr + sample, grad_weight.to(grad_weights_ptr.dtype.element_ty), mask=in_rows)
            tl.store(grad_locations_ptr + 2 * sample, grad_x.to(grad_locations_ptr.dtype.element_ty), mask=in_rows)
            tl.store(grad_locations_ptr + 2 * sample + 1, grad_y.to(grad_locations_ptr.dtype.element_ty), mask=in_rows)


@lru_cache(maxsize=64)
def _shape_table(spatial_shapes: tuple[int, ...], device: torch.device) -> Tensor:
    """Return height, width and start of every level on the device, int64; made once per set of sizes."""
    table, start = [], 0
    for height, width in zip(spatial_shapes[::2], spatial_shapes[1::2], strict=True):
        table += [height, width, start]
        start += height * width
    return torch.tensor(table, dtype=torch.int64, device=device)


def _sizes(value: Tensor, locations: Tensor) -> dict[str, Any]:
    _, length, heads, head_dim = value.shape
    batch, num_queries, _, levels, points, _ = locations.shape
    return {
        "num_rows": batch * num_queries * heads, "num_queries": num_queries, "length": length,
        "HEADS": heads, "HEAD_DIM": head_dim, "LEVELS": levels, "POINTS": points,
        "BLOCK_D": triton.next_power_of_2(head_dim),
    }  # fmt: skip


def forward(value: Tensor, spatial_shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    """Return (B, Lq, heads * d) in the dtype of `value`; `spatial_shapes` is H0, W0, H1, W1, ..."""
    sizes = _sizes(value, locations)
    output = value.new_empty(locations.shape[0], locations.shape[1], value.shape[2] * value.shape[3])
    if output.numel() == 0:
        return output
    table = _shape_table(tuple(spatial_shapes), value.device)
    ms_deform_attn_fwd_kernel[lambda meta: (triton.cdiv(sizes["num_rows"], meta["BLOCK_R"]),)](
        value.contiguous(), table, locations.contiguous(), weights.contiguous(), output, **sizes
    )
    return output


def _fixed_point_scale(grad: Tensor, weights: Tensor, terms: int) -> Tensor:
    """Return the power of two with which `terms` parts of the value's gradient add up to less than 2^62; NaN if none.

    The largest gradient keeps 61 - log2(terms) bits.
    """
    bound = grad.abs().amax().double() * weights.abs().amax().double() * terms
    exponent = (61 - torch.frexp(bound).exponent).clamp(max=126)
    scale = torch.ldexp(torch.ones_like(bound), exponent)
    return torch.where(bound.isfinite(), scale, torch.nan).float()


def backward(
    grad: Tensor, value: Tensor, spatial_shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of value, locations and weights, in their dtypes."""
    sizes = _sizes(value, locations)
    if grad.numel() == 0 or weights.numel() == 0:
        return value.new_zeros(value.shape), locations.new_zeros(locations.shape), weights.new_zeros(weights.shape)
    grad, value, locations, weights = (tensor.contiguous() for tensor in (grad, value, locations, weights))
    fixed_point = torch.are_deterministic_algorithms_enabled()
    terms = sizes["num_queries"] * sizes["POINTS"]  # a sample gives a pixel one part at most
    scale = _fixed_point_scale(grad, weights, terms) if fixed_point else None
    grad_value = torch.zeros_like(value, dtype=torch.int64 if fixed_point else torch.float32)
    grad_locations, grad_weights = torch.empty_like(locations), torch.empty_like(weights)
    table = _shape_table(tuple(spatial_shapes), value.device)
    ms_deform_attn_bwd_kernel[lambda meta: (triton.cdiv(sizes["num_rows"], meta["BLOCK_R"]),)](
        grad, value, table, locations, weights, scale, grad_value, grad_locations, grad_weights,
        FIXED_POINT=fixed_point, **sizes,
    )  # fmt: skip
    if scale is not None:
        grad_value = grad_value.double() / scale.double()
    return grad_value.to(value.dtype), grad_locations, grad_weights
