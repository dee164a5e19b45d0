"""Triton kernels of `kernels.attention`: FlashAttention-2 (arXiv 2307.08691), algorithms 1 and 2.

Needs triton; `kernels.attention` imports this module when a kernel runs. Without a bias the scores and their
log-sum-exp are in base 2, which saves a multiplication; with one in base e, which keeps the digits of a large bias. The
backward pass recomputes the weights from the log-sum-exp, a float32: gradients lose digits where scores reach hundreds.
One program owns a tile of its output and no addition is atomic: results do not depend on the order of programs.
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

# Programs that fill a large GPU about twice; the bias gradient splits its sum over images to get there.
PROGRAMS_WANTED = 264
LOG2_E = 1.4426950408889634


def _autotune(*tiles: tuple[int, int, int, int]) -> Any:
    """Try tiles of (BLOCK_M queries, BLOCK_N keys, warps, stages); the interpreter takes the first."""
    configs = [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages) for m, n, warps, stages in tiles
    ]
    if os.environ.get("TRITON_INTERPRET") == "1":
        configs = configs[:1]
    key = ["q_class", "k_class", "HEAD_DIM", "V_DIM", "HAS_BIAS", "MASK"]
    return triton.autotune(configs=configs, key=key, cache_results=True)


@triton.jit
def _load_rows(base, rows, dims, row_stride, dim_stride, row_ok, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Load a [rows, BLOCK] tile, zero where there is no row or no dimension."""
    ok = row_ok[:, None]
    if BLOCK != DIM:
        ok = ok & (dims < DIM)[None, :]
    return tl.load(base + rows[:, None] * row_stride + dims[None, :] * dim_stride, mask=ok, other=0.0)


@triton.jit
def _store_rows(base, rows, dims, row_stride, dim_stride, row_ok, tile, DIM: tl.constexpr, BLOCK: tl.constexpr):
    ok = row_ok[:, None]
    if BLOCK != DIM:
        ok = ok & (dims < DIM)[None, :]
    pointers = base + rows[:, None] * row_stride + dims[None, :] * dim_stride
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=ok)


@triton.jit
def _visible_keys(mask_base, cols, mask_sk, col_ok, MASK: tl.constexpr):
    """Return which of the keys `cols` exist and, if all queries share a row of the mask, are seen."""
    if MASK == 1:
        col_ok = col_ok & (tl.load(mask_base + cols * mask_sk, mask=col_ok, other=1) == 0)
    return col_ok


@triton.jit
def _scores(
    product, score_scale, bias_pointers, mask_pointers, tile_ok, visible, HAS_BIAS: tl.constexpr, MASK: tl.constexpr
):
    """Turn products of queries and keys into scores, in base 2 without a bias; -inf where a key is not visible."""
    scores = product * score_scale
    if HAS_BIAS:
        scores += tl.load(bias_pointers, mask=tile_ok, other=0.0).to(tl.float32)
    if MASK == 2:
        visible = visible & (tl.load(mask_pointers, mask=tile_ok, other=1) == 0)
    return tl.where(visible, scores, -float("inf"))


