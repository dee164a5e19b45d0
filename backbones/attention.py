"""Global self-attention of token sequences, under timm's names."""

import timm.layers
from torch import Tensor

from kernels.attention import attention


class GlobalAttention(timm.layers.Attention):
    """timm's multi-head self-attention with its options ``num_heads`` and ``qkv_bias``, by `kernels.attention`."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, L, C) to (B, L, C). Raises ValueError for the masks that a timm block may pass on."""
        if attn_mask is not None or is_causal:
            raise ValueError("GlobalAttention takes no masks")
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        return self.proj(attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2))
