"""Attention within windows: `window_attention`, and `hilo` with its second branch."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.kernel_cases.base import (
    OURS,
    Candidate,
    Case,
    Draw,
    Inputs,
    compiled,
    reference_and_compiled,
    with_backends,
)
from kernels.hilo import hilo, hilo_reference
from kernels.window_attention import window_attention, window_attention_reference

Sizes = tuple[int, ...]  # one number per axis of a map


def partition(tokens: Tensor, window: Sizes) -> Tensor:
    """Cut a map (B, *grid, heads, d) into windows (B * windows, heads, tokens, d): the copy that a kernel saves."""
    axes = len(window)
    grid = tokens.shape[1 : axes + 1]
    cut = [part for size, side in zip(grid, window, strict=True) for part in (size // side, side)]
    tokens = tokens.reshape(tokens.shape[0], *cut, *tokens.shape[-2:])
    order = [0, *range(1, 2 * axes, 2), 2 * axes + 1, *range(2, 2 * axes + 1, 2), 2 * axes + 2]
    tokens = tokens.permute(order)
    return tokens.reshape(-1, tokens.shape[axes + 1], math.prod(window), tokens.shape[-1])


def merge(windows: Tensor, window: Sizes, grid: Sizes) -> Tensor:
    """Put windows (B * windows, heads, tokens, d) back together, (B, *grid, heads * d)."""
    axes, (heads, _, dim) = len(window), windows.shape[1:]
    counts = [size // side for size, side in zip(grid, window, strict=True)]
    windows = windows.reshape(-1, *counts, heads, *window, dim)
    order = [0, *(number for axis in range(axes) for number in (1 + axis, 2 + axes + axis)), axes + 1, 2 * axes + 2]
    return windows.permute(order).reshape(-1, *grid, heads * dim)


def crossed_edge(grid: Sizes, window: Sizes, shift: Sizes, device: torch.device) -> Tensor:
    """Pairs of tokens of each window that a shift brought together from opposite edges, (windows, 1, N, N) bool."""
    sides = torch.zeros(grid, dtype=torch.int64, device=device)
    for axis, (size, by) in enumerate(zip(grid, shift, strict=True)):
        came_around = torch.arange(size, device=device) >= size - by
        sides += came_around.view([-1 if axis == other else 1 for other in range(len(grid))]) << axis
    windows = partition(sides[None, ..., None, None], window)[:, 0, :, 0]  # (windows, N)
    return windows[:, None, :, None] != windows[:, None, None, :]


@dataclass(frozen=True, kw_only=True)
class WindowAttentionCase(Case):
    """Maps of `grid` tokens; keys and values are projected with the queries unless `kv_window` reduces them."""

    op: ClassVar[str] = "window_attention"
    yardstick_inputs: ClassVar[tuple[str, ...]] = ("unseen",)
    backward_products: ClassVar[float] = 2.5
    grid: Sizes
    heads: int
    dim: int
    window: Sizes
    kv_window: Sizes | None = None
    shift: Sizes | None = None
    bias: bool = False

    def inputs(self, draw: Draw) -> Inputs:
        """qkv (B, *grid, 3, heads, d), or q and the reduced k and v; bias (heads, N, N) for windows of N tokens.

        For compositions with a shift, which know it beforehand: unseen (windows, 1, N, N), -inf where a key is hidden.
        """
        if self.kv_window is None:
            inputs = {"qkv": draw.normal(self.batch, *self.grid, 3, self.heads, self.dim)}
        else:
            sides = zip(self.grid, self.window, self.kv_window, strict=True)
            kv_grid = [size // side * kv_side for size, side, kv_side in sides]
            inputs = {"q": draw.normal(self.batch, *self.grid, self.heads, self.dim)}
            inputs |= {name: draw.normal(self.batch, *kv_grid, self.heads, self.dim) for name in "kv"}
        if self.bias:
            inputs["bias"] = draw.normal(self.heads, math.prod(self.window), math.prod(self.window))
        if self.shift is not None:
            crossed = crossed_edge(self.grid, self.window, self.shift, draw.device)
            inputs["unseen"] = torch.zeros(crossed.shape, dtype=draw.dtype, device=draw.device)
            inputs["unseen"].masked_fill_(crossed, -torch.inf)
        return inputs

    def forward_flops(self) -> float:
        """Two products per score."""
        scores = self.batch * self.heads * math.prod(self.grid) * math.prod(self.kv_window or self.window)
        return 4.0 * scores * self.dim

    def reference(self, inputs: Inputs) -> Tensor:
        """The definition."""
        return self._attend(window_attention_reference, inputs)

    def candidates(self) -> dict[str, Candidate]:
        """Windows cut by a copy, then PyTorch's attention with each backend; the same compiled; the definition."""
        backends = with_backends(self._compose)
        return {
            OURS: Candidate(lambda inputs: self._attend(window_attention, inputs)),
            **{f"partition + {name}": candidate for name, candidate in backends.items()},
            "partition + SDPA, torch.compile": Candidate(
                compiled(lambda inputs: self._compose(inputs, torch.nn.functional.scaled_dot_product_attention)),
                on_cpu=False,
            ),
            **reference_and_compiled(self.reference),
        }

    def _attend(self, attend: Callable[..., Tensor], inputs: Inputs) -> Tensor:
        q, k, v = self._projected(inputs)
        output = attend(q, k, v, self.window, kv_window=self.kv_window, bias=inputs.get("bias"), shift=self.shift)
        return output.flatten(-2)

    def _projected(self, inputs: Inputs) -> tuple[Tensor, ...]:
        if "qkv" in inputs:
            return inputs["qkv"].unbind(-3)
        return tuple(inputs[name] for name in "qkv")

    def _compose(self, inputs: Inputs, scaled_dot_product_attention: Callable[..., Tensor]) -> Tensor:
        """Roll, cut, attend, put together and roll back, as Swin does."""
        maps = list(self._projected(inputs))
        axes = tuple(range(1, 1 + len(self.grid)))
        bias = inputs["bias"][None] if self.bias else None  # (1, heads, N, N)
        if self.shift is not None:
            back = tuple(-by for by in self.shift)
            maps = [tokens.roll(back, axes) for tokens in maps]
            unseen = inputs["unseen"]
            bias = (unseen if bias is None else bias + unseen).repeat(self.batch, 1, 1, 1)
        q = partition(maps[0], self.window)
        k, v = (partition(tokens, self.kv_window or self.window) for tokens in maps[1:])
        output = merge(scaled_dot_product_attention(q, k, v, attn_mask=bias), self.window, self.grid)
        return output if self.shift is None else output.roll(self.shift, axes)


