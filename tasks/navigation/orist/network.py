"""The network of ORIST: one sequence per option, scored by what its first token became.

Options of an episode meet in the softmax over their scores and in their mean, from which the memory and the heads about
the whole step are computed. Attributes are named as in the official checkpoints, so state dicts have their keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.navigation.orist.embeddings import (
    BOX_DIM,
    ORIENTATION_DIM,
    ObjectEmbeddings,
    OrientationEmbedding,
    TextEmbeddings,
    join,
)
from tasks.navigation.orist.encoder import Encoder, Pooler

NUM_DIRECTIONS = 4
LEAK = 0.01


class Options(NamedTuple):
    """The N options of B episodes, episode by episode, stopping last."""

    input_ids: Tensor  # (B, T)
    text_length: Tensor  # (B,)
    objects: Tensor  # (N, K, F)
    boxes: Tensor  # (N, K, 7)
    num_objects: Tensor  # (N,)
    orientation: Tensor  # (N, 4)
    num_options: Tensor  # (B,)


class Memory(NamedTuple):
    """What an episode remembers: the state (B, D) that becomes its first token, and the LSTM's cell (B, D)."""

    state: Tensor
    cell: Tensor | None


@dataclass(frozen=True)
class Step:
    """Outputs of one step. Logits, except `value`."""

    scores: Tensor  # (N,)
    direction: Tensor  # (N, 4) forward, backward, left, right
    room_presence: Tensor | None  # (N, R)
    progress: Tensor  # (B,)
    next_room: Tensor  # (B, R)
    target_room: Tensor  # (B, R)
    value: Tensor  # (B,)
    memory: Memory  # LSTM: after this step; else the first tokens of all rows (N, D)
    attended: Tensor | None  # (N, K) attention of the first token to the objects


