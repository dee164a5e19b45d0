"""Layers of SPViT (arXiv 2111.11802): self-attention with its value projection apart, the convolutions that share its
weights, and the block around either. State-dict keys are those of the official repository.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backbones.spvit_architecture import CENTRE
from kernels.attention import attention


class SplitAttention(nn.Module):
    """Multi-head self-attention whose queries and keys have one projection, the values another."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qk = nn.Linear(dim, 2 * dim)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def attend(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(B, N, C) to the same shape; `bias` (1 or B, heads, N, N) is added to the scores."""
        q, k = self.qk(x).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, N, d)
        v = self.v(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        return self.proj(attention(q, k, v, bias).transpose(1, 2).flatten(2))


def merged_kernel(layer: Any, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The bottleneck convolution that the heads of `layer` make: its weights, see `BottleneckConv`.

    `layer` has ``num_heads``, ``v``, ``proj``, ``head_probs`` (heads, 9), ``alpha`` and ``taps``. Returns weight
    (d, C, size, size) and bias (d) of the first convolution and the weight (C, d) of the 1 x 1 convolution behind it.
    """
    share = (layer.head_probs / layer.alpha).softmax(0)[:, list(layer.taps)]  # (heads, kernel position)
    share = share[:, CENTRE : CENTRE + 1] if size == 1 else share
    weight = torch.einsum("hdc,ht->dct", layer.v.weight.unflatten(0, (layer.num_heads, -1)), share)
    bias = torch.einsum("hd,ht->d", layer.v.bias.unflatten(0, (layer.num_heads, -1)), share)
    out = torch.einsum("chd,ht->cd", layer.proj.weight.unflatten(1, (layer.num_heads, -1)), share)
    return weight.unflatten(2, (size, size)), bias, out


def bottleneck(x: Tensor, kernel: tuple[Tensor, Tensor, Tensor], norm: nn.Module, bias: Tensor | None) -> Tensor:
    """Convolution, batch norm, ReLU and 1 x 1 convolution on maps (B, H, W, C); `kernel` is that of `merged_kernel`."""
    weight, inner_bias, out = kernel
    x = F.conv2d(x.permute(0, 3, 1, 2), weight, inner_bias, padding=weight.shape[-1] // 2)
    return F.linear(norm(x).relu().permute(0, 2, 3, 1), out, bias)


class BottleneckConv(nn.Module):
    """The convolution of `size` x `size` pixels (1 or 3) that stands for a self-attention, on maps (B, H, W, C).

    Its first convolution maps to the width d of one head. The heads' value and output projections stay as they are, and
    are mixed to a kernel in every forward: each of nine taps is a mixture of heads, with weights
    ``softmax(head_probs / alpha)`` over the heads. `collapse` keeps the kernel alone.

    Args:
        dim: C.
        num_heads: Heads of the self-attention.
        size: 1, which is the middle tap, or 3.
        taps: The column of ``head_probs`` (heads, 9) for each position of a 3 x 3 kernel, row by row.
        alpha: Temperature.
        collapsed: Make the layer as `collapse` leaves it.
    """

    def __init__(
        self, dim: int, num_heads: int, size: int, taps: Sequence[int], alpha: float, collapsed: bool = False
    ) -> None:
        super().__init__()
        self.num_heads, self.size, self.taps, self.alpha = num_heads, size, tuple(taps), alpha
        self.bconv: nn.Sequential | None = None
        if collapsed:
            self._set_kernel(dim, dim // num_heads)
            return
        self.head_probs = nn.Parameter(torch.ones(num_heads, 9))
        self.add_module(f"bn_{size}x{size}", nn.BatchNorm2d(dim // num_heads))
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def _set_kernel(self, dim: int, head_dim: int) -> None:
        first = nn.Conv2d(dim, head_dim, self.size, padding=self.size // 2)
        self.bconv = nn.Sequential(first, nn.BatchNorm2d(head_dim), nn.ReLU(), nn.Conv2d(head_dim, dim, 1))

    def convolve(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        if self.bconv is not None:
            return self.bconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        norm = self.get_submodule(f"bn_{self.size}x{self.size}")
        return bottleneck(x, merged_kernel(self, self.size), norm, self.proj.bias)

    @torch.no_grad()
    def collapse(self) -> None:
        """Replace the projections by the kernel they make (``bconv``); the function of the layer stays."""
        if self.bconv is not None:
            return
        weight, bias, out = merged_kernel(self, self.size)
        norm = f"bn_{self.size}x{self.size}"
        with torch.device(weight.device):
            self._set_kernel(len(out), out.shape[1])
        layers: Any = self.bconv
        layers.to(weight.dtype)
        state = {"0.weight": weight, "0.bias": bias, "3.weight": out[..., None, None], "3.bias": self.proj.bias}
        state |= {f"1.{name}": tensor for name, tensor in self.get_submodule(norm).state_dict().items()}
        layers.load_state_dict(state)
        layers.train(self.training)
        for name in ("v", "proj", "head_probs", norm):
            delattr(self, name)


class FeedForward(nn.Module):
    """Linear layer, GELU, linear layer, with any number of hidden units, none included."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to the same shape."""
        return self.fc2(self.act(self.fc1(x)))


class MixerBlock(nn.Module):
    """Pre-norm spatial mixer (absent where the block skips it) and feed-forward network, both residual.

    Args:
        dim: C.
        mixer: Module called with the normalised tokens and what `forward` is given as `where`.
        width: Hidden units.
        drop_path: Stochastic depth.
        eps: Of the layer norms.
    """

    def __init__(self, dim: int, mixer: nn.Module | None, width: int, drop_path: float, eps: float) -> None:
        super().__init__()
        if mixer is not None:
            self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = mixer
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp: nn.Module = FeedForward(dim, width)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, where: Any) -> Tensor:
        """Transform tokens; `where` is what the mixers of the network need to know of their map."""
        if self.attn is not None:
            x = x + self.drop_path(self.attn(self.norm1(x), where))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Passed(nn.Module):
    """The official pruned network's way to skip a mixer: the block adds its normalised input."""

    def forward(self, x: Tensor, where: Any) -> Tensor:
        """`x`."""
        return x


def checkpointed(block: nn.Module, *args: Any) -> Tensor:
    """``block(*args)``, computed again in the backward pass; batch norms see the batch once."""
    return checkpoint(block, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _unchanged_norms(block)))


@contextmanager
def _unchanged_norms(block: nn.Module) -> Iterator[None]:
    norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
            norm.num_batches_tracked = None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone()
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
