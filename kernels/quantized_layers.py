"""Softmax, GELU and layer normalisation whose backward pass restores activations from 8 bits.

Mesa (arXiv 2111.11124): the forward pass is exact, and what it keeps for backward takes one byte per number
instead of two or four. The kernels restore and differentiate in one pass; they are in `kernels/quantize_triton.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.quantize import (
    RunningRange,
    check_groups,
    check_levels,
    dequantize_reference,
    quantize,
    takes_triton,
    update_range,
)

MAX_COLUMNS = 16384  # a row that the kernels of softmax and layer normalisation hold whole


def softmax_8bit(
    x: Tensor, running: RunningRange, *, levels: int = 256, decay: float = 0.9, stochastic: bool = True
) -> Tensor:
    """Return the softmax of `x` along its last dimension; backward reads 8-bit codes of the output.

    `x` is (B, C), (B, N, C) or (B, heads, N, d), see `kernels/quantize.py` for groups, `levels` and rounding. Where a
    gradient is asked for, `running` is updated with the output, in place, before it is quantised; otherwise nothing but
    the softmax is computed. Raises `ValueError` when shapes, devices or `levels` do not fit and `TypeError` when `x` is
    not floating point.
    """
    check_groups("softmax_8bit", x, running.span, running.shift)
    check_levels("softmax_8bit", levels)
    output = F.softmax(x.detach(), -1)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return output
    codes, span, shift = _keep(output, running, levels, decay, stochastic)
    return _Softmax.apply(x, output, codes, span, shift, levels)


def gelu_8bit(
    x: Tensor, running: RunningRange, *, levels: int = 256, decay: float = 0.9, stochastic: bool = True
) -> Tensor:
    """Return GELU (with the error function) of `x`; backward reads 8-bit codes of `x`.

    Arguments, updates of `running` and errors are those of `softmax_8bit`.
    """
    check_groups("gelu_8bit", x, running.span, running.shift)
    check_levels("gelu_8bit", levels)
    output = F.gelu(x.detach())
    if not (torch.is_grad_enabled() and x.requires_grad):
        return output
    codes, span, shift = _keep(x.detach(), running, levels, decay, stochastic)
    return _GELU.apply(x, output, codes, span, shift, levels)


def layer_norm_8bit(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: RunningRange,
    *,
    eps: float = 1e-5,
    levels: int = 256,
    decay: float = 0.9,
    stochastic: bool = True,
) -> Tensor:
    """Return `x` normalised along its last dimension, times `weight` plus `bias`; backward reads 8-bit codes of `x`.

    `weight` and `bias` are (C,); `x` is first converted to their dtype (float32 in mixed precision). Mean and inverse
    deviation of every row are kept exactly. Other arguments, updates of `running` and errors are those of
    `softmax_8bit`.
    """
    check_groups("layer_norm_8bit", x, running.span, running.shift)
    check_levels("layer_norm_8bit", levels)
    for name, tensor in {"weight": weight, "bias": bias}.items():
        if tensor.shape != x.shape[-1:]:
            raise ValueError(
                f"layer_norm_8bit: {name} has shape {tuple(tensor.shape)}, expected {tuple(x.shape[-1:])} as in x"
            )
    x = x.to(weight.dtype)
    output, mean, rstd = torch.native_layer_norm(x.detach(), x.shape[-1:], weight.detach(), bias.detach(), eps)
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, weight, bias))):
        return output
    codes, span, shift = _keep(x.detach(), running, levels, decay, stochastic)
    return _LayerNorm.apply(x, weight, bias, output, codes, span, shift, levels, mean, rstd)


def _keep(
    activation: Tensor, running: RunningRange, levels: int, decay: float, stochastic: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, and span and shift as they are now: the next forward pass changes the running ones."""
    update_range(activation, running, decay=decay)
    seed = torch.randint(2**31, (1,), device=activation.device) if stochastic else None
    span, shift = running.span.clone(), running.shift.clone()
    return quantize(activation, span, shift, levels=levels, seed=seed), span, shift


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        output: Tensor,
        codes: Tensor,
        span: Tensor,
        shift: Tensor,
        levels: int,
    ) -> Tensor:
        ctx.save_for_backward(codes, span, shift)
        ctx.levels, ctx.dtype = levels, x.dtype  # type: ignore[attr-defined]
        return output

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, span, shift = ctx.saved_tensors  # type: ignore[attr-defined]
        grad = softmax_backward_8bit(grad, codes, span, shift, levels=ctx.levels)  # type: ignore[attr-defined]
        return grad.to(ctx.dtype), None, None, None, None, None  # type: ignore[attr-defined]


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        output: Tensor,
        codes: Tensor,
        span: Tensor,
        shift: Tensor,
        levels: int,
    ) -> Tensor:
        ctx.save_for_backward(codes, span, shift)
        ctx.levels = levels  # type: ignore[attr-defined]
        return output

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, span, shift = ctx.saved_tensors  # type: ignore[attr-defined]
        grad = gelu_backward_8bit(grad, codes, span, shift, levels=ctx.levels)  # type: ignore[attr-defined]
        return grad, None, None, None, None, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        output: Tensor,
        codes: Tensor,
        span: Tensor,
        shift: Tensor,
        levels: int,
        mean: Tensor,
        rstd: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(codes, span, shift, mean, rstd, weight)
        ctx.levels = levels  # type: ignore[attr-defined]
        return output

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, span, shift, mean, rstd, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        levels = ctx.levels  # type: ignore[attr-defined]
        grads = layer_norm_backward_8bit(grad, codes, span, shift, mean, rstd, weight, levels=levels)
        return *grads, None, None, None, None, None, None, None


