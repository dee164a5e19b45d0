"""Triton kernels of `kernels.window_attention`: FlashAttention-2 (arXiv 2307.08691) in the windows of a map.

Needs triton; `kernels.window_attention` imports this module when a kernel runs. Small windows share a tile, in which a
token sees its own window only; a large one is walked through tile by tile. Where the keys of a window fit one tile, one
kernel computes all gradients and reads everything once. No addition is atomic: results do not depend on the order of
programs. Scores are in base 2 without a bias, as in `kernels.attention_triton`.
"""

# Arguments of Triton functions have no Python types.
# mypy: disallow-untyped-defs=False
# ruff: noqa: ANN001, ANN201

from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_triton import PROGRAMS_WANTED, _exponential
from kernels.window_attention import Geometry
from kernels.window_tiles_triton import (
    common_arguments,
    find_tokens,
    load_tokens,
    locate,
    store_tokens,
    strides_of,
    tuned,
    window_scores,
)

# Windows with at most so many keys have all gradients computed by one kernel.
FUSED_TOKENS = 64


@tuned
@triton.jit
def window_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, lse_ptr,
    q_sb, q_st, q_sh, q_sw, q_sn, q_sd, k_sb, k_st, k_sh, k_sw, k_sn, k_sd,
    v_sb, v_st, v_sh, v_sw, v_sn, v_sd, out_sb, out_st, out_sh, out_sw, out_sn, out_sd,
    bias_sn, bias_sq, bias_sk, num_images, num_heads, grid_t, grid_h, grid_w, kv_t, kv_h, kv_w,
    shift_t, shift_h, shift_w,
    score_scale, width_class,
    Q_TOKENS: tl.constexpr, Q_H: tl.constexpr, Q_W: tl.constexpr,
    K_TOKENS: tl.constexpr, K_H: tl.constexpr, K_W: tl.constexpr,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_BIAS: tl.constexpr, SHIFTED: tl.constexpr, MASK_PADDING: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head in a group of windows, over the keys of the group."""
    tiles: tl.constexpr = (GROUP * Q_TOKENS + BLOCK_M - 1) // BLOCK_M
    head, place = (tl.program_id(0) % num_heads).to(tl.int64), tl.program_id(0) // num_heads
    image, window_t, window_h, first, start = locate(
        place // tiles, head, num_heads, grid_t, grid_h, grid_w, Q_TOKENS, Q_H, Q_W, GROUP
    )
    dims, v_dims = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    rows = place % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    t, y, x, row_ok, in_map, row_label = find_tokens(
        rows, window_t, window_h, first, grid_t, grid_h, grid_w, shift_t, shift_h, shift_w,
        Q_TOKENS, Q_H, Q_W, GROUP, SHIFTED,
    )  # fmt: skip
    q_base = q_ptr + image * q_sb + head * q_sn
    q = load_tokens(q_base, t, y, x, dims, q_st, q_sh, q_sw, q_sd, in_map, HEAD_DIM, BLOCK_D)
    k_base = k_ptr + image * k_sb + head * k_sn
    v_base = v_ptr + image * v_sb + head * v_sn
    bias_base = bias_ptr
    if HAS_BIAS:
        bias_base += head * bias_sn

    top = tl.full([BLOCK_M], -float("inf"), tl.float32)  # running maximum
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for start_n in range(0, GROUP * K_TOKENS, BLOCK_N):
        cols = start_n + tl.arange(0, BLOCK_N)
        kt, ky, kx, col_ok, k_in_map, col_label = find_tokens(
            cols, window_t, window_h, first, kv_t, kv_h, kv_w, shift_t, shift_h, shift_w,
            K_TOKENS, K_H, K_W, GROUP, SHIFTED,
        )  # fmt: skip
        if MASK_PADDING:
            col_ok = k_in_map
        k = load_tokens(k_base, kt, ky, kx, dims, k_st, k_sh, k_sw, k_sd, k_in_map, HEAD_DIM, BLOCK_D)
        product = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [M, N]
        scores = window_scores(
            product, score_scale, bias_base, rows[:, None], cols[None, :], bias_sq, bias_sk, row_ok[:, None],
            col_ok[None, :], row_label[:, None], col_label[None, :], Q_TOKENS, K_TOKENS, HAS_BIAS, SHIFTED or GROUP > 1,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(scores, 1))
        subtracted = tl.where(new_top == -float("inf"), 0.0, new_top)  # no visible key so far
        weights = _exponential(scores - subtracted[:, None], HAS_BIAS)
        decay = _exponential(top - subtracted, HAS_BIAS)
        total = total * decay + tl.sum(weights, 1)
        v = load_tokens(v_base, kt, ky, kx, v_dims, v_st, v_sh, v_sw, v_sd, k_in_map, V_DIM, BLOCK_DV)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        top = new_top

    seen = total > 0
    safe_total = tl.where(seen, total, 1.0)
    acc /= safe_total[:, None]
    out_base = out_ptr + image * out_sb + head * out_sn
    store_tokens(out_base, t, y, x, v_dims, out_st, out_sh, out_sw, out_sd, in_map, acc, V_DIM, BLOCK_DV)
    # +inf makes every weight zero in the backward pass
    lse = top + (tl.log(safe_total) if HAS_BIAS else tl.log2(safe_total))
    tl.store(lse_ptr + start + rows, tl.where(seen, lse, float("inf")), mask=row_ok)


@tuned
@triton.jit
def window_attention_bwd_q_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr,
    q_sb, q_st, q_sh, q_sw, q_sn, q_sd, k_sb, k_st, k_sh, k_sw, k_sn, k_sd,
    v_sb, v_st, v_sh, v_sw, v_sn, v_sd, out_sb, out_st, out_sh, out_sw, out_sn, out_sd,
    dout_sb, dout_st, dout_sh, dout_sw, dout_sn, dout_sd, dq_sb, dq_st, dq_sh, dq_sw, dq_sn, dq_sd,
    bias_sn, bias_sq, bias_sk, num_images, num_heads, grid_t, grid_h, grid_w, kv_t, kv_h, kv_w,
    shift_t, shift_h, shift_w,
    scale, score_scale, width_class,
    Q_TOKENS: tl.constexpr, Q_H: tl.constexpr, Q_W: tl.constexpr,
    K_TOKENS: tl.constexpr, K_H: tl.constexpr, K_W: tl.constexpr,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_BIAS: tl.constexpr, SHIFTED: tl.constexpr, MASK_PADDING: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of BLOCK_M queries of one head, and delta, their rows of sum(doutput * output)."""
    tiles: tl.constexpr = (GROUP * Q_TOKENS + BLOCK_M - 1) // BLOCK_M
    head, place = (tl.program_id(0) % num_heads).to(tl.int64), tl.program_id(0) // num_heads
    image, window_t, window_h, first, start = locate(
        place // tiles, head, num_heads, grid_t, grid_h, grid_w, Q_TOKENS, Q_H, Q_W, GROUP
    )
    dims, v_dims = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    rows = place % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    t, y, x, row_ok, in_map, row_label = find_tokens(
        rows, window_t, window_h, first, grid_t, grid_h, grid_w, shift_t, shift_h, shift_w,
        Q_TOKENS, Q_H, Q_W, GROUP, SHIFTED,
    )  # fmt: skip
    q_base = q_ptr + image * q_sb + head * q_sn
    q = load_tokens(q_base, t, y, x, dims, q_st, q_sh, q_sw, q_sd, in_map, HEAD_DIM, BLOCK_D)
    out_base = out_ptr + image * out_sb + head * out_sn
    out = load_tokens(out_base, t, y, x, v_dims, out_st, out_sh, out_sw, out_sd, in_map, V_DIM, BLOCK_DV)
    dout_base = dout_ptr + image * dout_sb + head * dout_sn
    dout = load_tokens(dout_base, t, y, x, v_dims, dout_st, dout_sh, dout_sw, dout_sd, in_map, V_DIM, BLOCK_DV)
    lse = tl.load(lse_ptr + start + rows, mask=row_ok, other=float("inf"))
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(delta_ptr + start + rows, delta, mask=row_ok)
    k_base = k_ptr + image * k_sb + head * k_sn
    v_base = v_ptr + image * v_sb + head * v_sn
    bias_base = bias_ptr
    if HAS_BIAS:
        bias_base += head * bias_sn

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start_n in range(0, GROUP * K_TOKENS, BLOCK_N):
        cols = start_n + tl.arange(0, BLOCK_N)
        kt, ky, kx, col_ok, k_in_map, col_label = find_tokens(
            cols, window_t, window_h, first, kv_t, kv_h, kv_w, shift_t, shift_h, shift_w,
            K_TOKENS, K_H, K_W, GROUP, SHIFTED,
        )  # fmt: skip
        if MASK_PADDING:
            col_ok = k_in_map
        k = load_tokens(k_base, kt, ky, kx, dims, k_st, k_sh, k_sw, k_sd, k_in_map, HEAD_DIM, BLOCK_D)
        v = load_tokens(v_base, kt, ky, kx, v_dims, v_st, v_sh, v_sw, v_sd, k_in_map, V_DIM, BLOCK_DV)
        product = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [M, N]
        scores = window_scores(
            product, score_scale, bias_base, rows[:, None], cols[None, :], bias_sq, bias_sk, row_ok[:, None],
            col_ok[None, :], row_label[:, None], col_label[None, :], Q_TOKENS, K_TOKENS, HAS_BIAS, SHIFTED or GROUP > 1,
        )  # fmt: skip
        weights = _exponential(scores - lse[:, None], HAS_BIAS)
        dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        dscores = weights * (dweights - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)

    dq_base = dq_ptr + image * dq_sb + head * dq_sn
    store_tokens(dq_base, t, y, x, dims, dq_st, dq_sh, dq_sw, dq_sd, in_map, dq * scale, HEAD_DIM, BLOCK_D)


