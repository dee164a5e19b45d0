"""What every segmentation network does to an image before its backbone: normalise, then pad."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)
SIZE_DIVISOR = 32  # the coarsest level of the pyramid has stride 32


class Preprocess(nn.Module):
    """Normalise RGB images of 0..255 and zero-pad them right and bottom.

    Padding comes after normalisation, so padded pixels have the mean colour.

    Args:
        mean: Subtracted from R, G and B.
        std: What they are divided by then.
        size_divisor: Sides grow to multiples of it.
        bgr: Whether the network wants the channels in the order of OpenCV; `mean` and `std` are in the network's order.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        size_divisor: int = SIZE_DIVISOR,
        bgr: bool = False,
    ) -> None:
        super().__init__()
        # Constants of the method, not weights: released checkpoints do not hold them.
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.size_divisor = size_divisor
        self.bgr = bgr

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, H, W), uint8 or float, to float (B, 3, H', W'); raises ValueError for another shape."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images of shape {tuple(images.shape)}: expected (B, 3, H, W), RGB values 0..255")
        if self.bgr:
            images = images.flip(1)
        images = (images.to(self.mean.dtype) - self.mean) / self.std
        height, width = images.shape[-2:]
        return F.pad(images, (0, -width % self.size_divisor, 0, -height % self.size_divisor))
