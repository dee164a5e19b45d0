"""EcoFormer (NeurIPS 2022, arXiv 2209.09004): attention by binary codes in place of softmax attention.

network = convert(timm.create_model("deit_tiny_patch16_224"))
fit(network, images)          # the hash functions, from the network's own attention on one batch
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from backbones.attention import PLAIN_ATTENTION, is_plain_attention
from backbones.ecoformer import EcoFormerAttention, full_precision, hashed_attention
from backbones.macs import evaluating
from efficiency.kernel_hashing import TOPK, fit_hash_functions

STAGE = r"(?:^|\.)(?:stages\.(\d+)\.blocks|blocks\.(\d+))\.\d+\.\w+$"  # of PVTv2 and Twins


def convert(
    network: nn.Module, num_bits: int = 16, num_anchors: int = 25, stages: Sequence[int] | None = None
) -> nn.Module:
    """Exchange the softmax attention of `network`, in place, for `EcoFormerAttention`; returns `network`.

    Works wherever timm's plain self-attention is a layer of its own: ViT and DeiT, PVTv2 (with or without spatial
    reduction), Twins-SVT and HVT, also inside a larger network. Query, value and output projections stay, those of the
    keys and spatial reductions are dropped. Of a pyramid `stages` (from 0) are exchanged, all but the last without
    them, as in the paper; of a network without stages every block is. Hash functions start at random; `fit` learns
    them. An optimizer made before does not know the new layers.

    Raises ValueError when there is nothing to exchange or a stage does not exist.
    """
    layers = {name: module for name, module in network.named_modules() if is_plain_attention(module)}
    if not layers:
        names = ", ".join(sorted({cls.__name__ for cls in PLAIN_ATTENTION}))
        raise ValueError(f"{type(network).__name__} has no plain self-attention to exchange; expected one of {names}")
    stage_of = {name: _stage(name) for name in layers}
    found = sorted({stage for stage in stage_of.values() if stage is not None})
    chosen = found[:-1] if stages is None else list(stages)
    if unknown := [stage for stage in chosen if stage not in found]:
        raise ValueError(f"stages={list(chosen)}: there is no attention in {unknown}, only in stages {found}")
    for name, layer in layers.items():
        if (stage_of[name] is None and stages is None) or stage_of[name] in chosen:
            network.set_submodule(name, hashed_attention(layer, num_bits, num_anchors))
    return network


def _stage(name: str) -> int | None:
    """The pyramid stage of a layer from its name; None in a network without stages."""
    match = re.search(STAGE, name)
    return int(match[1] or match[2]) if match else None


def hashed_layers(network: nn.Module) -> dict[str, EcoFormerAttention]:
    """The EcoFormer layers of `network` by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, EcoFormerAttention)}


def unfitted_layers(network: nn.Module) -> list[str]:
    """Names of the EcoFormer layers whose hash functions are still random."""
    return [name for name, layer in hashed_layers(network).items() if not layer.hashing.fitted]


def fit(network: nn.Module, images: Tensor, topk: int = TOPK) -> nn.Module:
    """Fit the hash functions of all EcoFormer layers to one pass, in evaluation mode, over `images` (B, 3, H, W).

    See `fit_at_next_pass`. Returns `network`.
    """
    handles = fit_at_next_pass(network, topk=topk)
    try:
        with evaluating(network), torch.no_grad():
            network(images)
    finally:
        for handle in handles:
            handle.remove()
    return network


def fit_at_next_pass(network: nn.Module, only_unfitted: bool = False, topk: int = TOPK) -> list[RemovableHandle]:
    """Let every EcoFormer layer fit its hash functions to what it is given next, and go on with the fitted ones.

    With `only_unfitted` those that were fitted before stay. Anchors are random tokens of the first sample, drawn from
    torch's generator. In a distributed training process 0 fits to its own part of the batch and broadcasts the result.
    It needs no gradients, and memory that is linear in the tokens of the batch: 159 MB beside the activations for 32
    images of 224 pixels in the first stage of PVTv2-B0 (the official code keeps matrices of 1.3 GB there), 64 MB of it
    for similarities. Returns the hooks that wait; each is gone after its layer's pass.

    A pass raises ValueError where a layer is given fewer tokens than it has anchors, or than `topk`.
    """
    handles = []
    for name, layer in hashed_layers(network).items():
        if only_unfitted and layer.hashing.fitted:
            continue
        hook = _FitOnce(name, topk)
        hook.handle = layer.register_forward_pre_hook(hook)
        handles.append(hook.handle)
    return handles


class _FitOnce:
    """A hook before the forward pass of one EcoFormer layer that fits its hash functions and removes itself."""

    handle: RemovableHandle

    def __init__(self, name: str, topk: int) -> None:
        self.name, self.topk = name, topk

    @torch.no_grad()
    def __call__(self, layer: EcoFormerAttention, arguments: tuple[Any, ...]) -> None:
        self.handle.remove()
        hashing, tokens = layer.hashing, arguments[0]
        anchor_index = torch.randperm(tokens.shape[1])[: hashing.A.shape[2]]
        distributed = dist.is_available() and dist.is_initialized()
        if not distributed or dist.get_rank() == 0:
            unit = layer.unit_queries(tokens)
            with full_precision(tokens):
                try:
                    fit_hash_functions(hashing, unit, anchor_index.to(tokens.device), self.topk)
                except ValueError as error:
                    raise ValueError(f"{self.name}: {error}") from None
        if distributed:
            for buffer in hashing.buffers():
                dist.broadcast(buffer, src=0)
