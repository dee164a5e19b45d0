"""Convolution at learnt positions and multi-scale deformable attention, with their gradients."""

import torch
from torch import Tensor

from kernels.ms_deform_attn import ms_deform_attn
from tasks.core.openmmlab.precision import widen


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Convolve `input` (B, C, H, W) at positions moved by `offset` (B, 2 * groups * kH * kW, h, w) into `output`.

    Deformable convolution, arXiv 1703.06211, equation 2; `offset` holds (y, x) for every position of the kernel.
    `columns`, `ones` and `im2col_step` are buffers and a batch size that nothing here needs.
    """
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    output.copy_(_convolve(input, weight, offset, None, None, geometry))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Write the gradients of `deform_conv_forward` by `input` and `offset`."""
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    grads = _gradients(grad_output, input, weight, offset, None, None, geometry)
    grad_input.copy_(grads[0]), grad_offset.copy_(grads[2])


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """Add `scale` times the gradient of `deform_conv_forward` by `weight` to `grad_weight`."""
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    # The gradient by the weight does not depend on the weight: the zeros of `grad_weight` give its shape.
    grads = _gradients(grad_output, input, torch.zeros_like(grad_weight), offset, None, None, geometry)
    grad_weight += scale * grads[1].to(grad_weight)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Do as `deform_conv_forward` with samples scaled by `mask` (B, groups * kH * kW, h, w); arXiv 1811.11168, 3.2.

    Larger `offset` and `mask` are read as if their numbers were those of a tensor of the output's size: the compiled
    operation does, and DyHead's weights are trained so.
    """
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    offset, mask = (_first_numbers(t, output.shape[2:]) for t in (offset, mask))
    output.copy_(_convolve(input, weight, offset, mask, bias if with_bias else None, geometry))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Write the gradients of `modulated_deform_conv_forward` by its tensors."""
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    size = grad_output.shape[2:]
    offset, mask = _first_numbers(offset, size), _first_numbers(mask, size)
    grads = _gradients(grad_output, input, weight, offset, mask, bias if with_bias else None, geometry)
    grad_input.copy_(grads[0]), grad_weight.copy_(grads[1])
    _first_numbers(grad_offset, size).copy_(grads[2]), _first_numbers(grad_mask, size).copy_(grads[3])
    if with_bias:
        grad_bias.copy_(grads[4])


def _first_numbers(tensor: Tensor, size: tuple[int, ...]) -> Tensor:
    """View the first numbers of each image of `tensor` (B, C, H, W) as (B, C, *size)."""
    if tensor.shape[2:] == size:
        return tensor
    channels = tensor.shape[1]
    return tensor.flatten(1)[:, : channels * size[0] * size[1]].unflatten(1, (channels, *size))


# stride, padding and dilation in y and x, groups of the weight and of the offset
_Geometry = tuple[int, int, int, int, int, int, int, int]


def _convolve(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, bias: Tensor | None, geometry: _Geometry
) -> Tensor:
    tensors = widen(input, weight, offset, *_mask_and_bias(input, weight, mask, bias))
    return torch.ops.torchvision.deform_conv2d(*tensors, *geometry, mask is not None)


def _gradients(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    geometry: _Geometry,
) -> tuple[Tensor, ...]:
    """Return the gradients by input, weight, offset, mask and bias."""
    tensors = widen(grad, input, weight, offset, *_mask_and_bias(input, weight, mask, bias))
    return torch.ops.torchvision._deform_conv2d_backward(*tensors, *geometry, mask is not None)


def _mask_and_bias(input: Tensor, weight: Tensor, mask: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return (
        input.new_zeros(len(input), 1) if mask is None else mask,
        input.new_zeros(len(weight)) if bias is None else bias,
    )


def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Return `kernels.ms_deform_attn` of the arguments; levels follow each other in `value`."""
    return ms_deform_attn(value, _sizes(spatial_shapes), sampling_locations, attention_weights)


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Write the gradients of `ms_deform_attn_forward` by its three floating point tensors."""
    tensors = [t.detach().requires_grad_() for t in (value, sampling_locations, attention_weights)]
    with torch.enable_grad():
        output = ms_deform_attn(tensors[0], _sizes(spatial_shapes), *tensors[1:])
    grads = torch.autograd.grad(output, tensors, grad_output)
    for buffer, grad in zip((grad_value, grad_sampling_loc, grad_attn_weight), grads, strict=True):
        buffer.copy_(grad)


def multi_scale_deformable_attn(
    value: Tensor, value_spatial_shapes: Tensor, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Return `ms_deform_attn_forward`, differentiable; called as mmcv's function for the CPU."""
    return ms_deform_attn(value, _sizes(value_spatial_shapes), sampling_locations, attention_weights)


def apply_ms_deform_attn(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Return `ms_deform_attn_forward`, differentiable; called as mmcv's `MultiScaleDeformableAttnFunction.apply`."""
    return ms_deform_attn(value, _sizes(value_spatial_shapes), sampling_locations, attention_weights)


def _sizes(spatial_shapes: Tensor) -> list[tuple[int, int]]:
    """Return heights and widths, read from the device at once."""
    return [(int(height), int(width)) for height, width in torch.as_tensor(spatial_shapes).tolist()]
