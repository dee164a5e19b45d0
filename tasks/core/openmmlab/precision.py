"""Arithmetic of 16-bit tensors in float32."""

import torch
from torch import Tensor


def widen(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return `tensors` with float16 and bfloat16 as float32: half of torchvision's CPU operations know neither."""
    return tuple(t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors)


def round_to_float32(number: float) -> float:
    """Return `number` as the nearest float32, the type in which the compiled operations take thresholds."""
    return float(torch.tensor(number, dtype=torch.float32))
