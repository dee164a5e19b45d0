"""FASeg (arXiv 2204.01244): backbone, pixel decoder and transformer decoder in one module."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from tasks.core.errors import expect
from tasks.core.preprocess import NormalizeAndPad
from tasks.segmentation.faseg.pixel_decoder import PixelDecoder
from tasks.segmentation.faseg.transformer_decoder import TransformerDecoder


class FASegNetwork(nn.Module):
    """Predict a set of (class, mask) pairs for an image.

    `backbone` maps normalised images (B, 3, H, W) to four maps of strides 4, 8, 16, 32 with `channels` channels.
    FASeg's three ideas are switches: `dynamic_queries`, `high_resolution` attention and `conditional_positions`.
    Mask2Former is all three off, `num_layers=9` and `mask_threshold=0.5`. `auxiliary_head` adds a per-pixel classifier
    of the mask features for training.
    """

    def __init__(
        self,
        backbone: nn.Module,
        channels: Sequence[int],
        num_classes: int,
        hidden_dim: int = 256,
        mask_dim: int = 256,
        num_queries: int = 100,
        num_heads: int = 8,
        dim_feedforward: int = 2048,
        num_layers: int = 13,
        encoder_layers: int = 6,
        encoder_dim_feedforward: int = 1024,
        omega_rate: int = 32,
        mask_threshold: float = 0.15,
        dynamic_queries: bool = True,
        high_resolution: bool = True,
        conditional_positions: bool = True,
        auxiliary_head: bool = False,
    ) -> None:
        super().__init__()
        counts = {
            "num_queries": num_queries,
            "num_heads": num_heads,
            "num_layers": num_layers,
            "omega_rate": omega_rate,
        }
        for name, count in counts.items():
            expect(name, count, count >= 1, "at least 1")
        divisible = hidden_dim >= 1 and hidden_dim % 4 == hidden_dim % num_heads == 0
        expect("hidden_dim", hidden_dim, divisible, f"a multiple of 4 and of num_heads ({num_heads})")
        expect("mask_threshold", mask_threshold, 0 <= mask_threshold <= 1, "a probability")
        self.num_classes = num_classes
        self.preprocess = NormalizeAndPad()
        self.backbone = backbone
        self.pixel_decoder = PixelDecoder(
            channels,
            dim=hidden_dim,
            mask_dim=mask_dim,
            num_heads=num_heads,
            num_layers=encoder_layers,
            dim_feedforward=encoder_dim_feedforward,
            num_levels=4 if high_resolution else 3,
            conditional_positions=conditional_positions,
        )
        self.decoder = TransformerDecoder(
            num_classes,
            dim=hidden_dim,
            mask_dim=mask_dim,
            num_queries=num_queries,
            num_heads=num_heads,
            dim_feedforward=dim_feedforward,
            num_layers=num_layers,
            omega_rate=omega_rate,
            mask_threshold=mask_threshold,
            dynamic_queries=dynamic_queries,
            high_resolution=high_resolution,
        )
        self.auxiliary_head = nn.Conv2d(mask_dim, num_classes, 1) if auxiliary_head else None

    def forward(self, images: Tensor) -> dict[str, Any]:
        """Predict from RGB images (B, 3, H, W), uint8 or floating point, in 0..255.

        Returns `pred_logits` (B, Q, K + 1), the last class being "no object", `pred_masks` (B, Q, H/4, W/4) logits of
        the padded image, and `aux_outputs`, the same two for every earlier decoder stage; in training with an auxiliary
        head also `pixel_logits` (B, K, H/4, W/4).
        """
        pixels = self.pixel_decoder(self.backbone(self.preprocess(images)))
        *auxiliary, (logits, masks) = self.decoder(pixels)
        outputs = {
            "pred_logits": logits,
            "pred_masks": masks,
            "aux_outputs": [
                {"pred_logits": aux_logits, "pred_masks": aux_masks} for aux_logits, aux_masks in auxiliary
            ],
        }
        if self.auxiliary_head is not None and self.training:
            outputs["pixel_logits"] = self.auxiliary_head(pixels.mask_features)
        return outputs