@dataclass(frozen=True, kw_only=True)
class HiLoCase(Case):
    """Maps of `grid` tokens, of which `hi_heads` attend in windows and `lo_heads` to the map pooled by the window."""

    op: ClassVar[str] = "hilo"
    backward_products: ClassVar[float] = 2.5
    grid: tuple[int, int]
    hi_heads: int
    lo_heads: int
    dim: int
    window: int

    def inputs(self, draw: Draw) -> Inputs:
        """hi_qkv (B, H, W, 3, hi_heads, d), lo_q (B, H, W, lo_heads, d), lo_kv (B, H / s, W / s, 2, lo_heads, d)."""
        pooled = [size // self.window for size in self.grid]
        return {
            "hi_qkv": draw.normal(self.batch, *self.grid, 3, self.hi_heads, self.dim),
            "lo_q": draw.normal(self.batch, *self.grid, self.lo_heads, self.dim),
            "lo_kv": draw.normal(self.batch, *pooled, 2, self.lo_heads, self.dim),
        }

    def forward_flops(self) -> float:
        """Two products per score of both branches."""
        tokens = math.prod(self.grid)
        keys = self.hi_heads * self.window**2 + self.lo_heads * (tokens // self.window**2)
        return 4.0 * self.batch * tokens * keys * self.dim

    def reference(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """The definition."""
        return hilo_reference(inputs["hi_qkv"], inputs["lo_q"], inputs["lo_kv"], self.window)

    def candidates(self) -> dict[str, Candidate]:
        """Both branches with PyTorch's attention, as they are and compiled; the definition."""
        backends = with_backends(self._compose)
        return {
            OURS: Candidate(lambda inputs: hilo(inputs["hi_qkv"], inputs["lo_q"], inputs["lo_kv"], self.window)),
            **{f"two branches, {name}": candidate for name, candidate in backends.items()},
            "two branches, SDPA, torch.compile": Candidate(
                compiled(lambda inputs: self._compose(inputs, torch.nn.functional.scaled_dot_product_attention)),
                on_cpu=False,
            ),
            **reference_and_compiled(self.reference),
        }

    def _compose(self, inputs: Inputs, scaled_dot_product_attention: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        """HiLo of the official code with fused attention, from the projections on."""
        window = (self.window, self.window)
        # one copy for q, k and v of the windows: (B * windows, 3 * heads, tokens, d)
        q, k, v = partition(inputs["hi_qkv"].flatten(3, 4), window).chunk(3, dim=1)
        hi_fi = merge(scaled_dot_product_attention(q, k, v), window, self.grid)
        q = inputs["lo_q"].flatten(1, 2).transpose(1, 2)
        k, v = (x.transpose(1, 2) for x in inputs["lo_kv"].flatten(1, 2).unbind(2))
        lo_fi = scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(hi_fi.shape[0], *self.grid, -1)
        return hi_fi, lo_fi