@triton.jit
def _exponential(scores, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        scores *= 1.4426950408889634
    return tl.exp2(scores)


@_autotune((32, 32, 4, 2), (64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3))
@triton.jit
def attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, mask_ptr, out_ptr, lse_ptr,
    q_sb, q_sh, q_sl, q_sd, k_sb, k_sh, k_sl, k_sd, v_sb, v_sh, v_sl, v_sd,
    bias_sb, bias_sh, bias_sq, bias_sk, mask_sb, mask_sh, mask_sq, mask_sk, out_sb, out_sh, out_sl, out_sd,
    num_heads, q_length, k_length, score_scale, q_class, k_class,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_BIAS: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head, over all keys."""
    num_blocks = tl.cdiv(q_length, BLOCK_M)
    image_head = (tl.program_id(0) // num_blocks).to(tl.int64)
    start_m = (tl.program_id(0) % num_blocks).to(tl.int64) * BLOCK_M
    image, head = image_head // num_heads, image_head % num_heads
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    dims, v_dims = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    row_ok = start_m + rows < q_length

    q_base = q_ptr + image * q_sb + head * q_sh + start_m * q_sl
    q = _load_rows(q_base, rows, dims, q_sl, q_sd, row_ok, HEAD_DIM, BLOCK_D)
    k_base = k_ptr + image * k_sb + head * k_sh
    v_base = v_ptr + image * v_sb + head * v_sh
    bias_base = bias_ptr + image * bias_sb + head * bias_sh + start_m * bias_sq
    mask_base = mask_ptr + image * mask_sb + head * mask_sh + start_m * mask_sq

    top = tl.full([BLOCK_M], -float("inf"), tl.float32)  # running maximum
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for start_n in range(0, k_length, BLOCK_N):
        col_ok = start_n + cols < k_length
        k = _load_rows(k_base, cols, dims, k_sl, k_sd, col_ok, HEAD_DIM, BLOCK_D)
        product = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [M, N]
        visible = _visible_keys(mask_base, cols, mask_sk, col_ok, MASK)[None, :]
        bias_pointers = bias_base + rows[:, None] * bias_sq + cols[None, :] * bias_sk
        mask_pointers = mask_base + rows[:, None] * mask_sq + cols[None, :] * mask_sk
        tile_ok = row_ok[:, None] & col_ok[None, :]
        scores = _scores(product, score_scale, bias_pointers, mask_pointers, tile_ok, visible, HAS_BIAS, MASK)
        new_top = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)  # no visible key so far
        weights = _exponential(scores - shift[:, None], HAS_BIAS)
        decay = _exponential(top - shift, HAS_BIAS)
        total = total * decay + tl.sum(weights, 1)
        v = _load_rows(v_base, cols, v_dims, v_sl, v_sd, col_ok, V_DIM, BLOCK_DV)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        top = new_top
        k_base += BLOCK_N * k_sl
        v_base += BLOCK_N * v_sl
        bias_base += BLOCK_N * bias_sk
        mask_base += BLOCK_N * mask_sk

    seen = total > 0
    safe_total = tl.where(seen, total, 1.0)
    out_base = out_ptr + image * out_sb + head * out_sh + start_m * out_sl
    _store_rows(out_base, rows, v_dims, out_sl, out_sd, row_ok, acc / safe_total[:, None], V_DIM, BLOCK_DV)
    # +inf makes every weight zero in the backward pass
    lse = top + (tl.log(safe_total) if HAS_BIAS else tl.log2(safe_total))
    lse = tl.where(seen, lse, float("inf"))
    tl.store(lse_ptr + image_head * q_length + start_m + rows, lse, mask=row_ok)


@_autotune((32, 32, 4, 2), (64, 64, 4, 2), (128, 64, 8, 2))
@triton.jit
def attention_bwd_q_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, mask_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr,
    q_sb, q_sh, q_sl, q_sd, k_sb, k_sh, k_sl, k_sd, v_sb, v_sh, v_sl, v_sd,
    bias_sb, bias_sh, bias_sq, bias_sk, mask_sb, mask_sh, mask_sq, mask_sk, out_sb, out_sh, out_sl, out_sd,
    dout_sb, dout_sh, dout_sl, dout_sd, dq_sb, dq_sh, dq_sl, dq_sd,
    num_heads, q_length, k_length, scale, score_scale, q_class, k_class,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_BIAS: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of BLOCK_M queries of one head, and delta, their rows of sum(doutput * output)."""
    num_blocks = tl.cdiv(q_length, BLOCK_M)
    image_head = (tl.program_id(0) // num_blocks).to(tl.int64)
    start_m = (tl.program_id(0) % num_blocks).to(tl.int64) * BLOCK_M
    image, head = image_head // num_heads, image_head % num_heads
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    dims, v_dims = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    row_ok = start_m + rows < q_length

    q_base = q_ptr + image * q_sb + head * q_sh + start_m * q_sl
    q = _load_rows(q_base, rows, dims, q_sl, q_sd, row_ok, HEAD_DIM, BLOCK_D)
    out_base = out_ptr + image * out_sb + head * out_sh + start_m * out_sl
    out = _load_rows(out_base, rows, v_dims, out_sl, out_sd, row_ok, V_DIM, BLOCK_DV)
    dout_base = dout_ptr + image * dout_sb + head * dout_sh + start_m * dout_sl
    dout = _load_rows(dout_base, rows, v_dims, dout_sl, dout_sd, row_ok, V_DIM, BLOCK_DV)
    row_offsets = image_head * q_length + start_m + rows
    lse = tl.load(lse_ptr + row_offsets, mask=row_ok, other=float("inf"))
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(delta_ptr + row_offsets, delta, mask=row_ok)
    k_base = k_ptr + image * k_sb + head * k_sh
    v_base = v_ptr + image * v_sb + head * v_sh
    bias_base = bias_ptr + image * bias_sb + head * bias_sh + start_m * bias_sq
    mask_base = mask_ptr + image * mask_sb + head * mask_sh + start_m * mask_sq

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start_n in range(0, k_length, BLOCK_N):
        col_ok = start_n + cols < k_length
        k = _load_rows(k_base, cols, dims, k_sl, k_sd, col_ok, HEAD_DIM, BLOCK_D)
        v = _load_rows(v_base, cols, v_dims, v_sl, v_sd, col_ok, V_DIM, BLOCK_DV)
        product = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [M, N]
        visible = _visible_keys(mask_base, cols, mask_sk, col_ok, MASK)[None, :]
        bias_pointers = bias_base + rows[:, None] * bias_sq + cols[None, :] * bias_sk
        mask_pointers = mask_base + rows[:, None] * mask_sq + cols[None, :] * mask_sk
        tile_ok = row_ok[:, None] & col_ok[None, :]
        scores = _scores(product, score_scale, bias_pointers, mask_pointers, tile_ok, visible, HAS_BIAS, MASK)
        weights = _exponential(scores - lse[:, None], HAS_BIAS)
        dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        dscores = weights * (dweights - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
        k_base += BLOCK_N * k_sl
        v_base += BLOCK_N * v_sl
        bias_base += BLOCK_N * bias_sk
        mask_base += BLOCK_N * mask_sk

    dq_base = dq_ptr + image * dq_sb + head * dq_sh + start_m * dq_sl
    _store_rows(dq_base, rows, dims, dq_sl, dq_sd, row_ok, dq * scale, HEAD_DIM, BLOCK_D)


@_autotune((32, 32, 4, 2), (64, 64, 4, 2), (64, 128, 8, 2))
@triton.jit
def attention_bwd_kv_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, mask_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_sb, q_sh, q_sl, q_sd, k_sb, k_sh, k_sl, k_sd, v_sb, v_sh, v_sl, v_sd,
    bias_sb, bias_sh, bias_sq, bias_sk, mask_sb, mask_sh, mask_sq, mask_sk, dout_sb, dout_sh, dout_sl, dout_sd,
    dk_sb, dk_sh, dk_sl, dk_sd, dv_sb, dv_sh, dv_sl, dv_sd,
    num_heads, q_length, k_length, scale, score_scale, q_class, k_class,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_BIAS: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: the gradients of BLOCK_N keys and values of one head; tiles are transposed, [N, M]."""
    num_blocks = tl.cdiv(k_length, BLOCK_N)
    image_head = (tl.program_id(0) // num_blocks).to(tl.int64)
    start_n = (tl.program_id(0) % num_blocks).to(tl.int64) * BLOCK_N
    image, head = image_head // num_heads, image_head % num_heads
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    dims, v_dims = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    col_ok = start_n + cols < k_length

    k_base = k_ptr + image * k_sb + head * k_sh + start_n * k_sl
    k = _load_rows(k_base, cols, dims, k_sl, k_sd, col_ok, HEAD_DIM, BLOCK_D)
    v_base = v_ptr + image * v_sb + head * v_sh + start_n * v_sl
    v = _load_rows(v_base, cols, v_dims, v_sl, v_sd, col_ok, V_DIM, BLOCK_DV)
    mask_base = mask_ptr + image * mask_sb + head * mask_sh + start_n * mask_sk
    visible = _visible_keys(mask_base, cols, mask_sk, col_ok, MASK)[:, None]
    q_base = q_ptr + image * q_sb + head * q_sh
    dout_base = dout_ptr + image * dout_sb + head * dout_sh
    row_base = image_head * q_length
    bias_base = bias_ptr + image * bias_sb + head * bias_sh + start_n * bias_sk

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for start_m in range(0, q_length, BLOCK_M):
        row_ok = start_m + rows < q_length
        q = _load_rows(q_base, rows, dims, q_sl, q_sd, row_ok, HEAD_DIM, BLOCK_D)
        dout = _load_rows(dout_base, rows, v_dims, dout_sl, dout_sd, row_ok, V_DIM, BLOCK_DV)
        lse = tl.load(lse_ptr + row_base + start_m + rows, mask=row_ok, other=float("inf"))
        delta = tl.load(delta_ptr + row_base + start_m + rows, mask=row_ok, other=0.0)
        product = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [N, M]
        bias_pointers = bias_base + rows[None, :] * bias_sq + cols[:, None] * bias_sk
        mask_pointers = mask_base + rows[None, :] * mask_sq + cols[:, None] * mask_sk
        tile_ok = row_ok[None, :] & col_ok[:, None]
        scores = _scores(product, score_scale, bias_pointers, mask_pointers, tile_ok, visible, HAS_BIAS, MASK)
        weights = _exponential(scores - lse[None, :], HAS_BIAS)
        dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dweights = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        dscores = weights * (dweights - delta[None, :])
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
        q_base += BLOCK_M * q_sl
        dout_base += BLOCK_M * dout_sl
        bias_base += BLOCK_M * bias_sq
        mask_base += BLOCK_M * mask_sq

    dk_base = dk_ptr + image * dk_sb + head * dk_sh + start_n * dk_sl
    _store_rows(dk_base, cols, dims, dk_sl, dk_sd, col_ok, dk * scale, HEAD_DIM, BLOCK_D)
    dv_base = dv_ptr + image * dv_sb + head * dv_sh + start_n * dv_sl
    _store_rows(dv_base, cols, v_dims, dv_sl, dv_sd, col_ok, dv, V_DIM, BLOCK_DV)


@_autotune((32, 32, 4, 2), (64, 64, 4, 2), (64, 128, 8, 2))
@triton.jit
def attention_bwd_bias_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, mask_ptr, dout_ptr, lse_ptr, delta_ptr, dbias_ptr,
    q_sb, q_sh, q_sl, q_sd, k_sb, k_sh, k_sl, k_sd, v_sb, v_sh, v_sl, v_sd,
    bias_sb, bias_sh, bias_sq, bias_sk, mask_sb, mask_sh, mask_sq, mask_sk, dout_sb, dout_sh, dout_sl, dout_sd,
    bias_batch, bias_heads, images_summed, heads_summed, num_splits,
    num_heads, q_length, k_length, score_scale, q_class, k_class,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_BIAS: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: a tile of the bias gradient, summed over one split of the images and heads that share the bias.

    `dbias` is contiguous, (splits, bias batch, bias heads, Lq, Lk).
    """
    row_blocks, col_blocks = tl.cdiv(q_length, BLOCK_M), tl.cdiv(k_length, BLOCK_N)
    plane = (tl.program_id(0) // (row_blocks * col_blocks)).to(tl.int64)
    tile = tl.program_id(0) % (row_blocks * col_blocks)
    start_m = (tile // col_blocks).to(tl.int64) * BLOCK_M
    start_n = (tile % col_blocks).to(tl.int64) * BLOCK_N
    split = (plane // (bias_batch * bias_heads)).to(tl.int32)
    bias_image, bias_head = plane // bias_heads % bias_batch, plane % bias_heads
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    dims, v_dims = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    row_ok, col_ok = start_m + rows < q_length, start_n + cols < k_length
    tile_ok = row_ok[:, None] & col_ok[None, :]
    bias_base = bias_ptr + bias_image * bias_sb + bias_head * bias_sh + start_m * bias_sq + start_n * bias_sk
    bias_pointers = bias_base + rows[:, None] * bias_sq + cols[None, :] * bias_sk

    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for index in range(split, images_summed * heads_summed, num_splits):
        image = bias_image + index // heads_summed
        head = bias_head + index % heads_summed
        q_base = q_ptr + image * q_sb + head * q_sh + start_m * q_sl
        q = _load_rows(q_base, rows, dims, q_sl, q_sd, row_ok, HEAD_DIM, BLOCK_D)
        k_base = k_ptr + image * k_sb + head * k_sh + start_n * k_sl
        k = _load_rows(k_base, cols, dims, k_sl, k_sd, col_ok, HEAD_DIM, BLOCK_D)
        product = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [M, N]
        mask_base = mask_ptr + image * mask_sb + head * mask_sh + start_m * mask_sq + start_n * mask_sk
        visible = _visible_keys(mask_base, cols, mask_sk, col_ok, MASK)[None, :]
        mask_pointers = mask_base + rows[:, None] * mask_sq + cols[None, :] * mask_sk
        scores = _scores(product, score_scale, bias_pointers, mask_pointers, tile_ok, visible, HAS_BIAS, MASK)
        row_offsets = (image * num_heads + head) * q_length + start_m + rows
        lse = tl.load(lse_ptr + row_offsets, mask=row_ok, other=float("inf"))
        delta = tl.load(delta_ptr + row_offsets, mask=row_ok, other=0.0)
        weights = _exponential(scores - lse[:, None], HAS_BIAS)
        dout_base = dout_ptr + image * dout_sb + head * dout_sh + start_m * dout_sl
        dout = _load_rows(dout_base, rows, v_dims, dout_sl, dout_sd, row_ok, V_DIM, BLOCK_DV)
        v_base = v_ptr + image * v_sb + head * v_sh + start_n * v_sl
        v = _load_rows(v_base, cols, v_dims, v_sl, v_sd, col_ok, V_DIM, BLOCK_DV)
        dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        dbias += weights * (dweights - delta[:, None])

    dbias_base = dbias_ptr + (plane * q_length + start_m) * k_length + start_n
    pointers = dbias_base + rows[:, None] * k_length + cols[None, :]
    tl.store(pointers, dbias.to(dbias_ptr.dtype.element_ty), mask=tile_ok)


def _broadcast_strides(name: str, tensor: Tensor | None) -> dict[str, int]:
    """Strides of a bias or mask by name, zero along broadcast dimensions."""
    sizes, strides = ((1,) * 4, (0,) * 4) if tensor is None else (tensor.shape, tensor.stride())
    return {
        f"{name}_s{dim}": 0 if size == 1 else stride for dim, size, stride in zip("bhqk", sizes, strides, strict=True)
    }


def _common(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float) -> dict[str, Any]:
    """Return the arguments that all kernels take, by name."""
    arguments: dict[str, Any] = {"q_ptr": q, "k_ptr": k, "v_ptr": v}
    # A pointer to what does not exist is not read.
    arguments["bias_ptr"] = q if bias is None else bias
    arguments["mask_ptr"] = q if mask is None else mask.view(torch.uint8)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        arguments |= _strides_of(name, tensor)
    arguments |= _broadcast_strides("bias", bias) | _broadcast_strides("mask", mask)
    # no mask, a row for all queries, or a row for each
    mask_kind = 0 if mask is None else 1 if arguments["mask_sq"] == 0 else 2
    (num_heads, q_length, head_dim), (k_length, v_dim) = q.shape[1:], v.shape[2:]
    allow_tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return arguments | {
        "score_scale": scale * LOG2_E if bias is None else scale,
        "num_heads": num_heads, "q_length": q_length, "k_length": k_length,
        "q_class": max(16, triton.next_power_of_2(q_length)), "k_class": max(16, triton.next_power_of_2(k_length)),
        "HEAD_DIM": head_dim, "V_DIM": v_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)), "BLOCK_DV": max(16, triton.next_power_of_2(v_dim)),
        "HAS_BIAS": bias is not None, "MASK": mask_kind,
        "PRECISION": "tf32" if allow_tf32 else "ieee",
    }  # fmt: skip


def _strides_of(name: str, tensor: Tensor) -> dict[str, int]:
    return {f"{name}_s{dim}": stride for dim, stride in zip("bhld", tensor.stride(), strict=True)}


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    output: Tensor,
    lse: Tensor,
) -> None:
    """Fill `output` and `lse`."""
    if output.numel() == 0:
        return
    batch, num_heads, q_length, _ = q.shape
    with torch.cuda.device_of(q):
        attention_fwd_kernel[lambda meta: (batch * num_heads * triton.cdiv(q_length, meta["BLOCK_M"]),)](
            **_common(q, k, v, bias, mask, scale),
            **_strides_of("out", output),
            out_ptr=output,
            lse_ptr=lse,
        )


def launch_backward(
    doutput: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    output: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dbias: Tensor,
) -> None:
    """Fill `dq`, `dk`, `dv` and, unless it is empty, `dbias`."""
    batch, num_heads, q_length, _ = q.shape
    k_length = k.shape[2]
    if output.numel() == 0 or k_length == 0:
        for gradient in (dq, dk, dv, dbias):
            gradient.zero_()
        return
    delta = torch.empty_like(lse)
    common = _common(q, k, v, bias, mask, scale) | _strides_of("dout", doutput)
    common |= {"dout_ptr": doutput, "lse_ptr": lse, "delta_ptr": delta}
    with torch.cuda.device_of(q):
        attention_bwd_q_kernel[lambda meta: (batch * num_heads * triton.cdiv(q_length, meta["BLOCK_M"]),)](
            **common, **_strides_of("out", output), **_strides_of("dq", dq), out_ptr=output, dq_ptr=dq, scale=scale
        )
        attention_bwd_kv_kernel[lambda meta: (batch * num_heads * triton.cdiv(k_length, meta["BLOCK_N"]),)](
            **common, **_strides_of("dk", dk), **_strides_of("dv", dv), dk_ptr=dk, dv_ptr=dv, scale=scale
        )
        if dbias.numel() > 0:
            _launch_bias_gradient(common, batch, dbias)


def _launch_bias_gradient(common: dict[str, Any], batch: int, dbias: Tensor) -> None:
    bias_batch, bias_heads, q_length, k_length = dbias.shape
    images_summed = batch if bias_batch == 1 else 1
    heads_summed = common["num_heads"] if bias_heads == 1 else 1
    tiles = bias_batch * bias_heads * triton.cdiv(q_length, 64) * triton.cdiv(k_length, 64)
    num_splits = min(images_summed * heads_summed, triton.cdiv(PROGRAMS_WANTED, tiles))
    partial = dbias[None] if num_splits == 1 else dbias.new_empty(num_splits, *dbias.shape, dtype=torch.float32)
    planes = num_splits * bias_batch * bias_heads
    attention_bwd_bias_kernel[
        lambda meta: (planes * triton.cdiv(q_length, meta["BLOCK_M"]) * triton.cdiv(k_length, meta["BLOCK_N"]),)
    ](
        **common,
        dbias_ptr=partial,
        bias_batch=bias_batch,
        bias_heads=bias_heads,
        images_summed=images_summed,
        heads_summed=heads_summed,
        num_splits=num_splits,
    )
    if num_splits > 1:
        dbias.copy_(partial.sum(0))
