"""AFSD (arXiv 2103.13137) on a video backbone, or on features computed before."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tasks.video.afsd.head import AFSDHead, AFSDOutput, BoundaryFeatures


class AFSDNetwork(nn.Module):
    """Predict segments and their classes for clips.

    Args:
        backbone: Maps normalised clips (B, C, T, H, W) to the maps that `head` reads; None where the input is a
            sequence of features.
        head: Makes the predictions.
        frames_per_feature: Frames per step of a sequence of features.
    """

    def __init__(
        self,
        backbone: nn.Module | None,
        head: AFSDHead,
        frames_per_feature: int = 1,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.frames_per_feature = frames_per_feature

    def forward(self, clips: Tensor, spliced: Tensor | None = None) -> tuple[AFSDOutput, BoundaryFeatures | None]:
        """Predict for clips (B, C, T, H, W), uint8 or floating point in 0..255, or features (B, C, T).

        Of `spliced` ones, of the same size and in any number, only the boundary features are returned.
        """
        both = clips if spliced is None or not len(spliced) else torch.cat([clips, spliced.to(clips.dtype)])
        inputs, length = self._inputs(both)
        output = self.head([x[: len(clips)] for x in inputs], length)
        if len(both) == len(clips):
            return output, None
        return output, self.head.boundary_features([x[len(clips) :] for x in inputs], length)

    def _inputs(self, clips: Tensor) -> tuple[Sequence[Tensor], int]:
        """What the head reads of clips or features, and the frames they cover."""
        if self.backbone is None:
            return [clips], clips.shape[2] * self.frames_per_feature
        weight = next(self.head.parameters())
        return self.backbone(clips.to(weight.dtype) / 127.5 - 1), clips.shape[2]
