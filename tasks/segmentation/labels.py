"""Label maps: train ids 0..K-1, and the label of pixels that count nowhere."""

import torch.nn.functional as F
from torch import Tensor

IGNORE = 255


def pixel_cross_entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """Mean cross-entropy over the pixels of `mask` (B, H, W) that are not ignored; 0 if there are none.

    `logits` (B, K, H'/4, W'/4) of the padded image are upsampled to it and cut to the size of the labels. Computed in
    float32 also under autocast.
    """
    height, width = mask.shape[-2:]
    logits = F.interpolate(logits.float(), scale_factor=4, mode="bilinear", align_corners=False)
    loss = F.cross_entropy(logits[..., :height, :width], mask.long(), ignore_index=IGNORE, reduction="sum")
    return loss / (mask != IGNORE).sum().clamp(min=1)
