"""Global self-attention of token sequences under timm's names, and the weights of timm's softmax attentions."""

from collections.abc import Mapping
from typing import Any

import timm.layers
import torch
from timm.models import pvt_v2, twins
from torch import Tensor, nn

from kernels.attention import attention


def refuse_masks(layer: nn.Module, masks: Mapping[str, Any]) -> None:
    """Raise ValueError where one of the masks that a timm block passes to `layer` is set."""
    if any(mask is not None and mask is not False for mask in masks.values()):
        raise ValueError(f"{type(layer).__name__} takes no masks, got {sorted(masks)}")


class GlobalAttention(timm.layers.Attention):
    """timm's multi-head self-attention with its options ``num_heads`` and ``qkv_bias``, by `kernels.attention`."""

    def forward(self, x: Tensor, size: Any = None, **masks: Any) -> Tensor:  # type: ignore[override]
        """(B, L, C) to (B, L, C). The `size` of the map that some blocks pass on is not needed, masks must be unset."""
        refuse_masks(self, masks)
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        return self.proj_drop(self.proj(attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2)))


# Layers whose queries, keys and values are linear in the tokens: of ViT and DeiT, PVTv2, and both of Twins-SVT.
PLAIN_ATTENTION: tuple[type[nn.Module], ...] = (
    GlobalAttention,
    timm.layers.Attention,
    pvt_v2.Attention,
    twins.LocallyGroupedAttn,
    twins.GlobalSubSampleAttn,
)


def is_plain_attention(module: nn.Module) -> bool:
    """Whether `split_projections` can read the layer; subclasses may compute something else and do not count."""
    if type(module) not in PLAIN_ATTENTION:
        return False
    if isinstance(module, timm.layers.Attention):
        more = (module.q_norm, module.k_norm, getattr(module, "norm", None), getattr(module, "gate", None))
        plain = all(part is None or isinstance(part, nn.Identity) for part in more)
        return plain and module.qkv.out_features == 3 * module.qkv.in_features
    return True


def split_projections(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weights (3, C, C) and biases (3, C) or None of the queries, keys and values of a softmax attention.

    Raises ValueError unless `is_plain_attention`.
    """
    if not is_plain_attention(module):
        names = ", ".join(sorted({cls.__name__ for cls in PLAIN_ATTENTION}))
        raise ValueError(f"{type(module).__name__}: expected plain self-attention ({names})")
    layers: list[Any] = [module.qkv] if hasattr(module, "qkv") else [module.q, module.kv]
    dim = layers[0].in_features
    weight = torch.cat([layer.weight for layer in layers]).detach().view(3, dim, dim)
    if layers[0].bias is None:
        return weight, None
    return weight, torch.cat([layer.bias for layer in layers]).detach().view(3, dim)


def global_attention(module: nn.Module) -> GlobalAttention:
    """Attention of all tokens to all with the projections of a layer that attends in windows or to a smaller map.

    What reduced the map is dropped. Raises ValueError as `split_projections` does.
    """
    weight, bias = split_projections(module)
    heads: Any = module.num_heads
    drop: Any = module.proj_drop
    dim = weight.shape[1]
    plain = GlobalAttention(dim, heads, qkv_bias=bias is not None, proj_drop=drop.p).to(weight)
    with torch.no_grad():
        plain.qkv.weight.copy_(weight.flatten(0, 1))
        if bias is not None:
            plain.qkv.bias.copy_(bias.flatten())
    plain.proj = module.proj  # type: ignore[assignment]
    return plain.train(module.training)
