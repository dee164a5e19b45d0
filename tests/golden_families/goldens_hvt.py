"""HVT: small networks with their gradients, and the keys of the published ones."""

import timm
import torch
from backbone_cases import check_keys, is_expected, run_model, tolerance

from backbones.hvt import HVT
from backbones.macs import count_macs
from backbones.token_pooling import pooled_blocks

__all__ = ["is_expected", "run_case", "tolerance"]

OPTIONS = (
    "img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias",
    "pool_block_width", "pool_kernel_size", "drop_path_rate",
)  # fmt: skip


def run_case(meta, tensors, path):
    return run_network(meta, tensors) if tensors else run_keys(meta)


def run_network(meta, tensors):
    constructor = dict(meta["constructor"])
    assert constructor["layer_norm_eps"] == 1e-6
    if not meta["pooled_blocks"]:
        constructor["pool_block_width"] = 0
    model = HVT(**{name: constructor[name] for name in OPTIONS if name in constructor})
    assert [i for i, block in enumerate(model.blocks) if hasattr(block, "pos_embed")] == meta["pooled_blocks"]
    assert sum(p.numel() for p in model.parameters()) == meta["n_params"]
    capture = {f"block{i}": block for i, block in enumerate(model.blocks)} | {"tokens_norm": model.norm}
    return run_model(model, tensors, capture)


def run_keys(meta):
    """The registered network of the variant, e.g. hvt_s_2 for hvt-s-2: keys, lengths, weight decay, multiply-adds."""
    name = meta["variant"].removesuffix(".derived").replace("-", "_")
    with torch.device("meta"):
        model = timm.create_model(name)
        macs = count_macs(model, torch.zeros(1, 3, 224, 224))
    if "pos_embed_lengths" in meta:
        names = [f"blocks.{i}.pos_embed" for i, block in enumerate(model.blocks) if hasattr(block, "pos_embed")]
        lengths = dict(zip(names, (length for _, length in pooled_blocks(model)), strict=True))
        assert {"pos_embed": model.pos_embed.shape[1], **lengths} == meta["pos_embed_lengths"]
        assert sorted(model.no_weight_decay()) == sorted(meta["no_weight_decay"])
    assert abs(macs / 1e9 - meta.get("macs_G", macs / 1e9)) < 1e-4
    return check_keys(model, meta)
