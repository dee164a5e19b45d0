"""Boundary max pooling: every proposal takes the maximum of a feature around its start and around its end.

AFSD (Lin et al., "Learning Salient Boundary Feature for Anchor-free Temporal Action Localization", arXiv 2103.13137),
section 3.3. The official extension spreads gradients with the wrong stride unless there are as many proposals as time
steps; the gradient here is that of the forward pass. The Triton kernels are in `kernels/boundary_max_pool_triton.py`.
"""

import torch
from torch import Tensor

from kernels.dispatch import choose_path


def boundary_max_pool(feature: Tensor, windows: Tensor) -> Tensor:
    """Pool the first half of the channels over the start window of each proposal, the second over its end window.

    `feature` is (B, C, T), C even. `windows` is (B, S, 4): first and last position, both included, of the start and of
    the end window, in time steps. Bounds are truncated toward zero and clamped to [0, T - 1], NaN counts as 0; where
    the last lies before the first only the first position counts. Returns (B, C, S) in the dtype of `feature`. The
    gradient goes to the first maximum of a window, none to `windows`. NaN is the largest number, as in `torch.max`.
    float64 takes the reference on every device; forward and backward of the kernels are deterministic.
    Raises `ValueError` when shapes or devices do not fit and `TypeError` when a tensor is not floating point.
    """
    _check_arguments(feature, windows)
    path = choose_path("boundary_max_pool", feature, has_triton=True)
    if path == "reference" or feature.dtype == torch.float64:
        return boundary_max_pool_reference(feature, windows)
    return boundary_max_pool_op(feature, windows.detach())[0]


def _check_arguments(feature: Tensor, windows: Tensor) -> None:
    for name, tensor in (("feature", feature), ("windows", windows)):
        if not tensor.is_floating_point():
            raise TypeError(f"boundary_max_pool: {name} is {tensor.dtype}, expected a floating point tensor")
    if feature.ndim != 3 or feature.shape[1] % 2 or feature.shape[2] == 0:
        raise ValueError(
            f"boundary_max_pool: feature has shape {tuple(feature.shape)}, expected (B, C, T), C even and T at least 1"
        )
    if windows.ndim != 3 or windows.shape[0] != feature.shape[0] or windows.shape[2] != 4:
        raise ValueError(
            f"boundary_max_pool: windows has shape {tuple(windows.shape)}, expected ({feature.shape[0]}, S, 4)"
        )
    if windows.device != feature.device:
        raise ValueError(f"boundary_max_pool: windows is on {windows.device}, expected {feature.device} as feature")


def boundary_max_pool_reference(feature: Tensor, windows: Tensor) -> Tensor:
    """Compute `boundary_max_pool` by masking; takes memory for B * C * S * T / 2 numbers."""
    length = feature.shape[2]
    times = torch.arange(length, device=feature.device)
    bounds = windows.detach().double().nan_to_num(nan=0.0).clamp(0, length - 1).long()
    halves = []
    for half, window in zip(feature.chunk(2, dim=1), bounds.split(2, dim=2), strict=True):
        first = window[..., :1]  # (B, S, 1)
        inside = (times >= first) & (times <= torch.maximum(window[..., 1:], first))  # (B, S, T)
        masked = half.detach()[:, :, None].masked_fill(~inside[:, None], -torch.inf)  # (B, C / 2, S, T)
        position = torch.maximum(masked.argmax(dim=3), first[..., 0][:, None])  # all -inf: the first of the window
        halves.append(half.gather(2, position))
    return torch.cat(halves, dim=1)


@torch.library.custom_op("frugal::boundary_max_pool", mutates_args=())
def boundary_max_pool_op(feature: Tensor, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Run the forward kernel: the maxima and, for the backward, their positions in int32."""
    from kernels.boundary_max_pool_triton import forward

    return forward(feature, windows)


@boundary_max_pool_op.register_fake
def _(feature: Tensor, windows: Tensor) -> tuple[Tensor, Tensor]:
    shape = (*feature.shape[:2], windows.shape[1])
    return feature.new_empty(shape), feature.new_empty(shape, dtype=torch.int32)


@torch.library.custom_op("frugal::boundary_max_pool_backward", mutates_args=())
def boundary_max_pool_backward_op(grad: Tensor, positions: Tensor, length: int) -> Tensor:
    """Run the backward kernel: the gradient (B, C, length) of the feature."""
    from kernels.boundary_max_pool_triton import backward

    return backward(grad, positions, length)


@boundary_max_pool_backward_op.register_fake
def _(grad: Tensor, positions: Tensor, length: int) -> Tensor:
    return grad.new_empty(*grad.shape[:2], length)


def _setup_context(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]
) -> None:
    ctx.length = inputs[0].shape[2]  # type: ignore[attr-defined]
    ctx.save_for_backward(output[1])


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
    (positions,) = ctx.saved_tensors  # type: ignore[attr-defined]
    return boundary_max_pool_backward_op(grad, positions, ctx.length), None  # type: ignore[attr-defined]


boundary_max_pool_op.register_autograd(_backward, setup_context=_setup_context)
