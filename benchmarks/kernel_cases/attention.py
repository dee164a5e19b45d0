"""Attention over all tokens: `attention` and `hash_attention`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.kernel_cases.base import (
    OURS,
    Candidate,
    Case,
    Draw,
    Inputs,
    compiled,
    reference_and_compiled,
    with_backends,
)
from kernels.attention import attention, attention_reference
from kernels.hash_attention import hash_attention, hash_attention_reference


@dataclass(frozen=True, kw_only=True)
class AttentionCase(Case):
    """Queries and keys of `heads` heads of `dim`, with a learned bias per head or a mask per query."""

    op: ClassVar[str] = "attention"
    backward_products: ClassVar[float] = 2.5  # FlashAttention-2 (arXiv 2307.08691), section 4.1
    heads: int
    queries: int
    keys: int
    dim: int
    bias: bool = False
    mask: bool = False

    def inputs(self, draw: Draw) -> Inputs:
        """q, k, v (B, L, heads, d); bias (1, heads, Lq, Lk); mask (B, 1, Lq, Lk), true where a key is not seen."""
        inputs = {"q": draw.normal(self.batch, self.queries, self.heads, self.dim)}
        inputs |= {name: draw.normal(self.batch, self.keys, self.heads, self.dim) for name in "kv"}
        if self.bias:
            inputs["bias"] = draw.normal(1, self.heads, self.queries, self.keys)
        if self.mask:
            mask = draw.uniform(self.batch, 1, self.queries, self.keys, grad=False) < 0.7
            inputs["mask"] = mask & ~mask.all(-1, keepdim=True)  # as FASeg does
        return inputs

    def forward_flops(self) -> float:
        """Two products per score."""
        return 4.0 * self.batch * self.heads * self.queries * self.keys * self.dim

    def reference(self, inputs: Inputs) -> Tensor:
        """Matrix products and a softmax."""
        return _heads_last(attention_reference, inputs)

    def candidates(self) -> dict[str, Candidate]:
        """PyTorch's attention with each backend, flex attention, and the definition as it is and compiled."""
        flex = compiled(_flex)
        return {
            OURS: Candidate(lambda inputs: _heads_last(attention, inputs)),
            **with_backends(_sdpa),
            "flex_attention": Candidate(lambda inputs: _heads_last(flex, inputs), on_cpu=False),
            **reference_and_compiled(self.reference),
        }


def _heads_last(attend: Callable[..., Tensor], inputs: Inputs, **options: Any) -> Tensor:
    """Call `attend` with heads before tokens, as all of them want it; the result is (B, L, heads * d)."""
    q, k, v = (inputs[name].transpose(1, 2) for name in "qkv")
    masks = {name: inputs[name] for name in ("bias", "mask") if name in inputs}
    return attend(q, k, v, **masks, **options).transpose(1, 2).flatten(2)


def _sdpa(inputs: Inputs, scaled_dot_product_attention: Callable[..., Tensor]) -> Tensor:
    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=bias if mask is None else ~mask)

    return _heads_last(attend, inputs)


def _flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    def change(score: Tensor, b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        if bias is not None:
            score = score + bias[0, h, q_index, k_index]
        if mask is not None:
            score = torch.where(mask[b, 0, q_index, k_index], -torch.inf, score)
        return score

    output = flex_attention(q, k, v, score_mod=None if bias is None and mask is None else change)
    assert isinstance(output, Tensor)
    return output


@dataclass(frozen=True, kw_only=True)
class HashAttentionCase(Case):
    """Codes of `bits` and values of `dim` for `tokens` tokens; softmax attention of the same heads is the yardstick."""

    op: ClassVar[str] = "hash_attention"
    yardstick_inputs: ClassVar[tuple[str, ...]] = ("q", "k")
    heads: int
    tokens: int
    dim: int
    bits: int

    def inputs(self, draw: Draw) -> Inputs:
        """codes (B, N, heads, bits), v and, for softmax attention, q and k, (B, N, heads, d)."""
        codes = draw.normal(self.batch, self.tokens, self.heads, self.bits, grad=False).sign().requires_grad_()
        return {"codes": codes} | {name: draw.normal(self.batch, self.tokens, self.heads, self.dim) for name in "vqk"}

    def forward_flops(self) -> float:
        """Codes times values, and codes times their sum."""
        return 4.0 * self.batch * self.heads * self.tokens * self.bits * self.dim

    def reference(self, inputs: Inputs) -> Tensor:
        """The linear form."""
        return _hash(hash_attention_reference, inputs)

    def candidates(self) -> dict[str, Candidate]:
        """Softmax attention with the flash backend as the yardstick, and the linear form as it is and compiled."""
        flash = with_backends(_sdpa)["SDPA flash"]
        return {
            OURS: Candidate(lambda inputs: _hash(hash_attention, inputs)),
            "SDPA flash": flash._replace(comparable=False),
            **reference_and_compiled(self.reference),
        }


def _hash(attend: Callable[..., Tensor], inputs: Inputs) -> Tensor:
    return attend(inputs["codes"].transpose(1, 2), inputs["v"].transpose(1, 2)).transpose(1, 2).flatten(2)
