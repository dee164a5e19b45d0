"""BERT's encoder (NAACL 2019, arXiv 1810.04805): post-norm layers, with attention from `kernels.attention`.

Attributes are named as in BERT's, UNITER's and ORIST's checkpoints.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention import attention
from tasks.navigation.orist.embeddings import NORM_EPS


class Residual(nn.Module):
    """A projection that is added to what it was computed from, and normalised."""

    def __init__(self, in_dim: int, out_dim: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.dense = nn.Linear(in_dim, out_dim)
        self.LayerNorm = nn.LayerNorm(out_dim, NORM_EPS)

    def forward(self, x: Tensor, origin: Tensor) -> Tensor:
        """(..., in_dim) and (..., out_dim) to (..., out_dim)."""
        normalised: Tensor = self.LayerNorm(origin + F.dropout(self.dense(x), self.dropout, self.training))
        return normalised


class Projections(nn.Module):
    """Queries, keys and values."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(hidden_dim, hidden_dim)
        self.key = nn.Linear(hidden_dim, hidden_dim)
        self.value = nn.Linear(hidden_dim, hidden_dim)


class SelfAttention(nn.Module):
    """Multi-head attention among the tokens of a row."""

    def __init__(self, hidden_dim: int, num_heads: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_dropout = attention_dropout
        self.add_module("self", Projections(hidden_dim))
        self.output = Residual(hidden_dim, hidden_dim, dropout)

    @property
    def projections(self) -> Projections:
        """The child that BERT calls ``self``."""
        return cast(Projections, self.get_submodule("self"))

    def forward(self, queries: Tensor, x: Tensor, padding: Tensor) -> Tensor:
        """Queries (N, Lq, D) attend to tokens (N, L, D) that are not `padding` (N, L)."""
        project = self.projections
        q, k, v = (self._heads(t) for t in (project.query(queries), project.key(x), project.value(x)))
        if self.training and self.attention_dropout:  # the kernels do not drop weights
            seen = ~padding[:, None, None]
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=self.attention_dropout)
        else:
            attended = attention(q, k, v, mask=padding[:, None, None])
        result: Tensor = self.output(attended.transpose(1, 2).flatten(2), queries)
        return result

    def first_token_weights(self, x: Tensor, padding: Tensor) -> Tensor:
        """How much the first token of each row attends to every token (N, L), mean over heads."""
        q, k = self._heads(self.projections.query(x[:, :1])), self._heads(self.projections.key(x))
        scores = (q @ k.transpose(-2, -1))[:, :, 0] * q.shape[-1] ** -0.5  # (N, heads, L)
        return scores.masked_fill(padding[:, None], float("-inf")).softmax(dim=-1).mean(dim=1)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class Intermediate(nn.Module):
    """The first half of the feed-forward network."""

    def __init__(self, hidden_dim: int, feedforward_dim: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_dim, feedforward_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden_dim) to (..., feedforward_dim)."""
        return F.gelu(self.dense(x))


class Layer(nn.Module):
    """Self-attention and a feed-forward network."""

    def __init__(
        self, hidden_dim: int, num_heads: int, feedforward_dim: int, dropout: float, attention_dropout: float
    ) -> None:
        super().__init__()
        self.attention = SelfAttention(hidden_dim, num_heads, dropout, attention_dropout)
        self.intermediate = Intermediate(hidden_dim, feedforward_dim)
        self.output = Residual(feedforward_dim, hidden_dim, dropout)

    def forward(self, x: Tensor, padding: Tensor, first_only: bool = False) -> Tensor:
        """Tokens (N, L, D) with padding (N, L), True where there is none, to tokens (N, L, D).

        With `first_only` the first token of each row alone is computed, (N, 1, D).
        """
        x = self.attention(x[:, :1] if first_only else x, x, padding)
        result: Tensor = self.output(self.intermediate(x), x)
        return result


class Encoder(nn.Module):
    """A stack of layers, of which the last one computes the first token alone."""

    def __init__(
        self,
        num_layers: int,
        hidden_dim: int,
        num_heads: int,
        feedforward_dim: int,
        dropout: float,
        attention_dropout: float,
    ) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            Layer(hidden_dim, num_heads, feedforward_dim, dropout, attention_dropout) for _ in range(num_layers)
        )

    @property
    def layers(self) -> list[Layer]:
        """The layers, typed."""
        return [cast(Layer, layer) for layer in self.layer]

    def forward(self, x: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """The first token (N, D) after the last layer, and what that layer read (N, L, D)."""
        *layers, last = self.layers
        for layer in layers:
            x = layer(x, padding)
        return last(x, padding, first_only=True)[:, 0], x


class Pooler(nn.Module):
    """What a row has become, from its first token."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_dim, hidden_dim)

    def forward(self, first: Tensor) -> Tensor:
        """(N, D) to (N, D)."""
        return torch.tanh(self.dense(first))
