"""Hash functions learned one bit after the other, with kernels (KSH), as EcoFormer does (arXiv 2209.09004, section 3).

The codes y of N tokens are to reproduce similarities S in {-1, 0, 1}: bits r = 1 … b are found greedily, each with
y = sign(K a) for the kernel K (N, m) between tokens and anchors, by minimising -y' R y / (N b) with the residual
R = b S - sum of y_s y_s' over the bits s < r.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backbones.ecoformer import KernelHashing

LEARNING_RATE, MOMENTUM, STEPS = 5e-4, 0.9, 100
TOPK = 10
CHUNK = 2**24  # similarities of pairs of tokens that are held at once


@dataclass(frozen=True)
class BitFit:
    """How one bit was found: the vectors (heads, m) after the last step, the relaxed losses (steps,) before each step,
    and the loss of the hard codes before and after. Only a bit whose loss fell was `accepted`."""

    candidate: Tensor
    relaxed_losses: Tensor
    hard_loss_before: float
    hard_loss_after: float

    @property
    def accepted(self) -> bool:
        """Whether the candidate replaced the vector that was there."""
        return self.hard_loss_after < self.hard_loss_before


@torch.no_grad()
def fit_hash_functions(
    hashing: KernelHashing, unit: Tensor, anchor_index: Tensor, topk: int = TOPK, learning_rate: float = LEARNING_RATE
) -> list[BitFit]:
    """Fit the functions of `hashing`, in place, to unit vectors (B, heads, N, d); the official procedure and numbers.

    Anchors become the tokens `anchor_index` (m,) of the first sample, means those of the kernel over samples and
    tokens, and the projections, from what they are, follow `STEPS` steps of gradient descent with Nesterov's momentum.
    Tokens are similar (1) to the `topk` of the largest inner products, themselves included, dissimilar (-1) to those of
    the smallest, which wins where both hold. Gradients are closed forms: it runs without autograd, and in
    O(B heads N (topk + bits + m)) memory plus 64 MB, since no matrix of pairs of tokens is kept.

    Raises ValueError, before anything is changed, with fewer tokens than anchors or `topk`, and for tokens that are all
    alike.
    """
    num_tokens, num_anchors = unit.shape[2], hashing.A.shape[2]
    if num_tokens < max(num_anchors, topk):
        raise ValueError(
            f"{num_tokens} tokens cannot fit hash functions of {num_anchors} anchors and {topk} neighbours: as many "
            "tokens are needed; use larger images, fewer anchors (num_anchors) or only the stages of large maps"
        )
    anchor = unit[:1, :, anchor_index]
    kernel = hashing.kernel(unit, anchor)
    if not kernel.isfinite().all():
        raise ValueError("tokens that are all alike in a head, or not finite, cannot fit hash functions")
    mean = kernel.mean((0, 2), keepdim=True)
    similarity = SignedNeighbours(unit, topk)
    projections = hashing.A.to(unit.dtype)
    trace = _fit_bits(projections, kernel - mean, similarity, learning_rate)
    hashing.A.copy_(projections)
    hashing.mvec.copy_(mean)
    hashing.anchor.copy_(anchor)
    return trace


class SignedNeighbours:
    """The similarities S of every token to its nearest (1) and farthest (-1) tokens: a sparse (B, heads, N, N) matrix.

    `index` (B, heads, N, 2 topk) counts the tokens of all samples and heads through, `weight` is 1, -1 or 0.
    """

    def __init__(self, unit: Tensor, topk: int) -> None:
        self.shape = unit.shape[:3]
        batch, heads, num_tokens = self.shape
        rows = max(1, CHUNK // (batch * heads * num_tokens))
        near, far = [], []
        for some in unit.split(rows, dim=2):
            cosine = some @ unit.transpose(-2, -1)  # (B, heads, rows, N)
            near.append(cosine.topk(topk, dim=-1).indices)
            far.append(cosine.topk(topk, dim=-1, largest=False).indices)
        nearest, farthest = torch.cat(near, dim=2), torch.cat(far, dim=2)
        is_far = (nearest.unsqueeze(-1) == farthest.unsqueeze(-2)).any(-1)
        weight = torch.cat((1 - is_far.to(unit.dtype), -torch.ones_like(farthest, dtype=unit.dtype)), dim=-1)
        first = torch.arange(batch * heads, device=unit.device).view(batch, heads, 1, 1) * num_tokens
        self.index = torch.cat((nearest, farthest), dim=-1) + first
        self.weight = weight

    def times(self, y: Tensor) -> Tensor:
        """S y, (B, heads, N) for y (B, heads, N)."""
        return (self.weight * y.flatten()[self.index]).sum(-1)

    def transposed_times(self, y: Tensor) -> Tensor:
        """S' y, (B, heads, N) for y (B, heads, N)."""
        values = (self.weight * y.unsqueeze(-1)).flatten()
        return torch.zeros_like(y).flatten().index_add_(0, self.index.flatten(), values).view(self.shape)


