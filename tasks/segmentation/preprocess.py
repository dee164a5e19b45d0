"""What every segmentation network does to an image before its backbone: normalise, then pad."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)
SIZE_DIVISOR = 32  # the coarsest level of the pyramid has stride 32


class Preprocess(nn.Module):
    """Normalise RGB images of 0..255 with the ImageNet statistics and zero-pad them right and bottom.

    Padding comes after normalisation, so padded pixels have the mean colour. Sides grow to multiples of 32.
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Constants of the method, not weights: released checkpoints do not hold them.
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, H, W), uint8 or float, to float (B, 3, H', W'); raises ValueError for another shape."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images of shape {tuple(images.shape)}: expected (B, 3, H, W), RGB values 0..255")
        images = (images.to(self.mean.dtype) - self.mean) / self.std
        height, width = images.shape[-2:]
        return F.pad(images, (0, -width % SIZE_DIVISOR, 0, -height % SIZE_DIVISOR))
