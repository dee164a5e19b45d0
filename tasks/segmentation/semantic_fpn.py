"""Semantic FPN (Kirillov et al. 2019, arXiv 1901.02446), the per-pixel baseline of the LIT papers.

A feature pyramid network brings four backbone maps to one width; each is convolved and upsampled to stride 4, and their
sum is classified. Layers and sizes are those of mmsegmentation's ``FPN`` neck and ``FPNHead``.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from backbones.keys import Table
from tasks.core.preprocess import NormalizeAndPad

# mmsegmentation's names of neck and head. Its scale heads count convolutions (with norm and ReLU) and upsamplings.
MMSEGMENTATION_KEYS: Table = [
    (r"^neck\.lateral_convs\.(\d)\.conv\.", r"neck.laterals.\1."),
    (r"^neck\.fpn_convs\.(\d)\.conv\.", r"neck.outputs.\1."),
    *((rf"^decode_head\.scale_heads\.(\d)\.{i}\.conv\.", rf"head.levels.\1.{2 * i}.") for i in (0, 2, 4)),
    *((rf"^decode_head\.scale_heads\.(\d)\.{i}\.bn\.", rf"head.levels.\1.{2 * i + 1}.") for i in (0, 2, 4)),
    (r"^decode_head\.conv_seg\.", "head.classifier."),
]


class SemanticFPNNetwork(nn.Module):
    """Classify every pixel of an image; `backbone` returns four maps and has `channels` and `strides`.

    `fpn_dim` is the width of the pyramid, `dim` that of the head, `dropout` drops whole channels before the classifier.
    """

    def __init__(
        self, backbone: nn.Module, num_classes: int, fpn_dim: int = 256, dim: int = 128, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.preprocess = NormalizeAndPad()
        self.backbone = backbone
        channels: Sequence[int] = backbone.channels  # type: ignore[assignment]
        self.neck = FPN(channels, fpn_dim)
        self.head = SemanticFPNHead(fpn_dim, dim, num_classes, len(channels), dropout)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K, H'/4, W'/4) of RGB images (B, 3, H, W) in 0..255; H', W' are padded to multiples of 32."""
        return self.head(self.neck(self.backbone(self.preprocess(images))))


class FPN(nn.Module):
    """Top-down feature pyramid: 1x1 laterals, nearest upsampling, 3x3 outputs, all with bias and without norm."""

    def __init__(self, channels: Sequence[int], dim: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(c, dim, kernel_size=1) for c in channels)
        self.outputs = nn.ModuleList(nn.Conv2d(dim, dim, kernel_size=3, padding=1) for _ in channels)
        for conv in self.modules():
            if isinstance(conv, nn.Conv2d) and conv.bias is not None:
                nn.init.xavier_uniform_(conv.weight)
                nn.init.zeros_(conv.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Map (B, C_i, H_i, W_i), high resolution first, to (B, dim, H_i, W_i)."""
        merged: list[Tensor] = []
        for lateral, feature in zip(reversed(self.laterals), reversed(maps), strict=True):
            x = lateral(feature)
            merged.append(x + F.interpolate(merged[-1], size=x.shape[-2:], mode="nearest") if merged else x)
        return [conv(x) for conv, x in zip(self.outputs, reversed(merged), strict=True)]


class SemanticFPNHead(nn.Module):
    """Bring level i to stride 4 by i steps of conv-BN-ReLU and x2 upsampling, add all levels, classify."""

    def __init__(self, in_dim: int, dim: int, num_classes: int, num_levels: int, dropout: float) -> None:
        super().__init__()
        self.levels = nn.ModuleList(_upsampling_convs(in_dim, dim, steps) for steps in range(num_levels))
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(dim, num_classes, kernel_size=1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.constant_(self.classifier.bias, 0)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Map (B, in_dim, H_i, W_i) of strides 4, 8, … to logits (B, K, H_0, W_0)."""
        size = maps[0].shape[-2:]
        total = self.levels[0](maps[0])
        for level, feature in zip(list(self.levels)[1:], maps[1:], strict=True):
            total = total + F.interpolate(level(feature), size=size, mode="bilinear", align_corners=False)
        return self.classifier(self.dropout(total))


def _upsampling_convs(in_dim: int, dim: int, steps: int) -> nn.Sequential:
    """`steps` times conv3x3-BN-ReLU and bilinear x2 (one convolution without upsampling for 0 steps)."""
    layers: list[nn.Module] = []
    for i in range(max(1, steps)):
        conv = nn.Conv2d(in_dim if i == 0 else dim, dim, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        layers += [conv, nn.BatchNorm2d(dim), nn.ReLU(inplace=True)]
        if steps:
            layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
    return nn.Sequential(*layers)