@tuned
@triton.jit
def window_attention_bwd_kv_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr, dbias_ptr,
    q_sb, q_st, q_sh, q_sw, q_sn, q_sd, k_sb, k_st, k_sh, k_sw, k_sn, k_sd,
    v_sb, v_st, v_sh, v_sw, v_sn, v_sd, out_sb, out_st, out_sh, out_sw, out_sn, out_sd,
    dout_sb, dout_st, dout_sh, dout_sw, dout_sn, dout_sd, dq_sb, dq_st, dq_sh, dq_sw, dq_sn, dq_sd,
    dk_sb, dk_st, dk_sh, dk_sw, dk_sn, dk_sd, dv_sb, dv_st, dv_sh, dv_sw, dv_sn, dv_sd,
    bias_sn, bias_sq, bias_sk, num_images, num_heads, grid_t, grid_h, grid_w, kv_t, kv_h, kv_w,
    shift_t, shift_h, shift_w,
    scale, score_scale, width_class,
    Q_TOKENS: tl.constexpr, Q_H: tl.constexpr, Q_W: tl.constexpr,
    K_TOKENS: tl.constexpr, K_H: tl.constexpr, K_W: tl.constexpr,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_BIAS: tl.constexpr, SHIFTED: tl.constexpr, MASK_PADDING: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr,
    FUSED: tl.constexpr, BIAS_GRADIENT: tl.constexpr,
):  # fmt: skip
    """One program: the gradients of BLOCK_N keys and values of one head, in every group of a split; tiles are [N, M].

    FUSED: these are all keys of a group, and the gradients of its queries are computed along the way; delta is stored
    if wanted. BIAS_GRADIENT: so is the gradient of the bias, summed over the split, in `dbias`, see the next kernel.
    """
    tiles: tl.constexpr = (GROUP * K_TOKENS + BLOCK_N - 1) // BLOCK_N
    head, place = (tl.program_id(0) % num_heads).to(tl.int64), tl.program_id(0) // num_heads
    dims, v_dims = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    cols = place % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    split, num_splits = place // tiles, tl.num_programs(0) // (num_heads * tiles)
    window_rows = num_images * tl.cdiv(grid_t, Q_TOKENS // (Q_H * Q_W)) * tl.cdiv(grid_h, Q_H)
    bias_base = bias_ptr
    if HAS_BIAS:
        bias_base += head * bias_sn
    dbias = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)

    for group in range(split, window_rows * tl.cdiv(tl.cdiv(grid_w, Q_W), GROUP), num_splits):
        image, window_t, window_h, first, start = locate(
            group, head, num_heads, grid_t, grid_h, grid_w, Q_TOKENS, Q_H, Q_W, GROUP
        )
        kt, ky, kx, col_ok, k_in_map, col_label = find_tokens(
            cols, window_t, window_h, first, kv_t, kv_h, kv_w, shift_t, shift_h, shift_w,
            K_TOKENS, K_H, K_W, GROUP, SHIFTED,
        )  # fmt: skip
        if MASK_PADDING:
            col_ok = k_in_map
        k_base = k_ptr + image * k_sb + head * k_sn
        k = load_tokens(k_base, kt, ky, kx, dims, k_st, k_sh, k_sw, k_sd, k_in_map, HEAD_DIM, BLOCK_D)
        v_base = v_ptr + image * v_sb + head * v_sn
        v = load_tokens(v_base, kt, ky, kx, v_dims, v_st, v_sh, v_sw, v_sd, k_in_map, V_DIM, BLOCK_DV)
        q_base = q_ptr + image * q_sb + head * q_sn
        dout_base = dout_ptr + image * dout_sb + head * dout_sn

        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
        for start_m in range(0, GROUP * Q_TOKENS, BLOCK_M):
            rows = start_m + tl.arange(0, BLOCK_M)
            t, y, x, row_ok, in_map, row_label = find_tokens(
                rows, window_t, window_h, first, grid_t, grid_h, grid_w, shift_t, shift_h, shift_w,
                Q_TOKENS, Q_H, Q_W, GROUP, SHIFTED,
            )  # fmt: skip
            q = load_tokens(q_base, t, y, x, dims, q_st, q_sh, q_sw, q_sd, in_map, HEAD_DIM, BLOCK_D)
            dout = load_tokens(dout_base, t, y, x, v_dims, dout_st, dout_sh, dout_sw, dout_sd, in_map, V_DIM, BLOCK_DV)
            lse = tl.load(lse_ptr + start + rows, mask=row_ok, other=float("inf"))
            if FUSED:
                out_base = out_ptr + image * out_sb + head * out_sn
                out = load_tokens(out_base, t, y, x, v_dims, out_st, out_sh, out_sw, out_sd, in_map, V_DIM, BLOCK_DV)
                delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
                if delta_ptr is not None:
                    tl.store(delta_ptr + start + rows, delta, mask=row_ok)
            else:
                delta = tl.load(delta_ptr + start + rows, mask=row_ok, other=0.0)
            product = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [N, M]
            scores = window_scores(
                product, score_scale, bias_base, rows[None, :], cols[:, None], bias_sq, bias_sk, row_ok[None, :],
                col_ok[:, None], row_label[None, :], col_label[:, None], Q_TOKENS, K_TOKENS, HAS_BIAS,
                SHIFTED or GROUP > 1,
            )  # fmt: skip
            weights = _exponential(scores - lse[None, :], HAS_BIAS)
            dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision=PRECISION)
            dweights = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
            dscores = weights * (dweights - delta[None, :])
            dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
            if FUSED:
                dq = tl.dot(tl.trans(dscores.to(k.dtype)), k, input_precision=PRECISION) * scale
                dq_base = dq_ptr + image * dq_sb + head * dq_sn
                store_tokens(dq_base, t, y, x, dims, dq_st, dq_sh, dq_sw, dq_sd, in_map, dq, HEAD_DIM, BLOCK_D)
            if BIAS_GRADIENT:
                dbias += dscores

        dk_base = dk_ptr + image * dk_sb + head * dk_sn
        store_tokens(dk_base, kt, ky, kx, dims, dk_st, dk_sh, dk_sw, dk_sd, k_in_map, dk * scale, HEAD_DIM, BLOCK_D)
        dv_base = dv_ptr + image * dv_sb + head * dv_sn
        store_tokens(dv_base, kt, ky, kx, v_dims, dv_st, dv_sh, dv_sw, dv_sd, k_in_map, dv, V_DIM, BLOCK_DV)

    if BIAS_GRADIENT:
        rows = tl.arange(0, BLOCK_M)[None, :]
        pointers = dbias_ptr + (split * num_heads + head) * Q_TOKENS * K_TOKENS + rows * K_TOKENS + cols[:, None]
        tl.store(pointers, dbias, mask=(rows < Q_TOKENS) & (cols[:, None] < K_TOKENS))