class MLP(nn.Module):
    """Two linear layers."""

    def __init__(self, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., out_dim)."""
        result: Tensor = self.fc2(F.leaky_relu(self.fc1(x), LEAK))
        return result


class Uniter(nn.Module):
    """UNITER's transformer (ECCV 2020, arXiv 1909.11740) with a token for the orientation."""

    def __init__(
        self,
        vocab_size: int,
        feature_dim: int,
        hidden_dim: int,
        num_layers: int,
        num_heads: int,
        feedforward_dim: int,
        max_positions: int,
        dropout: float,
        attention_dropout: float,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.embeddings = TextEmbeddings(vocab_size, hidden_dim, max_positions)
        self.img_embeddings = ObjectEmbeddings(feature_dim, hidden_dim)
        self.orien_embeddings = OrientationEmbedding(hidden_dim)
        self.encoder = Encoder(num_layers, hidden_dim, num_heads, feedforward_dim, dropout, attention_dropout)
        self.pooler = Pooler(hidden_dim)

    def tokens(self, options: Options, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Sequences (N, L, D) and their padding (N, L); `state` (B, D) replaces the first token."""
        text = self.embeddings(options.input_ids).repeat_interleave(options.num_options, dim=0)
        text = self._drop(text)
        if state is not None:
            first = state.to(text.dtype).repeat_interleave(options.num_options, dim=0)
            text = torch.cat([first[:, None], text[:, 1:]], dim=1)
        type_embedding = self.embeddings.token_type_embeddings.weight[1]
        objects = self._drop(self.img_embeddings(options.objects, options.boxes, type_embedding))
        orientation = self._drop(self.orien_embeddings(options.orientation))
        text_length = options.text_length.repeat_interleave(options.num_options)
        return join(text, text_length, objects, options.num_objects, orientation)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class ORISTNetwork(nn.Module):
    """Scores options, and predicts progress, rooms, directions and the value of a step.

    Args:
        vocab_size: Number of word pieces.
        feature_dim: Size F of an object's feature.
        num_rooms: Number R of room classes.
        hidden_dim: Width D.
        num_layers: Layers of the encoder.
        num_heads: Attention heads.
        feedforward_dim: Hidden width of the feed-forward networks.
        max_positions: Size of the position table.
        dropout: After embeddings, attention and feed-forward networks.
        attention_dropout: Of attention weights.
        feature_dropout: Of the numbers of object features.
        use_lstm: Remember through an LSTM; otherwise the last first token of the chosen option is the memory.
        initializer_range: Standard deviation of the initial weights. BERT's 0.02 suits its width; a narrower network
            that starts from nothing learns sooner with more.
        room_presence: Add the head for the rooms around an option, which no published model has.
    """

    def __init__(
        self,
        vocab_size: int,
        feature_dim: int = 2048,
        num_rooms: int = 31,
        hidden_dim: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        feedforward_dim: int = 3072,
        max_positions: int = 512,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        feature_dropout: float = 0.5,
        use_lstm: bool = True,
        initializer_range: float = 0.02,
        room_presence: bool = False,
    ) -> None:
        super().__init__()
        self.feature_dropout = feature_dropout
        self.uniter = Uniter(
            vocab_size,
            feature_dim,
            hidden_dim,
            num_layers,
            num_heads,
            feedforward_dim,
            max_positions,
            dropout,
            attention_dropout,
        )
        self.r2r_output = nn.Linear(hidden_dim, 1)
        self.progress_pred = MLP(hidden_dim, 1)
        self.angle_pred = MLP(hidden_dim, NUM_DIRECTIONS)
        self.region_pred = MLP(hidden_dim, num_rooms) if room_presence else None
        self.next_region_pred = MLP(hidden_dim, num_rooms)
        self.target_region_pred = MLP(hidden_dim, num_rooms)
        self.lstm = nn.LSTMCell(hidden_dim, hidden_dim) if use_lstm else None
        self.critic = nn.Linear(hidden_dim, 1)
        self.apply(lambda module: _initialise(module, initializer_range))

    @property
    def head_names(self) -> list[str]:
        """Children that are not part of UNITER, and so start from nothing."""
        return ["uniter.orien_embeddings", *(name for name, _ in self.named_children() if name != "uniter")]

    def forward(self, options: Options | Tensor, memory: Memory | None = None, attend: bool = False) -> Step:
        """Judge the options of a step; `memory` is None in the first one.

        A tensor of word pieces (1, T) stands for a step with one option and one object.
        """
        if isinstance(options, Tensor):
            options = self._example(options)
        if self.training and self.feature_dropout:
            options = options._replace(objects=F.dropout(options.objects, self.feature_dropout))
        x, padding = self.uniter.tokens(options, None if memory is None else memory.state)
        first, read = self.uniter.encoder(x, padding)
        pooled = self.uniter.pooler(first)
        return self._heads(options, memory, first, pooled, self._attended(options, read, padding) if attend else None)

    def remember(self, memory: Memory | None, step: Step, rows: Tensor, moved: Tensor, of: Tensor) -> Memory:
        """The memory of b episodes for the next step, each of which continues episode `of` (b,) of this one.

        Those that `moved` (b,) take the new state, `rows` (b,) being the options that they chose. As in the official
        code the LSTM's cell is renewed for all.
        """
        state = step.memory.state[of if self.lstm is not None else rows]
        old = torch.zeros_like(state) if memory is None else memory.state[of]
        cell = None if step.memory.cell is None else step.memory.cell[of]
        return Memory(torch.where(moved[:, None], state, old), cell)

    def _heads(
        self, options: Options, memory: Memory | None, first: Tensor, pooled: Tensor, attended: Tensor | None
    ) -> Step:
        mean = mean_of_neighbours(pooled, options.num_options)
        state, cell = first, None
        if self.lstm is not None:
            before = None if memory is None or memory.cell is None else (memory.state, memory.cell)
            state, cell = self.lstm(mean, before)
        return Step(
            scores=self.r2r_output(pooled)[:, 0],
            direction=self.angle_pred(pooled),
            room_presence=None if self.region_pred is None else self.region_pred(pooled),
            progress=self.progress_pred(mean)[:, 0],
            next_room=self.next_region_pred(mean),
            target_room=self.target_region_pred(mean),
            value=self.critic(mean)[:, 0],
            memory=Memory(state, cell),
            attended=attended,
        )

    def _attended(self, options: Options, read: Tensor, padding: Tensor) -> Tensor:
        """Attention of the first token to the objects (N, K), 0 where there is none."""
        weights = self.uniter.encoder.layers[-1].attention.first_token_weights(read, padding)
        number = torch.arange(options.objects.shape[1], device=weights.device)
        start = options.text_length.repeat_interleave(options.num_options)[:, None]
        at = (start + number).clamp(max=weights.shape[1] - 1)
        return weights.gather(1, at) * (number < options.num_objects[:, None])

    def _example(self, input_ids: Tensor) -> Options:
        like = self.r2r_output.weight
        one = input_ids.new_ones(1)
        return Options(
            input_ids,
            one * input_ids.shape[1],
            like.new_zeros(1, 1, self.uniter.img_embeddings.img_linear.in_features),
            like.new_zeros(1, 1, BOX_DIM),
            one,
            like.new_zeros(1, ORIENTATION_DIM),
            one,
        )


def mean_of_neighbours(pooled: Tensor, num_options: Tensor) -> Tensor:
    """Mean (B, D) of the rows (N, D) of each episode but its last, which is stopping; 0 where there is no other."""
    neighbours = num_options - 1
    column = torch.arange(int(neighbours.max()), device=pooled.device)
    present = column < neighbours[:, None]  # (B, C)
    start = (num_options.cumsum(0) - num_options)[:, None]
    rows = pooled[torch.where(present, start + column, start)]  # (B, C, D)
    total = (rows * present[:, :, None]).sum(dim=1)
    return total / neighbours.clamp(min=1)[:, None].to(pooled.dtype)


def _initialise(module: nn.Module, std: float) -> None:
    """BERT's initial values; the LSTM keeps PyTorch's."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx] = 0.0
