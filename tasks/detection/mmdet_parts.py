"""Parts for detectors of mmdetection, by name in its registry once this module is imported, which needs mmdetection."""

from collections.abc import Sequence

from mmdet.models.necks import ChannelMapper
from mmdet.registry import MODELS
from torch import Tensor


@MODELS.register_module(force=True)
class LaterChannelMapper(ChannelMapper):
    """ChannelMapper of the last maps of a backbone, as many as it has input channels for."""

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Project maps (B, C_i, H_i, W_i) to one width and append coarser ones."""
        return super().forward(tuple(inputs[-len(self.convs) :]))
