"""What networks of whole images do to them before the backbone: normalise, then pad."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)
SIZE_DIVISOR = 32  # the coarsest level of the pyramid has stride 32


class NormalizeAndPad(nn.Module):
    """Normalise RGB images of 0..255 and pad them right and bottom to one size, with zeros: pixels of the mean colour.

    Args:
        mean: Subtracted from R, G and B.
        std: What they are divided by then.
        size_divisor: Sides grow to multiples of it.
        bgr: Whether the network wants the channels in the order of OpenCV; `mean` and `std` are in the network's order.
        pad_value: Value of padding, after normalisation.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        size_divisor: int = SIZE_DIVISOR,
        bgr: bool = False,
        pad_value: float = 0.0,
    ) -> None:
        super().__init__()
        # Constants of the method, not weights: released checkpoints do not hold them.
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.size_divisor = size_divisor
        self.bgr = bgr
        self.pad_value = pad_value

    def forward(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """Map (B, 3, H, W), or at least one image (3, h, w), uint8 or float, to float (B, 3, H', W').

        Raises ValueError for a tensor of another shape.
        """
        if isinstance(images, Tensor):
            if images.ndim != 4 or images.shape[1] != 3:
                raise ValueError(f"images of shape {tuple(images.shape)}: expected (B, 3, H, W), RGB values 0..255")
            return self._prepare(images, *images.shape[-2:])
        height, width = (max(image.shape[axis] for image in images) for axis in (-2, -1))
        return torch.stack([self._prepare(image, height, width) for image in images])

    def _prepare(self, images: Tensor, height: int, width: int) -> Tensor:
        """Normalise (..., 3, h, w) and pad to the next multiples of `height` and `width`."""
        if self.bgr:
            images = images.flip(-3)
        images = (images.to(self.mean.dtype) - self.mean) / self.std
        bottom = height + -height % self.size_divisor - images.shape[-2]
        right = width + -width % self.size_divisor - images.shape[-1]
        return F.pad(images, (0, right, 0, bottom), value=self.pad_value)