def softmax_backward_8bit(grad: Tensor, codes: Tensor, span: Tensor, shift: Tensor, *, levels: int = 256) -> Tensor:
    """Return the gradient of the input of a softmax along the last dimension, from the `codes` of its output.

    `grad` is that of the output, in the shape of `codes`, and gives shape and dtype of the result; `codes`, `span`,
    `shift` and `levels` are those of `quantize`. Raises as `softmax_8bit`.
    """
    _check_backward("softmax_backward_8bit", grad, codes, span, shift, levels)
    if codes.shape[-1] <= MAX_COLUMNS and takes_triton("softmax_backward_8bit", grad):
        output: Tensor = softmax_backward_op(grad, codes, span, shift, levels)
        return output
    return softmax_backward_reference(grad, codes, span, shift, levels=levels)


def gelu_backward_8bit(grad: Tensor, codes: Tensor, span: Tensor, shift: Tensor, *, levels: int = 256) -> Tensor:
    """Return the gradient of the input of GELU from the `codes` of that input; arguments as `softmax_backward_8bit`."""
    _check_backward("gelu_backward_8bit", grad, codes, span, shift, levels)
    if takes_triton("gelu_backward_8bit", grad):
        output: Tensor = gelu_backward_op(grad, codes, span, shift, levels)
        return output
    return gelu_backward_reference(grad, codes, span, shift, levels=levels)


