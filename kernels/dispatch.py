"""Which implementation of an operation runs, PyTorch reference or Triton kernel, and in which dtype."""

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None  # takes longer than a small operation
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Asked once: torch.compile of PyTorch 2.11 cannot trace the question.
AUTOCAST_DEVICES = frozenset(kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(kind))

Implementation = Literal["reference", "triton"]


def choose_path(op: str, tensor: Tensor, *, has_triton: bool) -> Implementation:
    """Return the implementation of `op` to use for `tensor`.

    The environment variable `FRUGAL_KERNELS` decides: `auto` (default) takes Triton for CUDA tensors when the op has
    kernels and Triton is installed, `reference` always takes PyTorch, `triton` insists on the kernels and raises
    `RuntimeError` when they cannot run. Any other value raises `ValueError`.
    """
    setting = os.environ.get("FRUGAL_KERNELS", "auto")
    if setting not in ("auto", "reference", "triton"):
        raise ValueError(f"FRUGAL_KERNELS={setting!r}: expected auto, reference or triton")
    if setting == "reference":
        return "reference"
    installed = has_triton and TRITON_INSTALLED
    if setting == "auto":
        return "triton" if installed and tensor.is_cuda else "reference"
    if not has_triton:
        raise RuntimeError(f"FRUGAL_KERNELS=triton, but {op} has no Triton kernels: set it to auto or reference")
    if not installed:
        raise RuntimeError(f"FRUGAL_KERNELS=triton, but Triton is not installed: {op} needs auto or reference")
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(f"FRUGAL_KERNELS=triton, but {op} got a {tensor.device.type} tensor: expected cuda")
    return "triton"


def cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return `tensors` in the dtype of `torch.autocast` where it is on for their device, else as they are.

    As for `scaled_dot_product_attention`, float64 and integers stay what they are.
    """
    device = tensors[0].device.type
    if device not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor.to(dtype) if tensor.dtype in KERNEL_DTYPES else tensor for tensor in tensors)


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context in which `torch.autocast` leaves functions of tensors on the device of `tensor` alone."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if device in AUTOCAST_DEVICES else nullcontext()
