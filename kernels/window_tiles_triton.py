"""What the Triton kernels of `kernels.window_attention` share: sizes of blocks, positions of tokens, tiles of maps.

Needs triton. A program serves a group: one or more windows side by side. The queries and the keys of a group are
numbered window by window; a number is decoded into a position, so maps are read and written where they are.
"""

# Arguments of Triton functions have no Python types.
# mypy: disallow-untyped-defs=False
# ruff: noqa: ANN001, ANN201

import os
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_triton import LOG2_E
from kernels.window_attention import Geometry


def _block(tokens: int) -> int:
    return max(16, triton.next_power_of_2(tokens))


def _group(args: dict[str, Any]) -> int:
    """Windows per program; the gradient of a bias is summed over windows one by one."""
    return 1 if args.get("BIAS_GRADIENT") else max(1, args["TILE"] // max(args["Q_TOKENS"], args["K_TOKENS"]))


def _queries(args: dict[str, Any]) -> int:
    tokens = args["GROUP"] * args["Q_TOKENS"]
    return _block(tokens if args.get("FUSED") and args["BIAS_GRADIENT"] else min(tokens, args["TILE"]))


def _keys(args: dict[str, Any]) -> int:
    tokens = args["GROUP"] * args["K_TOKENS"]
    return _block(tokens if args.get("FUSED") else min(tokens, args["TILE"]))


def _prune(configs: list[Any], named_args: dict[str, Any], **kwargs: Any) -> list[Any]:
    """Leave out tiles of which a thread would have more scores than it has registers for."""
    args = named_args | kwargs
    scores_per_thread = 16 if args["q_ptr"].dtype == torch.float32 else 32

    def fits(config: Any) -> bool:
        sizes = args | config.kwargs
        sizes["GROUP"] = _group(sizes)
        return _queries(sizes) * _keys(sizes) <= scores_per_thread * 32 * config.num_warps

    return [config for config in configs if fits(config)]


def tuned(kernel: Any) -> Any:
    """Try tiles of 32 and 64 tokens, the interpreter the first; groups and blocks follow from the windows."""
    options = ((32, 4, 2), (32, 2, 2), (64, 4, 3), (64, 8, 2))  # tokens, warps, stages
    configs = [triton.Config({"TILE": tile}, num_warps=warps, num_stages=stages) for tile, warps, stages in options]
    if os.environ.get("TRITON_INTERPRET") == "1":
        configs = configs[:1]
    key = ["Q_TOKENS", "Q_H", "Q_W", "K_TOKENS", "HEAD_DIM", "V_DIM", "HAS_BIAS", "SHIFTED", "width_class"]
    key += ["BIAS_GRADIENT"] * ("BIAS_GRADIENT" in kernel.arg_names)
    prune = {"early_config_prune": _prune}
    tune = triton.autotune(configs=configs, key=key, prune_configs_by=prune, cache_results=True)
    return tune(triton.heuristics({"GROUP": _group, "BLOCK_M": _queries, "BLOCK_N": _keys})(kernel))


@triton.jit
def locate(
    group, head, num_heads, grid_t, grid_h, grid_w,
    TOKENS: tl.constexpr, H: tl.constexpr, W: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Return image, number of the windows along t and y, first one along x, and start of the group in statistics."""
    T: tl.constexpr = TOKENS // (H * W)
    windows_t, windows_h, windows_w = (grid_t + T - 1) // T, (grid_h + H - 1) // H, (grid_w + W - 1) // W
    groups = (windows_w + GROUP - 1) // GROUP
    row, first = group // groups, group % groups * GROUP
    image = (row // (windows_t * windows_h)).to(tl.int64)
    start = ((row.to(tl.int64) * num_heads + head) * windows_w + first) * TOKENS
    return image, row // windows_h % windows_t, row % windows_h, first, start


@triton.jit
def find_tokens(
    index, window_t, window_h, first, grid_t, grid_h, grid_w, shift_t, shift_h, shift_w,
    TOKENS: tl.constexpr, H: tl.constexpr, W: tl.constexpr, GROUP: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """Decode numbers in a group: coordinates, whether in a window, whether in the map, and what tells who sees whom."""
    window, token = index // TOKENS, index % TOKENS
    t = window_t * (TOKENS // (H * W)) + token // (H * W)
    y = window_h * H + token // W % H
    x = (first + window) * W + token % W
    in_window = (window < GROUP) & ((first + window) * W < grid_w)
    in_map = in_window & (t < grid_t) & (y < grid_h) & (x < grid_w)
    label = window
    if SHIFTED:
        t, y, x = t + shift_t, y + shift_h, x + shift_w
        # tokens that came around an edge
        past_t, past_y, past_x = t >= grid_t, y >= grid_h, x >= grid_w
        t, y, x = tl.where(past_t, t - grid_t, t), tl.where(past_y, y - grid_h, y), tl.where(past_x, x - grid_w, x)
        label = label * 8 + past_t.to(tl.int32) * 4 + past_y.to(tl.int32) * 2 + past_x.to(tl.int32)
    return t, y, x, in_window, in_map, label


@triton.jit
def load_tokens(
    base, t, y, x, dims, stride_t, stride_h, stride_w, stride_d, ok, DIM: tl.constexpr, BLOCK: tl.constexpr
):
    """Load a [tokens, BLOCK] tile of a map, zero where there is no token or no dimension."""
    offsets = t.to(tl.int64) * stride_t + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w
    tile_ok = ok[:, None]
    if BLOCK != DIM:
        tile_ok = tile_ok & (dims < DIM)[None, :]
    return tl.load(base + offsets[:, None] + dims[None, :] * stride_d, mask=tile_ok, other=0.0)


@triton.jit
def store_tokens(
    base, t, y, x, dims, stride_t, stride_h, stride_w, stride_d, ok, tile, DIM: tl.constexpr, BLOCK: tl.constexpr
):
    """Store where `load_tokens` would load."""
    offsets = t.to(tl.int64) * stride_t + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w
    tile_ok = ok[:, None]
    if BLOCK != DIM:
        tile_ok = tile_ok & (dims < DIM)[None, :]
    pointers = base + offsets[:, None] + dims[None, :] * stride_d
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=tile_ok)


@triton.jit
def window_scores(
    product, score_scale, bias_base, rows, cols, bias_sq, bias_sk, row_ok, col_ok, row_label, col_label,
    Q_TOKENS: tl.constexpr, K_TOKENS: tl.constexpr, HAS_BIAS: tl.constexpr, LABELS: tl.constexpr,
):  # fmt: skip
    """Turn products of queries `rows` and keys `cols` into scores, -inf where a query does not see a key."""
    scores = product * score_scale
    visible = col_ok
    if LABELS:
        visible = visible & (row_label == col_label)
    if HAS_BIAS:
        pointers = bias_base + rows % Q_TOKENS * bias_sq + cols % K_TOKENS * bias_sk
        scores += tl.load(pointers, mask=visible & row_ok, other=0.0).to(tl.float32)
    return tl.where(visible, scores, -float("inf"))


def strides_of(name: str, tensor: Tensor) -> dict[str, int]:
    """Return the strides of a map (B, T, H, W, heads, d) by the names of arguments."""
    return {f"{name}_s{dim}": stride for dim, stride in zip("bthwnd", tensor.stride(), strict=True)}


def common_arguments(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, geometry: Geometry, scale: float
) -> dict[str, Any]:
    """Return the arguments that all kernels take, by name."""
    arguments: dict[str, Any] = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "bias_ptr": bias}
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        arguments |= strides_of(name, tensor)
    strides = (0, 0, 0) if bias is None else (bias.stride(0) if bias.shape[0] > 1 else 0, *bias.stride()[1:])
    arguments |= dict(zip(("bias_sn", "bias_sq", "bias_sk"), strides, strict=True))
    for names, sizes in (("grid", geometry.grid), ("kv", geometry.kv_grid), ("shift", geometry.shift)):
        arguments |= {f"{names}_{axis}": size for axis, size in zip("thw", sizes, strict=True)}
    (*_, num_heads, head_dim), v_dim = q.shape, v.shape[5]
    allow_tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return arguments | {
        "num_images": q.shape[0], "num_heads": num_heads, "score_scale": scale * LOG2_E if bias is None else scale,
        "width_class": min(64, triton.next_power_of_2(geometry.windows[2])),
        "Q_TOKENS": prod(geometry.window), "Q_H": geometry.window[1], "Q_W": geometry.window[2],
        "K_TOKENS": prod(geometry.kv_window), "K_H": geometry.kv_window[1], "K_W": geometry.kv_window[2],
        "HEAD_DIM": head_dim, "V_DIM": v_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)), "BLOCK_DV": max(16, triton.next_power_of_2(v_dim)),
        "HAS_BIAS": bias is not None, "SHIFTED": any(geometry.shift), "MASK_PADDING": geometry.mask_padding,
        "PRECISION": "tf32" if allow_tf32 else "ieee",
    }  # fmt: skip