def layer_norm_backward_8bit(
    grad: Tensor,
    codes: Tensor,
    span: Tensor,
    shift: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    *,
    levels: int = 256,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of input, weight and bias of layer normalisation from the `codes` of its input.

    `mean` and `rstd`, one number per row, are those of the forward pass, `weight` is (C,); other arguments as
    `softmax_backward_8bit`.
    """
    _check_backward("layer_norm_backward_8bit", grad, codes, span, shift, levels)
    rows = codes.shape[:-1].numel()
    if mean.numel() != rows or rstd.numel() != rows or weight.shape != codes.shape[-1:]:
        raise ValueError(
            f"layer_norm_backward_8bit: mean, rstd and weight have shapes {tuple(mean.shape)}, {tuple(rstd.shape)} and "
            f"{tuple(weight.shape)}, expected {rows}, {rows} and {codes.shape[-1]} numbers"
        )
    if codes.shape[-1] <= MAX_COLUMNS and takes_triton("layer_norm_backward_8bit", grad):
        grad_x, grad_weight, grad_bias = layer_norm_backward_op(grad, codes, span, shift, levels, mean, rstd, weight)
        return grad_x, grad_weight, grad_bias
    return layer_norm_backward_reference(grad, codes, span, shift, mean, rstd, weight, levels=levels)


def _check_backward(op: str, grad: Tensor, codes: Tensor, span: Tensor, shift: Tensor, levels: int) -> None:
    check_groups(op, codes, span, shift, codes=True)
    check_levels(op, levels)
    if not grad.is_floating_point():
        raise TypeError(f"{op}: grad is {grad.dtype}, expected a floating point tensor")
    if grad.shape != codes.shape or grad.device != codes.device:
        raise ValueError(
            f"{op}: grad has shape {tuple(grad.shape)} on {grad.device}, "
            f"expected {tuple(codes.shape)} on {codes.device} as codes"
        )


def softmax_backward_reference(
    grad: Tensor, codes: Tensor, span: Tensor, shift: Tensor, *, levels: int = 256
) -> Tensor:
    """Compute `softmax_backward_8bit`."""
    g, y = _widened(grad, codes, span, shift, levels)
    return (y * (g - (y * g).sum(-1, keepdim=True))).to(grad.dtype)


def gelu_backward_reference(grad: Tensor, codes: Tensor, span: Tensor, shift: Tensor, *, levels: int = 256) -> Tensor:
    """Compute `gelu_backward_8bit`."""
    g, x = _widened(grad, codes, span, shift, levels)
    cumulative = 0.5 * (1 + torch.erf(x * 2**-0.5))
    density = (2 * torch.pi) ** -0.5 * torch.exp(-0.5 * x.square())
    return (g * (cumulative + x * density)).to(grad.dtype)


def layer_norm_backward_reference(
    grad: Tensor,
    codes: Tensor,
    span: Tensor,
    shift: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    *,
    levels: int = 256,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `layer_norm_backward_8bit`."""
    g, x = _widened(grad, codes, span, shift, levels)
    mean, rstd = (statistic.to(g.dtype).view(*codes.shape[:-1], 1) for statistic in (mean, rstd))
    normalised = (x - mean) * rstd
    grad_weight, grad_bias = (g * normalised).flatten(0, -2).sum(0), g.flatten(0, -2).sum(0)
    g = g * weight.to(g.dtype)
    along = (g * normalised).mean(-1, keepdim=True)
    grad_x = rstd * (g - g.mean(-1, keepdim=True) - normalised * along)
    return grad_x.to(grad.dtype), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _widened(grad: Tensor, codes: Tensor, span: Tensor, shift: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Return the gradient and what was quantised, in float32 or more."""
    dtype = torch.promote_types(grad.dtype, torch.float32)
    return grad.to(dtype), dequantize_reference(codes, span, shift, levels=levels, dtype=dtype)


@torch.library.custom_op("frugal::softmax_backward_8bit", mutates_args=())
def softmax_backward_op(grad: Tensor, codes: Tensor, span: Tensor, shift: Tensor, levels: int) -> Tensor:
    """Run the kernel of `softmax_backward_8bit`."""
    from kernels.quantize_triton import softmax_backward

    return softmax_backward(grad, codes, span, shift, levels)


@torch.library.custom_op("frugal::gelu_backward_8bit", mutates_args=())
def gelu_backward_op(grad: Tensor, codes: Tensor, span: Tensor, shift: Tensor, levels: int) -> Tensor:
    """Run the kernel of `gelu_backward_8bit`."""
    from kernels.quantize_triton import gelu_backward

    return gelu_backward(grad, codes, span, shift, levels)


@softmax_backward_op.register_fake
@gelu_backward_op.register_fake
def _(grad: Tensor, codes: Tensor, span: Tensor, shift: Tensor, levels: int) -> Tensor:
    return grad.new_empty(grad.shape)


@torch.library.custom_op("frugal::layer_norm_backward_8bit", mutates_args=())
def layer_norm_backward_op(
    grad: Tensor,
    codes: Tensor,
    span: Tensor,
    shift: Tensor,
    levels: int,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernel of `layer_norm_backward_8bit`."""
    from kernels.quantize_triton import layer_norm_backward

    return layer_norm_backward(grad, codes, span, shift, levels, mean, rstd, weight)


@layer_norm_backward_op.register_fake
def _(
    grad: Tensor,
    codes: Tensor,
    span: Tensor,
    shift: Tensor,
    levels: int,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return grad.new_empty(grad.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)
