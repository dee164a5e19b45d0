"""Global self-attention of token sequences, under timm's names."""

from typing import Any

import timm.layers
from torch import Tensor

from kernels.attention import attention


class GlobalAttention(timm.layers.Attention):
    """timm's multi-head self-attention with its options ``num_heads`` and ``qkv_bias``, by `kernels.attention`."""

    def forward(self, x: Tensor, **masks: Any) -> Tensor:
        """(B, L, C) to (B, L, C). The masks a timm block passes on must be unset."""
        if any(mask is not None and mask is not False for mask in masks.values()):
            raise ValueError(f"GlobalAttention takes no masks, got {sorted(masks)}")
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        return self.proj(attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2))