class _Residual:
    """R = b S - sum of y_s y_s' over the bits found so far, and the loss -y' R y / (N b), mean of samples and heads."""

    def __init__(self, similarity: SignedNeighbours, num_bits: int) -> None:
        self.similarity, self.num_bits = similarity, num_bits
        batch, heads, num_tokens = similarity.shape
        self.scale = -1 / (num_tokens * num_bits * batch * heads)
        self.codes = similarity.weight.new_empty(*similarity.shape, 0)  # (B, heads, N, bits so far)

    def add(self, y: Tensor) -> None:
        """Note the codes (B, heads, N) of one more bit."""
        self.codes = torch.cat((self.codes, y.unsqueeze(-1)), dim=-1)

    def loss(self, y: Tensor) -> float:
        """The loss of codes y (B, heads, N)."""
        product = self.num_bits * self.similarity.times(y) - self._codes_times(y)
        return self.scale * float((y * product).sum())

    def loss_and_gradient(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and its derivative with respect to y; S, and so R, is not symmetric."""
        codes = self._codes_times(y)
        product = self.num_bits * self.similarity.times(y) - codes
        transposed = self.num_bits * self.similarity.transposed_times(y) - codes
        return self.scale * (y * product).sum(), self.scale * (product + transposed)

    def _codes_times(self, y: Tensor) -> Tensor:
        return (self.codes @ (self.codes.transpose(-2, -1) @ y.unsqueeze(-1))).squeeze(-1)


def _fit_bits(projections: Tensor, kernel: Tensor, similarity: SignedNeighbours, learning_rate: float) -> list[BitFit]:
    """Change `projections` (heads, bits, m), one bit after the other, for the centred kernel (B, heads, N, m)."""
    residual, trace = _Residual(similarity, projections.shape[1]), []
    for bit in range(projections.shape[1]):
        before = projections[:, bit]
        candidate, losses = _descend(before, kernel, residual, learning_rate)
        old, new = _hard_codes(kernel, before), _hard_codes(kernel, candidate)
        fit = BitFit(candidate, losses, residual.loss(old), residual.loss(new))
        if not candidate.isfinite().all():
            raise ValueError(f"the hash function of bit {bit} is not finite any more")
        if fit.accepted:
            projections[:, bit] = candidate
        residual.add(new if fit.accepted else old)
        trace.append(fit)
    return trace


def _descend(start: Tensor, kernel: Tensor, residual: _Residual, learning_rate: float) -> tuple[Tensor, Tensor]:
    """The vectors (heads, m) of one bit after `STEPS` steps, and the losses of y = tanh(K a / 2) before each."""
    vector, momentum, losses = start.clone(), torch.zeros_like(start), []
    for _ in range(STEPS):
        y = torch.tanh(_project(kernel, vector) / 2)
        loss, slope = residual.loss_and_gradient(y)
        outer = slope * (1 - y.square()) / 2  # (B, heads, N)
        gradient = (outer.unsqueeze(-2) @ kernel).squeeze(-2).sum(0)
        momentum = MOMENTUM * momentum + gradient
        vector = vector - learning_rate * (gradient + MOMENTUM * momentum)
        losses.append(loss)
    return vector, torch.stack(losses)


def _project(kernel: Tensor, vector: Tensor) -> Tensor:
    """(B, heads, N) of the kernel (B, heads, N, m) and one vector (heads, m) per head."""
    return (kernel @ vector.unsqueeze(-1)).squeeze(-1)


def _hard_codes(kernel: Tensor, vector: Tensor) -> Tensor:
    """1 where the projection is positive, else -1."""
    return (_project(kernel, vector) > 0).to(kernel.dtype) * 2 - 1
