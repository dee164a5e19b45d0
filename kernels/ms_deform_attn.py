"""Multi-scale deformable attention: every query reads a few points of every feature level.

Deformable DETR (arXiv 2010.04159), equation 3. The Triton kernels are in `kernels/ms_deform_attn_triton.py`.
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
    dtype of `value`; bilinear weights are computed in the dtype of `sampling_locations` when that is wider, by the
    kernels always in float32. Autocast casts nothing here: the projection before has chosen the dtype of `value`, and
    locations keep the digits that large maps need. float64 takes the reference on every device. The forward is
    deterministic; on a GPU the gradient of `value` is only under `torch.use_deterministic_algorithms(True)`.
    Raises `ValueError` when shapes or devices do not fit and `TypeError` when a tensor is not floating point.
    """
    shapes = [(int(height), int(width)) for height, width in spatial_shapes]
    _check_arguments(value, shapes, sampling_locations, attention_weights)
    path = choose_path("ms_deform_attn", value, has_triton=True)
    exact = torch.float64 in (value.dtype, sampling_locations.dtype, attention_weights.dtype)
    if path == "reference" or exact:
        return ms_deform_attn_reference(value, shapes, sampling_locations, attention_weights)
    flat = [size for shape in shapes for size in shape]
    return ms_deform_attn_op(value, flat, sampling_locations, attention_weights)


def _check_arguments(
    value: Tensor, shapes: list[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> None:
    tensors = {"value": value, "sampling_locations": sampling_locations, "attention_weights": attention_weights}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"ms_deform_attn: {name} is {tensor.dtype}, expected a floating point tensor")
        if tensor.device != value.device:
            raise ValueError(f"ms_deform_attn: {name} is on {tensor.device}, expected {value.device} as value")
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
    if min((min(shape) for shape in shapes), default=1) < 1:
        raise ValueError(f"ms_deform_attn: spatial_shapes is {shapes}, expected heights and widths of at least 1")
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


@torch.library.custom_op("frugal::ms_deform_attn", mutates_args=())
def ms_deform_attn_op(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Run the forward kernel; `spatial_shapes` is H0, W0, H1, W1, ..."""
    from kernels.ms_deform_attn_triton import forward

    return forward(value, spatial_shapes, sampling_locations, attention_weights)


@ms_deform_attn_op.register_fake
def _(value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor) -> Tensor:
    batch, _, num_heads, head_dim = value.shape
    return value.new_empty(batch, sampling_locations.shape[1], num_heads * head_dim)


@torch.library.custom_op("frugal::ms_deform_attn_backward", mutates_args=())
def ms_deform_attn_backward_op(
    grad: Tensor, value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the backward kernel: the gradients of value, locations and weights, contiguous."""
    from kernels.ms_deform_attn_triton import backward

    return backward(grad, value, spatial_shapes, sampling_locations, attention_weights)


@ms_deform_attn_backward_op.register_fake
def _(
    grad: Tensor, value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (value, sampling_locations, attention_weights)
    return tuple(tensor.new_empty(tensor.shape) for tensor in tensors)  # type: ignore[return-value]


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    value, ctx.spatial_shapes, sampling_locations, attention_weights = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(value, sampling_locations, attention_weights)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
    value, sampling_locations, attention_weights = ctx.saved_tensors  # type: ignore[attr-defined]
    shapes = ctx.spatial_shapes  # type: ignore[attr-defined]
    gradients = ms_deform_attn_backward_op(grad, value, shapes, sampling_locations, attention_weights)
    return gradients[0], None, gradients[1], gradients[2]


ms_deform_attn_op.register_autograd(_backward, setup_context=_setup_context)