@tuned
@triton.jit
def window_attention_bwd_bias_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, dout_ptr, lse_ptr, delta_ptr, dbias_ptr,
    q_sb, q_st, q_sh, q_sw, q_sn, q_sd, k_sb, k_st, k_sh, k_sw, k_sn, k_sd,
    v_sb, v_st, v_sh, v_sw, v_sn, v_sd, dout_sb, dout_st, dout_sh, dout_sw, dout_sn, dout_sd,
    bias_sn, bias_sq, bias_sk, num_images, num_heads, grid_t, grid_h, grid_w, kv_t, kv_h, kv_w,
    shift_t, shift_h, shift_w,
    score_scale, width_class,
    Q_TOKENS: tl.constexpr, Q_H: tl.constexpr, Q_W: tl.constexpr,
    K_TOKENS: tl.constexpr, K_H: tl.constexpr, K_W: tl.constexpr,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_BIAS: tl.constexpr, SHIFTED: tl.constexpr, MASK_PADDING: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr,
    BIAS_GRADIENT: tl.constexpr,
):  # fmt: skip
    """One program: a tile of the bias gradient of one head, summed over one split of the windows of all images.

    `dbias` is contiguous, (splits, heads, Q_TOKENS, K_TOKENS).
    """
    row_tiles: tl.constexpr = (Q_TOKENS + BLOCK_M - 1) // BLOCK_M
    col_tiles: tl.constexpr = (K_TOKENS + BLOCK_N - 1) // BLOCK_N
    head, place = (tl.program_id(0) % num_heads).to(tl.int64), tl.program_id(0) // num_heads
    split, num_splits = place // (row_tiles * col_tiles), tl.num_programs(0) // (num_heads * row_tiles * col_tiles)
    rows = place // col_tiles % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = place % col_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    dims, v_dims = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    window_rows = num_images * tl.cdiv(grid_t, Q_TOKENS // (Q_H * Q_W)) * tl.cdiv(grid_h, Q_H)
    bias_base = bias_ptr + head * bias_sn

    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for window in range(split, window_rows * tl.cdiv(grid_w, Q_W), num_splits):
        image, window_t, window_h, first, start = locate(
            window, head, num_heads, grid_t, grid_h, grid_w, Q_TOKENS, Q_H, Q_W, GROUP
        )
        t, y, x, row_ok, in_map, row_label = find_tokens(
            rows, window_t, window_h, first, grid_t, grid_h, grid_w, shift_t, shift_h, shift_w,
            Q_TOKENS, Q_H, Q_W, GROUP, SHIFTED,
        )  # fmt: skip
        kt, ky, kx, col_ok, k_in_map, col_label = find_tokens(
            cols, window_t, window_h, first, kv_t, kv_h, kv_w, shift_t, shift_h, shift_w,
            K_TOKENS, K_H, K_W, GROUP, SHIFTED,
        )  # fmt: skip
        if MASK_PADDING:
            col_ok = k_in_map
        q_base = q_ptr + image * q_sb + head * q_sn
        q = load_tokens(q_base, t, y, x, dims, q_st, q_sh, q_sw, q_sd, in_map, HEAD_DIM, BLOCK_D)
        k_base = k_ptr + image * k_sb + head * k_sn
        k = load_tokens(k_base, kt, ky, kx, dims, k_st, k_sh, k_sw, k_sd, k_in_map, HEAD_DIM, BLOCK_D)
        product = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [M, N]
        scores = window_scores(
            product, score_scale, bias_base, rows[:, None], cols[None, :], bias_sq, bias_sk, row_ok[:, None],
            col_ok[None, :], row_label[:, None], col_label[None, :], Q_TOKENS, K_TOKENS, HAS_BIAS, SHIFTED or GROUP > 1,
        )  # fmt: skip
        lse = tl.load(lse_ptr + start + rows, mask=row_ok, other=float("inf"))
        delta = tl.load(delta_ptr + start + rows, mask=row_ok, other=0.0)
        weights = _exponential(scores - lse[:, None], HAS_BIAS)
        dout_base = dout_ptr + image * dout_sb + head * dout_sn
        dout = load_tokens(dout_base, t, y, x, v_dims, dout_st, dout_sh, dout_sw, dout_sd, in_map, V_DIM, BLOCK_DV)
        v_base = v_ptr + image * v_sb + head * v_sn
        v = load_tokens(v_base, kt, ky, kx, v_dims, v_st, v_sh, v_sw, v_sd, k_in_map, V_DIM, BLOCK_DV)
        dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        dbias += weights * (dweights - delta[:, None])

    pointers = dbias_ptr + (split * num_heads + head) * Q_TOKENS * K_TOKENS + rows[:, None] * K_TOKENS + cols[None, :]
    tl.store(pointers, dbias, mask=(rows < Q_TOKENS)[:, None] & (cols < K_TOKENS)[None, :])


