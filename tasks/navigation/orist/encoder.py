"""BERT's encoder (NAACL 2019, arXiv 1810.04805): post-norm layers, with attention from `kernels.attention`.

Attributes are named as in BERT's, UNITER's and ORIST's checkpoints.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention import attention
from tasks.navigation.orist.embeddings import NORM_EPS


class Layer(nn.Module):
    """Self-attention and a feed-forward network, each added to its input and normalised."""

    def __init__(
        self, hidden_dim: int, num_heads: int, feedforward_dim: int, dropout: float, attention_dropout: float
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.attention_dropout = attention_dropout
        projections = nn.ModuleDict({name: nn.Linear(hidden_dim, hidden_dim) for name in ("query", "key", "value")})
        self.attention = nn.ModuleDict({"self": projections, "output": _projection(hidden_dim, hidden_dim)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(hidden_dim, feedforward_dim)})
        self.output = _projection(feedforward_dim, hidden_dim)

    def forward(self, x: Tensor, padding: Tensor, first_only: bool = False) -> Tensor:
        """Tokens (N, L, D) with padding (N, L), True where there is none, to tokens (N, L, D).

        With `first_only` the first token of each row alone is computed, (N, 1, D).
        """
        queries = x[:, :1] if first_only else x
        attended = self.attention["output"]["dense"](self._attend(queries, x, padding))
        x = self.attention["output"]["LayerNorm"](queries + self._drop(attended))
        hidden = self.output["dense"](F.gelu(self.intermediate["dense"](x)))
        normalised: Tensor = self.output["LayerNorm"](x + self._drop(hidden))
        return normalised

    def first_token_weights(self, x: Tensor, padding: Tensor) -> Tensor:
        """How much the first token of each row attends to every token (N, L), mean over heads."""
        q, k = self._heads("query", x[:, :1]), self._heads("key", x)
        scores = (q @ k.transpose(-2, -1))[:, :, 0] * q.shape[-1] ** -0.5  # (N, heads, L)
        return scores.masked_fill(padding[:, None], float("-inf")).softmax(dim=-1).mean(dim=1)

    def _attend(self, queries: Tensor, x: Tensor, padding: Tensor) -> Tensor:
        q, k, v = self._heads("query", queries), self._heads("key", x), self._heads("value", x)
        if self.training and self.attention_dropout:  # the kernels do not drop weights
            seen = ~padding[:, None, None]
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=self.attention_dropout)
        else:
            attended = attention(q, k, v, mask=padding[:, None, None])
        return attended.transpose(1, 2).flatten(2)

    def _heads(self, name: str, x: Tensor) -> Tensor:
        projected: Tensor = self.attention["self"][name](x)
        return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


def _projection(in_dim: int, out_dim: int) -> nn.ModuleDict:
    """Linear and the normalisation that follows its residual addition."""
    return nn.ModuleDict({"dense": nn.Linear(in_dim, out_dim), "LayerNorm": nn.LayerNorm(out_dim, NORM_EPS)})
