"""Pixels put together anew: CARAFE, convolution where a mask says, and the masks of PSANet."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.core.openmmlab.precision import widen

COLLECT = 0  # of PSANet's two masks; the other is "distribute"


def carafe_naive_forward(
    features: Tensor, masks: Tensor, output: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> None:
    """Write weighted sums of neighbourhoods of `features` (B, C, H, W) into `output` (B, C, sH, sW).

    `masks` (B, groups * k², sH, sW) holds k² weights per output pixel and group of channels. CARAFE, arXiv
    1905.02188, equation 4.
    """
    features, masks = widen(features, masks)
    patches, weights = _carafe_terms(features, masks, kernel_size, group_size, scale_factor)
    total = torch.einsum("bgckhw,bgkhywx->bgchywx", patches, weights)
    output.copy_(total.reshape(output.shape))


def carafe_naive_backward(
    grad_output: Tensor,
    features: Tensor,
    masks: Tensor,
    grad_input: Tensor,
    grad_masks: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Write the gradients of `carafe_naive_forward` by `features` and `masks`."""
    grad, features, masks = widen(grad_output, features, masks)
    patches, weights = _carafe_terms(features, masks, kernel_size, group_size, scale_factor)
    batch, groups, channels, _, height, width = patches.shape
    grad = grad.reshape(batch, groups, channels, height, scale_factor, width, scale_factor)
    grad_masks.copy_(torch.einsum("bgckhw,bgchywx->bgkhywx", patches, grad).reshape(grad_masks.shape))
    grad_patches = torch.einsum("bgkhywx,bgchywx->bgckhw", weights, grad).reshape(batch, -1, height * width)
    grad_input.copy_(F.fold(grad_patches, (height, width), kernel_size, padding=kernel_size // 2))


def _carafe_terms(features: Tensor, masks: Tensor, kernel_size: int, groups: int, scale: int) -> tuple[Tensor, Tensor]:
    """Return neighbourhoods (B, groups, C / groups, k², H, W) and weights (B, groups, k², H, s, W, s)."""
    batch, channels, height, width = features.shape
    patches = F.unfold(features, kernel_size, padding=kernel_size // 2)
    return (
        patches.reshape(batch, groups, channels // groups, kernel_size**2, height, width),
        masks.reshape(batch, groups, kernel_size**2, height, scale, width, scale),
    )


def carafe_forward(
    features: Tensor,
    masks: Tensor,
    rfeatures: Tensor,
    routput: Tensor,
    rmasks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Do as `carafe_naive_forward`; `rfeatures` keeps the features for `carafe_backward`."""
    rfeatures.copy_(features)
    carafe_naive_forward(features, masks, output, kernel_size, group_size, scale_factor)


def carafe_backward(
    grad_output: Tensor,
    rfeatures: Tensor,
    masks: Tensor,
    rgrad_output: Tensor,
    rgrad_input_hs: Tensor,
    rgrad_input: Tensor,
    rgrad_masks: Tensor,
    grad_input: Tensor,
    grad_masks: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Do as `carafe_naive_backward` with the features that `carafe_forward` kept."""
    carafe_naive_backward(grad_output, rfeatures, masks, grad_input, grad_masks, kernel_size, group_size, scale_factor)


def masked_im2col_forward(
    features: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    data_col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """Write the neighbourhoods of chosen pixels of `features` (1, C, H, W) into `data_col` (C * kH * kW, pixels)."""
    padded = F.pad(features[0], (pad_w, kernel_w, pad_h, kernel_h))
    rows = mask_h_idx[:, None, None] + torch.arange(kernel_h, device=features.device)[:, None]
    columns = mask_w_idx[:, None, None] + torch.arange(kernel_w, device=features.device)
    patches = padded[:, rows, columns]  # (C, pixels, kH, kW)
    data_col.copy_(patches.permute(0, 2, 3, 1).reshape(data_col.shape))


def masked_col2im_forward(
    data_col: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, output: Tensor, height: int, width: int, channels: int
) -> None:
    """Write `data_col` (C, pixels) to the chosen pixels of `output` (1, C, H, W)."""
    output[0, :, mask_h_idx, mask_w_idx] = data_col.to(output.dtype)


def psamask_forward(
    input: Tensor,
    output: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Write the masks `input` (B, h_mask * w_mask, H, W), one around every pixel, as maps over the whole image.

    `output` (B, H * W, H, W) is 0 where a mask does not reach. Its first axis is the other pixel and its last two the
    pixel of the mask (collect), or the reverse (distribute). PSANet, ECCV 2018, 3.3.
    """
    index, reached = _mask_positions(h_feature, w_feature, h_mask, w_mask, half_h_mask, half_w_mask, input.device)
    maps = input.flatten(2).gather(1, index.expand(num_, -1, -1)).masked_fill(~reached, 0)  # (B, other, pixel)
    output.copy_((maps if psa_type == COLLECT else maps.transpose(1, 2)).reshape(output.shape))


def psamask_backward(
    grad_output: Tensor,
    grad_input: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Write the gradient of `psamask_forward` into `grad_input`."""
    index, reached = _mask_positions(h_feature, w_feature, h_mask, w_mask, half_h_mask, half_w_mask, grad_output.device)
    grad = grad_output.flatten(2)
    grad = (grad if psa_type == COLLECT else grad.transpose(1, 2)).masked_fill(~reached, 0)
    total = torch.zeros_like(grad_input).flatten(2).scatter_add_(1, index.expand(num_, -1, -1), grad.to(grad_input))
    grad_input.copy_(total.view(grad_input.shape))


def _mask_positions(
    height: int, width: int, h_mask: int, w_mask: int, half_h: int, half_w: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return which element of the mask around a pixel lies on another pixel, and whether one does.

    Both are (H * W, H * W) with the other pixel first.
    """
    y, x = torch.arange(height, device=device), torch.arange(width, device=device)
    row = (y[:, None] - y + half_h)[:, None, :, None]  # (H, 1, H, 1)
    column = (x[:, None] - x + half_w)[None, :, None, :]
    reached = (row >= 0) & (row < h_mask) & (column >= 0) & (column < w_mask)
    index = torch.where(reached, row * w_mask + column, 0)
    return index.flatten(2).flatten(0, 1), reached.flatten(2).flatten(0, 1)