def _groups(meta: dict[str, Any], geometry: Geometry) -> int:
    """Number of groups of windows in the maps of a batch, times heads."""
    windows_t, windows_h, windows_w = geometry.windows
    return meta["num_images"] * meta["num_heads"] * windows_t * windows_h * triton.cdiv(windows_w, meta["GROUP"])


def _query_tiles(meta: dict[str, Any]) -> int:
    return triton.cdiv(meta["GROUP"] * meta["Q_TOKENS"], meta["BLOCK_M"])


def _key_tiles(meta: dict[str, Any]) -> int:
    return triton.cdiv(meta["GROUP"] * meta["K_TOKENS"], meta["BLOCK_N"])


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    scale: float,
    output: Tensor,
    lse: Tensor,
) -> None:
    """Fill `output` and `lse`; maps are (B, T, H, W, heads, d) of any strides."""
    if output.numel() == 0:
        return
    with torch.cuda.device_of(q):
        window_attention_fwd_kernel[lambda meta: (_groups(meta, geometry) * _query_tiles(meta),)](
            **common_arguments(q, k, v, bias, geometry, scale), **strides_of("out", output), out_ptr=output, lse_ptr=lse
        )


def launch_backward(
    doutput: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    scale: float,
    output: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dbias: Tensor,
) -> None:
    """Fill `dq`, `dk`, `dv` and, unless it is empty, `dbias`; maps have any strides."""
    if output.numel() == 0:
        for gradient in (dq, dk, dv, dbias):
            gradient.zero_()
        return
    fused = prod(geometry.kv_window) <= FUSED_TOKENS
    bias_inside = fused and dbias.numel() > 0 and prod(geometry.window) <= FUSED_TOKENS
    bias_outside = dbias.numel() > 0 and not bias_inside
    common = common_arguments(q, k, v, bias, geometry, scale) | strides_of("dout", doutput)
    common |= {"dout_ptr": doutput, "lse_ptr": lse}
    common["delta_ptr"] = torch.empty_like(lse) if bias_outside or not fused else None
    common |= strides_of("out", output) | strides_of("dq", dq) | {"out_ptr": output, "dq_ptr": dq, "scale": scale}
    with torch.cuda.device_of(q):
        if not fused:
            window_attention_bwd_q_kernel[lambda meta: (_groups(meta, geometry) * _query_tiles(meta),)](**common)
        partial = _empty_partial_sums(q, geometry, dbias)
        programs = partial.shape[:2].numel()
        window_attention_bwd_kv_kernel[
            lambda meta: (programs if bias_inside else _groups(meta, geometry) * _key_tiles(meta),)
        ](
            **common,
            **strides_of("dk", dk),
            **strides_of("dv", dv),
            dk_ptr=dk,
            dv_ptr=dv,
            dbias_ptr=partial if bias_inside else None,
            FUSED=fused,
            BIAS_GRADIENT=bias_inside,
        )
        if bias_outside:
            unused = {"out_ptr", "dq_ptr", "scale", *strides_of("out", output), *strides_of("dq", dq)}
            window_attention_bwd_bias_kernel[lambda meta: (programs * _query_tiles(meta) * _key_tiles(meta),)](
                **{name: value for name, value in common.items() if name not in unused},
                dbias_ptr=partial,
                BIAS_GRADIENT=True,
            )
    if dbias.numel() > 0:
        dbias.copy_(partial.sum(0).sum_to_size(dbias.shape))


def _empty_partial_sums(q: Tensor, geometry: Geometry, dbias: Tensor) -> Tensor:
    """Return an empty (splits, heads, queries, keys) for sums of the bias gradient over splits of the windows."""
    if dbias.numel() == 0:
        return q.new_empty((0, 0))
    num_heads, (_, queries, keys) = q.shape[4], dbias.shape
    tiles = num_heads * triton.cdiv(queries, FUSED_TOKENS) * triton.cdiv(keys, FUSED_TOKENS)
    splits = min(q.shape[0] * prod(geometry.windows), triton.cdiv(2 * PROGRAMS_WANTED, tiles))
    return q.new_empty((splits, num_heads, queries, keys), dtype=torch.float32)
