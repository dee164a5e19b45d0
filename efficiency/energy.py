"""Multiplications, additions and energy of one image, as EcoFormer counts them (arXiv 2209.09004, table 1).

Linear layers and convolutions count as many additions as multiplications, and so do layer norms with two per number;
biases of linear layers, activations, softmax, residual sums and pooling count nothing. Attention counts what the paper
counts: for EcoFormer neither the exponentials nor the bandwidth of the kernel, whose squares are additions. An
operation costs what a 32-bit floating-point unit takes in 45 nm CMOS.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from timm.models import twins
from torch import Tensor, nn

from backbones.attention import is_plain_attention
from backbones.ecoformer import EcoFormerAttention

MULTIPLICATION_PJ, ADDITION_PJ = 3.7, 0.9


@dataclass(frozen=True)
class Operations:
    """Numbers of multiplications and additions."""

    multiplications: int = 0
    additions: int = 0

    @property
    def energy_pj(self) -> float:
        """Energy in picojoules."""
        return MULTIPLICATION_PJ * self.multiplications + ADDITION_PJ * self.additions

    def __add__(self, other: Operations) -> Operations:
        return Operations(self.multiplications + other.multiplications, self.additions + other.additions)


def count_operations(network: nn.Module, size: Sequence[int]) -> dict[str, Operations]:
    """Operations of every layer of `network` that counts, by name, for an input of shape `size`, e.g. (1, 3, 224, 224).

    Attention layers stand for their products and hashing; their projections have names of their own. Nothing is
    computed: the network runs on the meta device. Of softmax attention the layers of `backbones.attention` are known.
    """
    shadow = copy.deepcopy(network).to("meta", torch.float32).eval()
    counted: dict[str, Operations] = {}
    for name, module in shadow.named_modules():
        if (formula := _formula(module)) is not None:
            module.register_forward_hook(_adding(counted, name, formula))
    with torch.no_grad():
        shadow(torch.empty(tuple(size), device="meta"))
    return counted


def total(counted: dict[str, Operations]) -> Operations:
    """The sum over layers."""
    return sum(counted.values(), Operations())


def _adding(counted: dict[str, Operations], name: str, formula: Any) -> Any:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        counted[name] = counted.get(name, Operations()) + formula(module, inputs[0], output)

    return hook


def _formula(module: nn.Module) -> Any:
    if isinstance(module, EcoFormerAttention):
        return _hashed
    if is_plain_attention(module):
        return _softmax
    return next((formula for cls, formula in FORMULAS if isinstance(module, cls)), None)


def _linear(layer: Any, x: Tensor, output: Tensor) -> Operations:
    return _both(x.numel() * layer.out_features)


def _convolution(layer: Any, x: Tensor, output: Tensor) -> Operations:
    per_position = prod(layer.kernel_size) * layer.in_channels // layer.groups + (layer.bias is not None)
    return _both(output.numel() * per_position)


def _norm(layer: Any, x: Tensor, output: Tensor) -> Operations:
    return _both(x.numel() * (2 if layer.elementwise_affine else 1))


def _hashed(layer: EcoFormerAttention, x: Tensor, output: Tensor) -> Operations:
    bits, anchors = layer.hashing.A.shape[1:]
    dim, tokens = layer.head_dim, x.shape[0] * x.shape[1] * layer.num_heads
    multiplications = 2 * anchors + anchors * bits + bits + 1 + dim
    additions = 2 * anchors * dim + anchors * bits + 2 * bits + 2 * bits * dim + dim
    return Operations(tokens * multiplications, tokens * additions)


def _softmax(layer: Any, x: Tensor, output: Tensor) -> Operations:
    batch, tokens, dim = x.shape
    pairs = batch * tokens * _keys_of_a_query(layer, tokens)
    return Operations(2 * pairs * dim + layer.num_heads * pairs, 2 * pairs * dim)


def _keys_of_a_query(layer: Any, tokens: int) -> int:
    """How many tokens each token attends to, where nothing is padded."""
    if isinstance(layer, twins.LocallyGroupedAttn):
        return min(layer.ws**2, tokens)
    if getattr(layer, "pool", None) is not None:
        return prod([layer.pool.output_size] * 2)
    reduction = getattr(layer, "sr", None)
    return tokens // prod(reduction.stride) if reduction is not None else tokens


def _both(count: int) -> Operations:
    return Operations(count, count)


FORMULAS: tuple[tuple[type[nn.Module], Any], ...] = (
    (nn.Linear, _linear),
    (nn.Conv2d, _convolution),
    (nn.LayerNorm, _norm),
)
