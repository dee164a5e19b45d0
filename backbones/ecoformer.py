"""EcoFormer's attention: binary codes of tokens, by hash functions in kernel space (NeurIPS 2022, arXiv 2209.09004).

Parameters and buffers have the official names; :mod:`backbones.ecoformer_networks` has the networks and
:mod:`efficiency.ecoformer` fits the hash functions.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from backbones.attention import refuse_masks, split_projections
from kernels.hash_attention import hash_attention

INITIAL_MEAN = math.exp(-0.5)  # of the kernel between unit vectors at their mean squared distance


class KernelHashing(nn.Module):
    """Hash functions of every head: the kernel between a token and m anchors, projected to `num_bits` numbers.

    Random when made: projections ``A`` (heads, bits, m) are normal, ``anchor`` (1, heads, m, d) are unit vectors, and
    the kernel's means over tokens, ``mvec`` (1, heads, 1, m), are all the same, which tells that nothing was fitted.
    """

    A: Tensor
    mvec: Tensor
    anchor: Tensor

    def __init__(self, num_heads: int, head_dim: int, num_bits: int, num_anchors: int) -> None:
        super().__init__()
        anchors = torch.randn(1, num_heads, num_anchors, head_dim)
        self.register_buffer("A", torch.randn(num_heads, num_bits, num_anchors))
        self.register_buffer("mvec", torch.full((1, num_heads, 1, num_anchors), INITIAL_MEAN))
        self.register_buffer("anchor", anchors / anchors.norm(dim=-1, keepdim=True))

    @property
    def fitted(self) -> bool:
        """Whether the functions were fitted, here or before the file was written that they were loaded from."""
        return bool((self.mvec != self.mvec.flatten()[0]).any())

    def kernel(self, unit: Tensor, anchor: Tensor) -> Tensor:
        """RBF kernel (B, heads, N, m) between unit vectors (B, heads, N, d) and anchors (1, heads, m, d).

        Its bandwidth is the mean squared distance of each sample and head.
        """
        lengths = unit.square().sum(-1, keepdim=True) + anchor.square().sum(-1).unsqueeze(-2)
        distance = lengths - 2 * (unit @ anchor.transpose(-2, -1))  # no (B, heads, N, m, d) tensor
        bandwidth = distance.mean((-2, -1), keepdim=True)
        return torch.exp(distance / (-2 * bandwidth))

    def forward(self, unit: Tensor) -> Tensor:
        """Numbers (B, heads, N, bits) whose signs are the codes of unit vectors (B, heads, N, d)."""
        projections, mean, anchor = (buffer.to(unit.dtype) for buffer in (self.A, self.mvec, self.anchor))
        return (self.kernel(unit, anchor) - mean) @ projections.transpose(-2, -1)


class HashedAttention(nn.Module):
    """Holder of the hash functions under their official name, and of a matrix that files contain and nothing uses."""

    def __init__(self, num_heads: int, head_dim: int, num_bits: int, num_anchors: int) -> None:
        super().__init__()
        rows = int(head_dim * math.log(head_dim))
        self.register_buffer("projection_matrix", torch.zeros(rows, head_dim))
        self.ksh = KernelHashing(num_heads, head_dim, num_bits, num_anchors)


class EcoFormerAttention(nn.Module):
    """Self-attention by binary codes that queries and keys share; time and memory are linear in the tokens.

    The similarity of two tokens is the inner product of their codes plus ``num_bits + 1``; see
    `kernels.hash_attention`, whose normaliser is the official one. Gradients pass the sign of numbers in (-1, 1) as if
    it were not there, and stop at others. The bandwidth of the kernel is that of the sample at hand, so codes depend on
    the whole image. Hashing is computed in float32 at least.

    Args:
        dim: C.
        num_heads: Heads, d = C / heads.
        qkv_bias: Biases of ``to_qk`` and ``to_v``.
        num_bits: Bits of a code (16 in the paper).
        num_anchors: Anchors of the kernel, m (25 in the paper).
        proj_drop: Dropout of the output.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        num_bits: int = 16,
        num_anchors: int = 25,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide dim={dim}")
        if num_bits < 1 or num_anchors < 2:
            raise ValueError(f"num_bits={num_bits}, num_anchors={num_anchors}: expected at least 1 and at least 2")
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.fast_attention = HashedAttention(num_heads, self.head_dim, num_bits, num_anchors)
        self.to_qk = nn.Linear(dim, dim, bias=qkv_bias)
        self.to_v = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    @property
    def hashing(self) -> KernelHashing:
        """The hash functions."""
        return self.fast_attention.ksh

    def forward(self, x: Tensor, size: Any = None, **masks: Any) -> Tensor:
        """(B, N, C) to (B, N, C). The `size` of the map that some blocks pass on is not needed, masks must be unset."""
        refuse_masks(self, masks)
        unit, value = self.unit_queries(x), self._heads(self.to_v(x))
        with full_precision(x):
            codes = StraightThroughSign.apply(self.hashing(unit))
            out = hash_attention(codes, value)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def unit_queries(self, x: Tensor) -> Tensor:
        """Queries (and keys) of tokens (B, N, C) as unit vectors (B, heads, N, d), in float32 at least.

        A zero stays zero, where the official code has no number.
        """
        queries = self._heads(self.to_qk(x))
        queries = queries.to(torch.promote_types(queries.dtype, torch.float32))
        length = queries.norm(dim=-1, keepdim=True)
        return queries / length.masked_fill(length == 0, 1)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, heads, N, d)."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)


def hashed_attention(attention: nn.Module, num_bits: int = 16, num_anchors: int = 25) -> EcoFormerAttention:
    """An EcoFormer layer with the query, value and output projections of a softmax `attention`; keys are dropped.

    Raises ValueError for a layer that is not one of `backbones.attention.PLAIN_ATTENTION`.
    """
    (query, _, value), bias = split_projections(attention)
    dim: int = query.shape[1]
    heads: Any = attention.num_heads
    drop: Any = attention.proj_drop
    hashed = EcoFormerAttention(dim, heads, bias is not None, num_bits, num_anchors, drop.p).to(query)
    with torch.no_grad():
        hashed.to_qk.weight.copy_(query)
        hashed.to_v.weight.copy_(value)
        if bias is not None:
            hashed.to_qk.bias.copy_(bias[0])
            hashed.to_v.bias.copy_(bias[2])
    hashed.proj = attention.proj  # type: ignore[assignment]
    return hashed.train(attention.training)


def full_precision(x: Tensor) -> torch.autocast:
    """Without autocast on the device of `x`."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


class StraightThroughSign(torch.autograd.Function):
    """Sign (0 for 0 and NaN); its gradient is that of the identity in (-1, 1) and zero elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """-1, 0 or 1."""
        ctx.save_for_backward(x.abs() < 1)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Pass the gradient on where the input was small."""
        (inside,) = ctx.saved_tensors
        return grad.masked_fill(~inside, 0)
