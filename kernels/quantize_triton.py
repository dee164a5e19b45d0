"""Triton kernels of `kernels/quantize.py` and `kernels/quantized_layers.py`.

All see a contiguous matrix. Groups are blocks of WIDTH columns (BY_ROW false), or of rows: that of row r is
(r // run) % groups. Sums and extremes over rows are split over programs and joined in a fixed order.
"""

# Arguments of Triton functions have no Python types.
# mypy: disallow-untyped-defs=False
# ruff: noqa: ANN001, ANN201, ANN202

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # numbers a program holds at a time
PROGRAMS = 1024  # where each sums many tiles: enough to fill the largest GPUs a few times


@triton.jit
def _offsets(rows, columns, num_columns):
    return rows.to(tl.int64)[:, None] * num_columns + columns[None, :]


@triton.jit
def _of_group(pointer, rows, columns, num_columns, run, groups, width, BY_ROW: tl.constexpr):
    """Load one float32 per group, to broadcast over a tile."""
    if BY_ROW:
        values = tl.load(pointer + (rows // run) % groups)[:, None]
    else:
        # no group starts beyond the last column
        values = tl.load(pointer + tl.minimum(columns, num_columns - 1) // width)[None, :]
    return values.to(tl.float32)


@triton.jit
def _restore(codes, span, shift, levels):
    return codes.to(tl.float32) * (tl.abs(span) / (levels - 1)) + shift


@triton.jit
def _mix(number):
    number = (number ^ (number >> 16)) * 0x7FEB352D
    number = (number ^ (number >> 15)) * 0x846CA68B
    return number ^ (number >> 16)


@triton.jit
def group_range_kernel(
    x_ptr,
    low_ptr,
    high_ptr,
    num_rows,
    num_columns,
    tiles,
    splits,
    BY_ROW: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Give minimum and maximum: of `tiles` tiles of BLOCK_R rows (BY_ROW), or of columns over `tiles` tiles below."""
    part = tl.program_id(0) % splits
    block = tl.program_id(0) // splits
    low = tl.full([BLOCK_R, BLOCK_C], float("inf"), tl.float32)
    high = tl.full([BLOCK_R, BLOCK_C], float("-inf"), tl.float32)
    rows = tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_C)
    for tile in range(part * tiles, part * tiles + tiles):
        if BY_ROW:
            r = block * BLOCK_R + rows
            c = tile * BLOCK_C + columns
        else:
            r = tile * BLOCK_R + rows
            c = block * BLOCK_C + columns
        mask = (r < num_rows)[:, None] & (c < num_columns)[None, :]
        offsets = _offsets(r, c, num_columns)
        low = tl.minimum(low, tl.load(x_ptr + offsets, mask=mask, other=float("inf")).to(tl.float32))
        high = tl.maximum(high, tl.load(x_ptr + offsets, mask=mask, other=float("-inf")).to(tl.float32))
    if BY_ROW:
        r = block * BLOCK_R + rows
        tl.store(low_ptr + r.to(tl.int64) * splits + part, tl.min(low, 1), mask=r < num_rows)
        tl.store(high_ptr + r.to(tl.int64) * splits + part, tl.max(high, 1), mask=r < num_rows)
    else:
        c = block * BLOCK_C + columns
        tl.store(low_ptr + part * num_columns + c, tl.min(low, 0), mask=c < num_columns)
        tl.store(high_ptr + part * num_columns + c, tl.max(high, 0), mask=c < num_columns)


@triton.jit
def quantize_kernel(
    x_ptr,
    span_ptr,
    shift_ptr,
    seed_ptr,
    codes_ptr,
    num_rows,
    num_columns,
    run,
    groups,
    width,
    levels,
    BY_ROW: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Round one tile to codes."""
    blocks = tl.cdiv(num_columns, BLOCK_C)
    rows = (tl.program_id(0) // blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    span = _of_group(span_ptr, rows, columns, num_columns, run, groups, width, BY_ROW)
    shift = _of_group(shift_ptr, rows, columns, num_columns, run, groups, width, BY_ROW)
    offsets = _offsets(rows, columns, num_columns)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    position = (x - shift) * tl.div_rn(tl.zeros_like(span) + (levels - 1), tl.abs(span))
    if STOCHASTIC:
        key = _mix(tl.load(seed_ptr).to(tl.uint32))
        noise = _mix(offsets.to(tl.uint32) ^ key)
        position += ((noise >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07 - 0.5  # 2 ** -23
    position = tl.where(position > 0, position, 0.0)  # NaN becomes 0, too
    position = tl.minimum(position, levels - 1.0)
    # 1.5 * 2 ** 23 leaves no room for a fraction: rounds to the nearest, ties to even
    position = (position + 12582912.0) - 12582912.0
    tl.store(codes_ptr + offsets, position.to(tl.uint8), mask=mask)


@triton.jit
def dequantize_kernel(
    codes_ptr,
    span_ptr,
    shift_ptr,
    output_ptr,
    num_rows,
    num_columns,
    run,
    groups,
    width,
    levels,
    BY_ROW: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Restore one tile."""
    blocks = tl.cdiv(num_columns, BLOCK_C)
    rows = (tl.program_id(0) // blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    span = _of_group(span_ptr, rows, columns, num_columns, run, groups, width, BY_ROW)
    shift = _of_group(shift_ptr, rows, columns, num_columns, run, groups, width, BY_ROW)
    offsets = _offsets(rows, columns, num_columns)
    restored = _restore(tl.load(codes_ptr + offsets, mask=mask, other=0), span, shift, levels)
    tl.store(output_ptr + offsets, restored.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gelu_backward_kernel(
    grad_ptr,
    codes_ptr,
    span_ptr,
    shift_ptr,
    output_ptr,
    num_rows,
    num_columns,
    run,
    groups,
    width,
    levels,
    BY_ROW: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Give the gradient of one tile of the input."""
    blocks = tl.cdiv(num_columns, BLOCK_C)
    rows = (tl.program_id(0) // blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    span = _of_group(span_ptr, rows, columns, num_columns, run, groups, width, BY_ROW)
    shift = _of_group(shift_ptr, rows, columns, num_columns, run, groups, width, BY_ROW)
    offsets = _offsets(rows, columns, num_columns)
    x = _restore(tl.load(codes_ptr + offsets, mask=mask, other=0), span, shift, levels)
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    cumulative = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    tl.store(output_ptr + offsets, (grad * (cumulative + x * density)).to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit
def softmax_backward_kernel(
    grad_ptr,
    codes_ptr,
    span_ptr,
    shift_ptr,
    output_ptr,
    num_rows,
    num_columns,
    run,
    groups,
    width,
    levels,
    BY_ROW: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Give the gradient of BLOCK_R rows of the input from the codes of the output."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_C)
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    span = _of_group(span_ptr, rows, columns, num_columns, run, groups, width, BY_ROW)
    shift = _of_group(shift_ptr, rows, columns, num_columns, run, groups, width, BY_ROW)
    offsets = _offsets(rows, columns, num_columns)
    y = _restore(tl.load(codes_ptr + offsets, mask=mask, other=0), span, shift, levels)
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # zero outside: nothing to the sum
    output = y * (grad - tl.sum(y * grad, 1)[:, None])
    tl.store(output_ptr + offsets, output.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit
def layer_norm_backward_kernel(
    grad_ptr,
    codes_ptr,
    span_ptr,
    shift_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    output_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    num_rows,
    num_columns,
    run,
    groups,
    width,
    levels,
    tiles,
    BY_ROW: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Give the gradient of `tiles` times BLOCK_R rows of the input, and their share of those of weight and bias."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK_C)
    weight = tl.load(weight_ptr + columns, mask=columns < num_columns, other=0.0).to(tl.float32)[None, :]
    grad_weight = tl.zeros([BLOCK_C], tl.float32)
    grad_bias = tl.zeros([BLOCK_C], tl.float32)
    for tile in range(program * tiles, program * tiles + tiles):
        rows = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
        span = _of_group(span_ptr, rows, columns, num_columns, run, groups, width, BY_ROW)
        shift = _of_group(shift_ptr, rows, columns, num_columns, run, groups, width, BY_ROW)
        mean = tl.load(mean_ptr + rows, mask=rows < num_rows, other=0.0).to(tl.float32)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0).to(tl.float32)[:, None]
        offsets = _offsets(rows, columns, num_columns)
        x = _restore(tl.load(codes_ptr + offsets, mask=mask, other=0), span, shift, levels)
        x = (x - mean) * rstd
        grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # zero outside: nothing to any sum
        grad_weight += tl.sum(grad * x, 0)
        grad_bias += tl.sum(grad, 0)
        grad *= weight
        average = tl.sum(grad, 1)[:, None] / num_columns
        along = tl.sum(grad * x, 1)[:, None] / num_columns
        output = rstd * (grad - average - x * along)
        tl.store(output_ptr + offsets, output.to(output_ptr.dtype.element_ty), mask=mask)
    place = program.to(tl.int64) * num_columns + columns
    tl.store(grad_weight_ptr + place, grad_weight, mask=columns < num_columns)
    tl.store(grad_bias_ptr + place, grad_bias, mask=columns < num_columns)


class Layout(NamedTuple):
    """A contiguous tensor as a matrix, its groups and the tiles of a kernel."""

    rows: int
    columns: int
    run: int
    groups: int
    width: int
    by_row: bool
    block_r: int
    block_c: int

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Arguments of the kernels."""
        return self.rows, self.columns, self.run, self.groups, self.width

    @property
    def constants(self) -> dict[str, Any]:
        """Constants of the kernels."""
        warps = 4 if self.block_r * self.block_c <= 2 * TILE else 8
        return {"BY_ROW": self.by_row, "BLOCK_R": self.block_r, "BLOCK_C": self.block_c, "num_warps": warps}

    @property
    def tiles(self) -> tuple[int, int]:
        """Number of tiles down and across."""
        return triton.cdiv(self.rows, self.block_r), triton.cdiv(self.columns, self.block_c)


def _layout(shape: torch.Size, groups: int, *, whole_rows: bool = False) -> Layout:
    """Choose rows as long as groups allow or, with `whole_rows`, the last dimension, in tiles that hold all of it."""
    rows, columns, run, by_row = shape[:-1].numel(), shape[-1], 1, len(shape) == 4
    if by_row:
        run = shape[1] // groups * shape[2]
        if not whole_rows:
            rows, columns, run = shape[0] * groups, run * columns, 1
    block_c = triton.next_power_of_2(columns)
    if not whole_rows:
        divisor = columns & -columns  # the largest power of two in it: no tile is half empty
        block_c = min(divisor if divisor >= 64 and not by_row else block_c, TILE if by_row else 1024)
    block_r = max(1, TILE // block_c)
    return Layout(rows, columns, run, groups, columns // groups if not by_row else columns, by_row, block_r, block_c)


def _device(tensor: Tensor) -> Any:
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)


def group_range(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return minimum and maximum of every group."""
    x = x.contiguous()
    layout = _layout(x.shape, groups)
    down, across = layout.tiles
    blocks, along = (down, across) if layout.by_row else (across, down)
    tiles = triton.cdiv(along, max(1, PROGRAMS // blocks))
    splits = triton.cdiv(along, tiles)
    shape = (layout.rows, splits) if layout.by_row else (splits, layout.columns)
    low, high = (x.new_empty(shape, dtype=torch.float32) for _ in range(2))
    with _device(x):
        group_range_kernel[(blocks * splits,)](
            x, low, high, layout.rows, layout.columns, tiles, splits, **layout.constants
        )
    # (batch, groups, splits) or (splits, groups, width)
    low, high = (extreme.view(-1, groups, splits if layout.by_row else layout.width) for extreme in (low, high))
    return low.amin((0, 2)).to(x.dtype), high.amax((0, 2)).to(x.dtype)


def quantize(x: Tensor, span: Tensor, shift: Tensor, levels: int, seed: Tensor | None) -> Tensor:
    """Return the codes of `x`."""
    codes = x.new_empty(x.shape, dtype=torch.uint8)
    if x.numel() == 0:
        return codes
    x, layout = x.contiguous(), _layout(x.shape, span.numel())
    down, across = layout.tiles
    with _device(x):
        quantize_kernel[(down * across,)](
            x, span, shift, seed if seed is not None else shift, codes, *layout.sizes, levels,
            STOCHASTIC=seed is not None, **layout.constants, enable_fp_fusion=False,  # the codes of the reference
        )  # fmt: skip
    return codes


def dequantize(codes: Tensor, span: Tensor, shift: Tensor, levels: int, dtype: torch.dtype) -> Tensor:
    """Return what the codes stand for."""
    output = codes.new_empty(codes.shape, dtype=dtype)
    if codes.numel() == 0:
        return output
    codes, layout = codes.contiguous(), _layout(codes.shape, span.numel())
    down, across = layout.tiles
    with _device(codes):
        dequantize_kernel[(down * across,)](codes, span, shift, output, *layout.sizes, levels, **layout.constants)
    return output


def gelu_backward(grad: Tensor, codes: Tensor, span: Tensor, shift: Tensor, levels: int) -> Tensor:
    """Return the gradient of the input of GELU."""
    output = grad.new_empty(grad.shape)
    if grad.numel() == 0:
        return output
    grad, codes, layout = grad.contiguous(), codes.contiguous(), _layout(codes.shape, span.numel())
    down, across = layout.tiles
    with _device(grad):
        gelu_backward_kernel[(down * across,)](
            grad, codes, span, shift, output, *layout.sizes, levels, **layout.constants
        )
    return output


def softmax_backward(grad: Tensor, codes: Tensor, span: Tensor, shift: Tensor, levels: int) -> Tensor:
    """Return the gradient of the input of softmax along the last dimension."""
    output = grad.new_empty(grad.shape)
    if grad.numel() == 0:
        return output
    grad, codes = grad.contiguous(), codes.contiguous()
    layout = _layout(codes.shape, span.numel(), whole_rows=True)
    with _device(grad):
        softmax_backward_kernel[(layout.tiles[0],)](
            grad, codes, span, shift, output, *layout.sizes, levels, **layout.constants
        )
    return output


def layer_norm_backward(
    grad: Tensor,
    codes: Tensor,
    span: Tensor,
    shift: Tensor,
    levels: int,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of input, weight and bias of layer normalisation of the last dimension."""
    output = grad.new_empty(grad.shape)
    if grad.numel() == 0:
        return output, torch.zeros_like(weight), torch.zeros_like(weight)
    grad, codes, weight = grad.contiguous(), codes.contiguous(), weight.contiguous()
    layout = _layout(codes.shape, span.numel(), whole_rows=True)
    tiles = triton.cdiv(layout.tiles[0], PROGRAMS)
    programs = triton.cdiv(layout.tiles[0], tiles)
    grad_weight, grad_bias = (grad.new_empty(programs, layout.columns, dtype=torch.float32) for _ in range(2))
    with _device(grad):
        layer_norm_backward_kernel[(programs,)](
            grad, codes, span, shift, mean.contiguous(), rstd.contiguous(), weight, output, grad_weight, grad_bias,
            *layout.sizes, levels, tiles, **layout.constants,
        )  # fmt: skip
    return output, grad_weight.sum(0).to(weight.dtype), grad_bias.sum(0).to(weight.dtype)
