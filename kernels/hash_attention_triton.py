"""Triton kernels of `kernels/hash_attention.py`; h are the codes, S = sum_j h_j v_j the context, k = sum_j h_j.

Forward: one pass sums the context over the tokens, one reads it. Backward: one pass sums the gradients of S and k, one
gives those of codes and value. Sums over tokens are split over programs and added in a fixed order: results repeat.
"""

# Arguments of Triton functions have no Python types.
# mypy: disallow-untyped-defs=False
# ruff: noqa: ANN001, ANN201, ANN202

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 512  # enough to fill the largest GPUs a few times
CONFIGS = [
    triton.Config({"BLOCK_N": block}, num_warps=warps, num_stages=2) for block, warps in ((64, 4), (128, 4), (128, 8))
]
if os.environ.get("TRITON_INTERPRET") == "1":
    CONFIGS = CONFIGS[:1]


@triton.jit
def _tile(pointer, head, heads, stride_b, stride_h, stride_n, tokens, end, columns, WIDTH: tl.constexpr):
    """Load rows `tokens` of one head as [BLOCK_N, columns], zero outside."""
    start = pointer + (head // heads).to(tl.int64) * stride_b + (head % heads).to(tl.int64) * stride_h
    offsets = tokens.to(tl.int64)[:, None] * stride_n + columns[None, :]
    return tl.load(start + offsets, mask=(tokens < end)[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def _put(pointer, tile, head, heads, stride_b, stride_h, stride_n, tokens, end, columns, WIDTH: tl.constexpr):
    """Store rows `tokens` of one head."""
    start = pointer + (head // heads).to(tl.int64) * stride_b + (head % heads).to(tl.int64) * stride_h
    offsets = tokens.to(tl.int64)[:, None] * stride_n + columns[None, :]
    mask = (tokens < end)[:, None] & (columns < WIDTH)[None, :]
    tl.store(start + offsets, tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _matrix(pointer, index, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Load one contiguous (ROWS, COLUMNS) float32 matrix, padded with zeros."""
    offsets = rows[:, None] * COLUMNS + columns[None, :]
    mask = (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]
    return tl.load(pointer + index.to(tl.int64) * (ROWS * COLUMNS) + offsets, mask=mask, other=0.0)


@triton.jit
def _put_sums(matrix_ptr, vector_ptr, index, matrix, vector, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Store one (ROWS, COLUMNS) matrix and one vector of ROWS."""
    offsets = rows[:, None] * COLUMNS + columns[None, :]
    mask = (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]
    index = index.to(tl.int64)
    tl.store(matrix_ptr + index * (ROWS * COLUMNS) + offsets, matrix, mask=mask)
    tl.store(vector_ptr + index * ROWS + rows, vector, mask=rows < ROWS)


@triton.autotune(CONFIGS, key=["bucket", "BITS", "D"])
@triton.jit
def hash_attention_context_kernel(
    codes_ptr,
    value_ptr,
    context_ptr,
    total_ptr,
    codes_b,
    codes_h,
    codes_n,
    value_b,
    value_h,
    value_n,
    heads,
    num_tokens,
    chunk,
    splits,
    bucket,
    BITS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_BITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum h v and h over one chunk of the tokens of one head."""
    program = tl.program_id(0)
    head = program // splits
    begin = (program % splits) * chunk
    end = tl.minimum(begin + chunk, num_tokens)
    bits, columns = tl.arange(0, BLOCK_BITS), tl.arange(0, BLOCK_D)
    context = tl.zeros([BLOCK_BITS, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_BITS], tl.float32)
    for start in range(begin, end, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        h = _tile(codes_ptr, head, heads, codes_b, codes_h, codes_n, tokens, end, bits, BITS)
        v = _tile(value_ptr, head, heads, value_b, value_h, value_n, tokens, end, columns, D)
        # -1, 0 and 1 are exact in every type
        context += tl.dot(tl.trans(h.to(v.dtype)), v, input_precision=PRECISION)
        total += tl.sum(h.to(tl.float32), 0)
    _put_sums(context_ptr, total_ptr, program, context, total, bits, columns, BITS, D)


@triton.autotune(CONFIGS, key=["bucket", "BITS", "D"])
@triton.jit
def hash_attention_forward_kernel(
    codes_ptr,
    value_ptr,
    context_ptr,
    total_ptr,
    output_ptr,
    codes_b,
    codes_h,
    codes_n,
    value_b,
    value_h,
    value_n,
    output_b,
    output_h,
    output_n,
    heads,
    num_tokens,
    bucket,
    BITS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_BITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Read the context of one head for one block of tokens."""
    blocks = tl.cdiv(num_tokens, BLOCK_N)
    head = tl.program_id(0) // blocks
    tokens = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    bits, columns = tl.arange(0, BLOCK_BITS), tl.arange(0, BLOCK_D)
    context = _matrix(context_ptr, head, bits, columns, BITS, D)
    total = tl.load(total_ptr + head.to(tl.int64) * BITS + bits, mask=bits < BITS, other=0.0)
    h = _tile(codes_ptr, head, heads, codes_b, codes_h, codes_n, tokens, num_tokens, bits, BITS).to(tl.float32)
    v = _tile(value_ptr, head, heads, value_b, value_h, value_n, tokens, num_tokens, columns, D).to(tl.float32)
    denominator = tl.sum(h * total[None, :], 1) + num_tokens * (BITS + 1.0)
    output = (tl.dot(h, context, input_precision=PRECISION) + (BITS + 1.0) * v) / denominator[:, None]
    _put(output_ptr, output, head, heads, output_b, output_h, output_n, tokens, num_tokens, columns, D)


@triton.jit
def _token_gradients(h, v, grad, context, total, num_tokens, BITS: tl.constexpr, PRECISION: tl.constexpr):
    """Return the gradients of the numerators [BLOCK_N, D] and of the denominators [BLOCK_N]."""
    denominator = tl.sum(h * total[None, :], 1) + num_tokens * (BITS + 1.0)
    numerator = tl.dot(h, context, input_precision=PRECISION) + (BITS + 1.0) * v
    p = grad / denominator[:, None]
    return p, -tl.sum(p * numerator, 1) / denominator


@triton.autotune(CONFIGS, key=["bucket", "BITS", "D"])
@triton.jit
def hash_attention_backward_sums_kernel(
    grad_ptr,
    codes_ptr,
    value_ptr,
    context_ptr,
    total_ptr,
    grad_context_ptr,
    grad_total_ptr,
    grad_b,
    grad_h,
    grad_n,
    codes_b,
    codes_h,
    codes_n,
    value_b,
    value_h,
    value_n,
    heads,
    num_tokens,
    chunk,
    splits,
    bucket,
    BITS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_BITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum the gradients of the context and of the sum of codes over one chunk of the tokens of one head."""
    program = tl.program_id(0)
    head = program // splits
    begin = (program % splits) * chunk
    end = tl.minimum(begin + chunk, num_tokens)
    bits, columns = tl.arange(0, BLOCK_BITS), tl.arange(0, BLOCK_D)
    context = _matrix(context_ptr, head, bits, columns, BITS, D)
    total = tl.load(total_ptr + head.to(tl.int64) * BITS + bits, mask=bits < BITS, other=0.0)
    grad_context = tl.zeros([BLOCK_BITS, BLOCK_D], tl.float32)
    grad_total = tl.zeros([BLOCK_BITS], tl.float32)
    for start in range(begin, end, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        g = _tile(grad_ptr, head, heads, grad_b, grad_h, grad_n, tokens, end, columns, D).to(tl.float32)
        h = _tile(codes_ptr, head, heads, codes_b, codes_h, codes_n, tokens, end, bits, BITS).to(tl.float32)
        v = _tile(value_ptr, head, heads, value_b, value_h, value_n, tokens, end, columns, D).to(tl.float32)
        p, e = _token_gradients(h, v, g, context, total, num_tokens, BITS, PRECISION)
        grad_context += tl.dot(tl.trans(h), p, input_precision=PRECISION)
        grad_total += tl.sum(h * e[:, None], 0)
    _put_sums(grad_context_ptr, grad_total_ptr, program, grad_context, grad_total, bits, columns, BITS, D)


@triton.autotune(CONFIGS, key=["bucket", "BITS", "D"])
@triton.jit
def hash_attention_backward_kernel(
    grad_ptr,
    codes_ptr,
    value_ptr,
    context_ptr,
    total_ptr,
    grad_context_ptr,
    grad_total_ptr,
    grad_codes_ptr,
    grad_value_ptr,
    grad_b,
    grad_h,
    grad_n,
    codes_b,
    codes_h,
    codes_n,
    value_b,
    value_h,
    value_n,
    grad_codes_b,
    grad_codes_h,
    grad_codes_n,
    grad_value_b,
    grad_value_h,
    grad_value_n,
    heads,
    num_tokens,
    bucket,
    BITS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_BITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Give the gradients of codes and value for one block of tokens of one head."""
    blocks = tl.cdiv(num_tokens, BLOCK_N)
    head = tl.program_id(0) // blocks
    tokens = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    bits, columns = tl.arange(0, BLOCK_BITS), tl.arange(0, BLOCK_D)
    context = _matrix(context_ptr, head, bits, columns, BITS, D)
    grad_context = _matrix(grad_context_ptr, head, bits, columns, BITS, D)
    row = head.to(tl.int64) * BITS + bits
    total = tl.load(total_ptr + row, mask=bits < BITS, other=0.0)
    grad_total = tl.load(grad_total_ptr + row, mask=bits < BITS, other=0.0)
    g = _tile(grad_ptr, head, heads, grad_b, grad_h, grad_n, tokens, num_tokens, columns, D).to(tl.float32)
    h = _tile(codes_ptr, head, heads, codes_b, codes_h, codes_n, tokens, num_tokens, bits, BITS).to(tl.float32)
    v = _tile(value_ptr, head, heads, value_b, value_h, value_n, tokens, num_tokens, columns, D).to(tl.float32)
    p, e = _token_gradients(h, v, g, context, total, num_tokens, BITS, PRECISION)
    grad_value = tl.dot(h, grad_context, input_precision=PRECISION) + (BITS + 1.0) * p
    # every code is a query (first line) and a key (second line)
    grad_codes = tl.dot(p, tl.trans(context), input_precision=PRECISION) + e[:, None] * total[None, :]
    grad_codes += tl.dot(v, tl.trans(grad_context), input_precision=PRECISION) + grad_total[None, :]
    _put(
        grad_codes_ptr,
        grad_codes,
        head,
        heads,
        grad_codes_b,
        grad_codes_h,
        grad_codes_n,
        tokens,
        num_tokens,
        bits,
        BITS,
    )
    _put(
        grad_value_ptr,
        grad_value,
        head,
        heads,
        grad_value_b,
        grad_value_h,
        grad_value_n,
        tokens,
        num_tokens,
        columns,
        D,
    )


def forward(codes: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, the context (B, heads, bits, d) and the sum of codes (B, heads, bits), both in float32."""
    codes, value = _rows(codes), _rows(value)
    batch, heads, num_tokens, bits = codes.shape
    head_dim = value.shape[-1]
    output = value.new_empty(batch, num_tokens, heads, head_dim).transpose(1, 2)
    if batch * heads * num_tokens == 0:
        context = value.new_zeros(batch, heads, bits, head_dim, dtype=torch.float32)
        return output, context, value.new_zeros(batch, heads, bits, dtype=torch.float32)
    chunk, splits = _chunks(batch * heads, num_tokens)
    context = value.new_empty(batch, heads, splits, bits, head_dim, dtype=torch.float32)
    total = value.new_empty(batch, heads, splits, bits, dtype=torch.float32)
    constants = _constants(bits, head_dim, value.dtype)
    bucket = triton.next_power_of_2(num_tokens)
    strides = (*codes.stride()[:3], *value.stride()[:3])
    with _device(value):
        hash_attention_context_kernel[(batch * heads * splits,)](
            codes, value, context, total, *strides, heads, num_tokens, chunk, splits, bucket, **constants
        )
        context, total = context.sum(2), total.sum(2)
        hash_attention_forward_kernel[_blocks(batch * heads, num_tokens)](
            codes, value, context, total, output, *strides, *output.stride()[:3], heads, num_tokens, bucket, **constants
        )
    return output, context, total


def backward(grad: Tensor, codes: Tensor, value: Tensor, context: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of codes and value."""
    grad_codes, grad_value = torch.empty_like(codes), torch.empty_like(value)
    batch, heads, num_tokens, bits = codes.shape
    if batch * heads * num_tokens == 0:
        return grad_codes, grad_value
    grad, codes, value = _rows(grad), _rows(codes), _rows(value)
    head_dim = value.shape[-1]
    chunk, splits = _chunks(batch * heads, num_tokens)
    grad_context = value.new_empty(batch, heads, splits, bits, head_dim, dtype=torch.float32)
    grad_total = value.new_empty(batch, heads, splits, bits, dtype=torch.float32)
    constants = _constants(bits, head_dim, value.dtype)
    bucket = triton.next_power_of_2(num_tokens)
    strides = (*grad.stride()[:3], *codes.stride()[:3], *value.stride()[:3])
    sizes = (heads, num_tokens)
    with _device(value):
        hash_attention_backward_sums_kernel[(batch * heads * splits,)](
            grad, codes, value, context, total, grad_context, grad_total,
            *strides, *sizes, chunk, splits, bucket, **constants,
        )  # fmt: skip
        grad_context, grad_total = grad_context.sum(2), grad_total.sum(2)
        hash_attention_backward_kernel[_blocks(batch * heads, num_tokens)](
            grad, codes, value, context, total, grad_context, grad_total, grad_codes, grad_value,
            *strides, *grad_codes.stride()[:3], *grad_value.stride()[:3], *sizes, bucket, **constants,
        )  # fmt: skip
    return grad_codes, grad_value


def _rows(tensor: Tensor) -> Tensor:
    """Return `tensor` with consecutive entries along its last dimension."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _chunks(heads: int, num_tokens: int) -> tuple[int, int]:
    """Return tokens per program and programs per head: from the shapes alone, so that sums repeat."""
    splits = max(1, min(PROGRAMS // heads, triton.cdiv(num_tokens, 128)))
    chunk = triton.cdiv(triton.cdiv(num_tokens, splits), 128) * 128
    return chunk, triton.cdiv(num_tokens, chunk)


def _blocks(heads: int, num_tokens: int) -> Any:
    return lambda meta: (heads * triton.cdiv(num_tokens, meta["BLOCK_N"]),)


def _constants(bits: int, head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "BITS": bits,
        "D": head_dim,
        "BLOCK_BITS": max(16, triton.next_power_of_2(bits)),
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        # three TensorFloat-32 products keep more digits than half precision shows
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32x3",
    }


def _device(tensor: Tensor) -> Any:
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)
