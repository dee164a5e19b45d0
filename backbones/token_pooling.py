"""Pool the tokens of a Vision Transformer between its blocks (Pan et al. 2021, "Scalable Vision Transformers with
Hierarchical Pooling", arXiv 2103.10619, section 3.2).

The row-major sequence of patch tokens is max-pooled in one dimension, so the end of one image row is pooled with the
start of the next; a position embedding of the pooled length is then added. Class, distillation and register tokens
pass by.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


def pool_tokens(
    vit: VisionTransformer, pool_block_width: int, kernel_size: int = 3, stride: int = 2
) -> "PooledVisionTransformer":
    """Add pooling to a timm Vision Transformer, in place: after every block i with ``i % pool_block_width == 0``.

    Every pooled block gets a parameter ``pos_embed`` (1, L', C) in the state dict (``blocks.<i>.pos_embed``), where L'
    is the number of patch tokens after its pooling at the model's image size; for images of another size the embedding
    is resized linearly. A sequence shorter than `kernel_size` is pooled to one token. All else of the model stays.

    Returns `vit`, now a `PooledVisionTransformer`. Raises ValueError for a model that is none of timm's
    ``VisionTransformer`` and ``VisionTransformerDistilled`` (or is pooled already) and for a number below 1.
    """
    if type(vit) not in _POOLED:
        raise ValueError(f"{type(vit).__name__}: expected a VisionTransformer of timm whose tokens are not pooled yet")
    add_pooling(vit, pool_block_width, kernel_size, stride)
    vit.__class__ = _POOLED[type(vit)]
    return vit  # type: ignore[return-value]


def add_pooling(vit: VisionTransformer, pool_block_width: int, kernel_size: int, stride: int) -> None:
    """Add the hooks and parameters of `pool_tokens`, once per model; the class stays as it is."""
    options = {"kernel_size": kernel_size, "stride": stride}
    for name, value in {"pool_block_width": pool_block_width, **options}.items():
        if value < 1:
            raise ValueError(f"{name}={value}: expected 1 or more")
    block: Any
    for block in vit.blocks[::pool_block_width]:
        block.pooling = {**options, "num_prefix_tokens": vit.num_prefix_tokens}
        block.register_forward_hook(_pool_output)
    weight = next(vit.parameters())
    for block, length in pooled_blocks(vit):
        embedding = torch.empty(1, length, vit.embed_dim, device=weight.device, dtype=weight.dtype)
        block.pos_embed = nn.Parameter(trunc_normal_(embedding, std=0.02))


def pooled_blocks(vit: VisionTransformer) -> list[tuple[Any, int]]:
    """The blocks that end in pooling, each with its number of patch tokens at the model's image size."""
    length: int = vit.patch_embed.num_patches
    found: list[tuple[Any, int]] = []
    block: Any
    for block in vit.blocks:
        if hasattr(block, "pooling"):
            length = pooled_length(length, block.pooling["kernel_size"], block.pooling["stride"])
            found.append((block, length))
    return found


def pooled_length(length: int, kernel_size: int, stride: int) -> int:
    """Number of tokens left of `length` after pooling without padding; at least one."""
    return (max(length, kernel_size) - kernel_size) // stride + 1


def pool_sequence(tokens: Tensor, kernel_size: int, stride: int) -> Tensor:
    """Max-pool (B, L, C) along the sequence to (B, L', C), L' as `pooled_length` says."""
    kernel_size = min(kernel_size, tokens.shape[1])
    return F.max_pool1d(tokens.transpose(1, 2), kernel_size, stride).transpose(1, 2)


def resize_sequence(embedding: Tensor, length: int) -> Tensor:
    """Resize a position embedding (1, L, C) linearly to (1, `length`, C)."""
    if embedding.shape[1] == length:
        return embedding
    return F.interpolate(embedding.transpose(1, 2), size=length, mode="linear", align_corners=False).transpose(1, 2)


def _pool_output(block: Any, _inputs: Any, tokens: Tensor) -> Tensor:
    """Forward hook of a pooled block: a hook works for every kind of block and leaves the parameters' names alone."""
    prefix = block.pooling["num_prefix_tokens"]
    patches = pool_sequence(tokens[:, prefix:], block.pooling["kernel_size"], block.pooling["stride"])
    patches = patches + resize_sequence(block.pos_embed, patches.shape[1])
    return torch.cat([tokens[:, :prefix], patches], dim=1) if prefix else patches


class PooledVisionTransformer(VisionTransformer):
    """timm's Vision Transformer with pooling between blocks; `pool_tokens` makes it from a plain one."""

    def forward_intermediates(  # type: ignore[override]
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NLC",
        intermediates_only: bool = False,
        **options: Any,
    ) -> Any:
        """timm's method, for tokens (B, L, C) only. Raises ValueError for another `output_fmt`: there is no map."""
        if output_fmt != "NLC" and pooled_blocks(self):
            raise ValueError(
                f"output_fmt={output_fmt!r}: pooled tokens are a sequence, not a map; expected output_fmt='NLC'"
            )
        return super().forward_intermediates(
            x, indices, return_prefix_tokens, norm, stop_early, output_fmt, intermediates_only, **options
        )

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """timm's method: make the model one of another image or patch size, with every position embedding resized."""
        super().set_input_size(img_size, patch_size)
        for block, length in pooled_blocks(self):
            resized = resize_sequence(block.pos_embed.detach(), length)
            block.pos_embed = nn.Parameter(resized, requires_grad=block.pos_embed.requires_grad)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that take no weight decay: position embeddings and added tokens."""
        plain = super().no_weight_decay()
        return {name for name, _ in self.named_parameters() if name in plain or name.endswith(".pos_embed")}


class _PooledVisionTransformerDistilled(PooledVisionTransformer, VisionTransformerDistilled):
    """DeiT with a distillation token, after `pool_tokens`."""


_POOLED: dict[type[nn.Module], type[PooledVisionTransformer]] = {
    VisionTransformer: PooledVisionTransformer,
    VisionTransformerDistilled: _PooledVisionTransformerDistilled,
}
