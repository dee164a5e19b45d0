"""Multi-scale deformable attention: every query reads a few points of every feature level.

Deformable DETR (arXiv 2010.04159), equation 3.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import choose_path


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]] | Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Sum bilinear samples of `value`, weighted by `attention_weights`.

    `value` is (B, S, heads, d) with the levels of `spatial_shapes`, `(H, W)` each, concatenated row-major along S.
    `sampling_locations` is (B, Lq, heads, levels, points, 2), (x, y) in [0, 1] with 0 and 1 at the outer pixel edges;
    samples outside are zero. `attention_weights` is (B, Lq, heads, levels, points). Returns (B, Lq, heads * d) in the
    dtype of `value`; bilinear weights are computed in the dtype of `sampling_locations` when that is wider.
    Raises `ValueError` when shapes do not fit and `TypeError` when a tensor is not floating point.
    """
    shapes = [(int(height), int(width)) for height, width in spatial_shapes]
    _check_arguments(value, shapes, sampling_locations, attention_weights)
    choose_path("ms_deform_attn", value, has_triton=False)  # raises when Triton is insisted on
    return ms_deform_attn_reference(value, shapes, sampling_locations, attention_weights)


def _check_arguments(
    value: Tensor, shapes: list[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> None:
    tensors = {"value": value, "sampling_locations": sampling_locations, "attention_weights": attention_weights}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"ms_deform_attn: {name} is {tensor.dtype}, expected a floating point tensor")
    if value.ndim != 4:
        raise ValueError(f"ms_deform_attn: value has shape {tuple(value.shape)}, expected (B, S, heads, d)")
    batch, length, num_heads, _ = value.shape
    if sampling_locations.ndim != 6 or sampling_locations.shape[-1] != 2:
        raise ValueError(
            f"ms_deform_attn: sampling_locations has shape {tuple(sampling_locations.shape)}, "
            "expected (B, Lq, heads, levels, points, 2)"
        )
    got = (sampling_locations.shape[0], sampling_locations.shape[2], sampling_locations.shape[3])
    if got != (batch, num_heads, len(shapes)):
        raise ValueError(
            f"ms_deform_attn: sampling_locations is for (batch, heads, levels) = {got}, "
            f"expected {(batch, num_heads, len(shapes))} as in value and spatial_shapes"
        )
    if attention_weights.shape != sampling_locations.shape[:-1]:
        raise ValueError(
            f"ms_deform_attn: attention_weights has shape {tuple(attention_weights.shape)}, "
            f"expected {tuple(sampling_locations.shape[:-1])} as in sampling_locations"
        )
    if sum(height * width for height, width in shapes) != length:
        raise ValueError(f"ms_deform_attn: value has {length} positions, but spatial_shapes {shapes} add up to another")


def ms_deform_attn_reference(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Compute `ms_deform_attn` with one `grid_sample` per level; differentiable in all three tensors."""
    batch, _, num_heads, head_dim = value.shape
    _, num_queries, _, _, num_points, _ = sampling_locations.shape
    dtype = torch.promote_types(value.dtype, sampling_locations.dtype)
    grids = 2 * sampling_locations.to(dtype) - 1
    weights = attention_weights.to(dtype)
    levels = value.to(dtype).split([height * width for height, width in spatial_shapes], dim=1)

    output = value.new_zeros(batch * num_heads, head_dim, num_queries, dtype=dtype)
    for level, (height, width) in enumerate(spatial_shapes):
        maps = levels[level].permute(0, 2, 3, 1).reshape(batch * num_heads, head_dim, height, width)
        grid = grids[:, :, :, level].transpose(1, 2).reshape(batch * num_heads, num_queries, num_points, 2)
        samples = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        weight = weights[:, :, :, level].transpose(1, 2).reshape(batch * num_heads, 1, num_queries, num_points)
        output = output + (samples * weight).sum(-1)  # (B * heads, d, Lq)
    return output.reshape(batch, num_heads * head_dim, num_queries).transpose(1, 2).to(value.dtype)
