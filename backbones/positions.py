"""Position tables: their index, and those of another image or window size resized as the model's family does it."""

import math
import re
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from torch import Tensor, nn

from backbones.token_pooling import resize_sequence


def relative_index(height: int, width: int) -> Tensor:
    """Row of a relative bias table for each query and key of a grid of L = height * width tokens, (L, L) int64."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    y, x = y.flatten(), x.flatten()
    return (y[:, None] - y + height - 1) * (2 * width - 1) + (x[:, None] - x + width - 1)


def resize_positions(model: nn.Module, name: str, tensor: Tensor, target: Tensor) -> Tensor:
    """Resize what a file holds for the position table `name` of `model` to the shape of `target`, its value there.

    LIT's relative tables are resized bicubically (LIT's own rule), others by timm's rule; absolute embeddings (1, N, C)
    of LIT-Ti bilinearly and of Vision Transformers bicubically as maps, those of pooled sequences linearly. What the
    file holds must belong to a square grid, but for sequences. Anything else is returned as it is.
    """
    if tensor.shape == target.shape or tensor.ndim != target.ndim or tensor.shape[-1] != target.shape[-1]:
        return tensor
    parent, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(parent)
    if leaf == "relative_position_bias_table":
        if isinstance(grid := getattr(module, "grid_size", None), tuple):
            return resize_relative_table(tensor, grid)
        window = (math.isqrt(len(target)) + 1) // 2
        return resize_rel_pos_bias_table(tensor, new_window_size=(window, window), new_bias_shape=tuple(target.shape))
    if tensor.ndim != 3:
        return tensor
    if leaf == "pos_embed" and hasattr(module, "pooling"):
        return resize_sequence(tensor, target.shape[1])
    if leaf == "pos_embed":
        return _resize_map(tensor, target, getattr(getattr(module, "patch_embed", None), "grid_size", None), "bicubic")
    if numbered := re.fullmatch(r"pos_embed([1-4])", leaf):
        grids = getattr(module, "grids", None)
        return _resize_map(tensor, target, grids[int(numbered[1]) - 1] if grids else None, "bilinear")
    return tensor


def resize_relative_table(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize a relative position bias table ((2S - 1)², heads) of a square grid to ((2H - 1) (2W - 1), heads).

    Bicubic, as LIT's dense-prediction code resizes the tables of classifiers. A table of another grid is returned as it
    is.
    """
    side = math.isqrt(len(table))
    if side**2 != len(table) or side % 2 == 0:
        return table
    values = table.double().t().reshape(1, -1, side, side)
    size = (2 * grid[0] - 1, 2 * grid[1] - 1)
    resized = F.interpolate(values, size=size, mode="bicubic", align_corners=False)
    return resized[0].flatten(1).t().to(table.dtype)


def _resize_map(tensor: Tensor, target: Tensor, grid: tuple[int, int] | None, mode: str) -> Tensor:
    """Resize an absolute embedding (1, N, C) of a square grid, with or without a class token in front.

    `grid` is the height and width of the target's grid, square where None.
    """
    for prefix in (0, 1):
        old, new = (math.isqrt(t.shape[1] - prefix) for t in (tensor, target))
        height, width = grid or (new, new)
        if old**2 + prefix == tensor.shape[1] and height * width + prefix == target.shape[1]:
            return resample_abs_pos_embed(
                tensor,
                [height, width],
                [old, old],
                num_prefix_tokens=prefix,
                interpolation=mode,
                antialias=mode == "bicubic",
            )
    return tensor
