"""Convolution and pooling with TensorFlow's "same" padding, which I3D and AFSD (arXiv 2103.13137) use throughout.

The padding depends on the size of the input and is larger at the end, so that a stride of s gives ceil(n / s) outputs.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def pad_same(x: Tensor, kernel_size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Zero-pad the last dimensions of `x`, as many as `kernel_size` has."""
    padding: list[int] = []
    sizes = x.shape[-len(kernel_size) :]
    for size, kernel, step in zip(reversed(sizes), reversed(kernel_size), reversed(stride), strict=True):
        total = max(kernel - (size % step or step), 0)
        padding += [total // 2, total - total // 2]
    return F.pad(x, padding) if any(padding) else x


class SameConv1d(nn.Conv1d):
    """Convolution (B, C, T) to (B, C', ceil(T / stride))."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, T)."""
        return super().forward(pad_same(x, self.kernel_size, self.stride))


class SameConv3d(nn.Conv3d):
    """Convolution (B, C, T, H, W) to (B, C', ceil(T / s_t), ceil(H / s_h), ceil(W / s_w))."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, T, H, W)."""
        return super().forward(pad_same(x, self.kernel_size, self.stride))


class SameMaxPool3d(nn.MaxPool3d):
    """Maximum over windows of maps that are not negative; the padding counts as 0."""

    kernel_size: tuple[int, int, int]
    stride: tuple[int, int, int]

    def forward(self, x: Tensor) -> Tensor:
        """Pool (B, C, T, H, W)."""
        return super().forward(pad_same(x, self.kernel_size, self.stride))
