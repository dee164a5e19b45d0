"""What ORIST's encoder reads: word pieces, objects and one orientation per option, each as a token.

Attributes are named as in the official checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

NORM_EPS = 1e-12
BOX_DIM = 7
ORIENTATION_DIM = 4


class TextEmbeddings(nn.Module):
    """Word, position and type 0, normalised."""

    def __init__(self, vocab_size: int, hidden_dim: int, max_positions: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, hidden_dim, padding_idx=0)
        self.position_embeddings = nn.Embedding(max_positions, hidden_dim)
        self.token_type_embeddings = nn.Embedding(2, hidden_dim)
        self.LayerNorm = nn.LayerNorm(hidden_dim, NORM_EPS)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Word pieces (B, T) to tokens (B, T, D)."""
        positions = self.position_embeddings.weight[: input_ids.shape[1]]
        embedded: Tensor = self.LayerNorm(
            self.word_embeddings(input_ids) + positions + self.token_type_embeddings.weight[0]
        )
        return embedded


class ObjectEmbeddings(nn.Module):
    """Feature and box, each projected and normalised, and type 1.

    `mask_embedding` belongs to UNITER's pre-training; ORIST keeps it in its checkpoints and never uses it.
    """

    def __init__(self, feature_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.img_linear = nn.Linear(feature_dim, hidden_dim)
        self.img_layer_norm = nn.LayerNorm(hidden_dim, NORM_EPS)
        self.pos_layer_norm = nn.LayerNorm(hidden_dim, NORM_EPS)
        self.pos_linear = nn.Linear(BOX_DIM, hidden_dim)
        self.mask_embedding = nn.Embedding(2, feature_dim, padding_idx=0).requires_grad_(False)
        self.LayerNorm = nn.LayerNorm(hidden_dim, NORM_EPS)

    def forward(self, features: Tensor, boxes: Tensor, type_embedding: Tensor) -> Tensor:
        """Features (N, K, F) and boxes (N, K, 7) to tokens (N, K, D)."""
        feature = self.img_layer_norm(self.img_linear(features))
        embedded: Tensor = self.LayerNorm(feature + self.pos_layer_norm(self.pos_linear(boxes)) + type_embedding)
        return embedded


class OrientationEmbedding(nn.Module):
    """Sine and cosine of heading and elevation, projected and normalised."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.orien_embeddings = nn.Linear(ORIENTATION_DIM, hidden_dim)
        self.orien_norm = nn.LayerNorm(hidden_dim, NORM_EPS)

    def forward(self, orientation: Tensor) -> Tensor:
        """(N, 4) to (N, D)."""
        embedded: Tensor = self.orien_norm(self.orien_embeddings(orientation))
        return embedded


def join(
    text: Tensor, text_length: Tensor, objects: Tensor, num_objects: Tensor, last: Tensor
) -> tuple[Tensor, Tensor]:
    """Put the valid tokens of each row one after the other: text, objects, one last token.

    Args:
        text: (N, T, D).
        text_length: (N,).
        objects: (N, K, D).
        num_objects: (N,).
        last: (N, D).

    Returns:
        Sequences (N, L, D), L being the length of the longest, and their padding (N, L), True after the end.
    """
    tokens = torch.cat([text, objects, last[:, None]], dim=1)
    lengths = text_length + num_objects
    longest = int(lengths.max()) + 1
    position = torch.arange(longest, device=text.device).expand(len(text), longest)
    start, end = text_length[:, None], lengths[:, None]
    index = torch.where(position >= start, position - start + text.shape[1], position)
    index = torch.where(position == end, tokens.shape[1] - 1, index)
    index = torch.where(position > end, position, index)  # padding: anything
    index = index[:, :, None].expand(-1, -1, tokens.shape[2])
    return tokens.gather(1, index), position > end
