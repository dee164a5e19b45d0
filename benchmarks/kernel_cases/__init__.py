"""The shapes of real models that the kernel benchmark measures; how each is computed stands in the modules beside."""

from collections.abc import Sequence
from typing import Any

from benchmarks.kernel_cases.attention import AttentionCase, HashAttentionCase
from benchmarks.kernel_cases.base import Case
from benchmarks.kernel_cases.others import BoundaryCase, DeformableCase, QuantizeCase
from benchmarks.kernel_cases.windows import HiLoCase, WindowAttentionCase

LITV2_224, LITV2_1024 = "LITv2-S 224 px", "LITv2-S 1024 px"


def attention_cases() -> list[AttentionCase]:
    """Global attention of LITv2-S, LIT-S, FASeg and STPT (256 frames of 96 px)."""
    litv2: dict[str, Any] = {"heads": 10, "dim": 32}
    cases = [
        AttentionCase(name=f"{LITV2_224}, Lo-Fi of stage 3", batch=64, queries=14**2, keys=7**2, **litv2),
        AttentionCase(name=f"{LITV2_1024}, Lo-Fi of stage 3", batch=4, queries=64**2, keys=32**2, large=True, **litv2),
        AttentionCase(name=f"{LITV2_224}, stage 4", batch=64, heads=24, queries=7**2, keys=7**2, dim=32),
        AttentionCase(name=f"{LITV2_1024}, stage 4", batch=4, heads=24, queries=32**2, keys=32**2, dim=32, large=True),
        AttentionCase(name="LIT-S 224 px, stage 3", batch=64, heads=12, queries=14**2, keys=14**2, dim=32, bias=True),
        AttentionCase(name="LIT-S 224 px, stage 4", batch=64, heads=24, queries=7**2, keys=7**2, dim=32, bias=True),
        AttentionCase(name="STPT, stage 3", batch=4, heads=4, queries=64 * 6**2, keys=64 * 3**2, dim=96),
        AttentionCase(name="STPT, stage 4", batch=4, heads=8, queries=32 * 3**2, keys=32 * 3**2, dim=96),
    ]
    for side, batch in ((512, 16), (1024, 4)):
        for stride in (32, 16, 8):
            name = f"FASeg {side} px, cross-attention to 1/{stride}"
            keys = (side // stride) ** 2
            cases.append(
                AttentionCase(
                    name=name, batch=batch, heads=8, queries=100, keys=keys, dim=32, mask=True, large=side == 1024
                )
            )
    return cases


def window_attention_cases() -> list[WindowAttentionCase]:
    """Hi-Fi of LITv2-S, Swin-T and the local stages of STPT."""
    hi_fi: dict[str, Any] = {"heads": 2, "dim": 32, "window": (2, 2)}
    swin: dict[str, Any] = {"heads": 3, "dim": 32, "grid": (56, 56), "window": (7, 7), "bias": True}
    local: dict[str, Any] = {"dim": 96, "window": (8, 6, 6), "kv_window": (4, 3, 3)}
    return [
        WindowAttentionCase(name=f"{LITV2_224}, Hi-Fi", batch=64, grid=(14, 14), **hi_fi),
        WindowAttentionCase(name=f"{LITV2_1024}, Hi-Fi", batch=4, grid=(64, 64), large=True, **hi_fi),
        WindowAttentionCase(name="Swin-T 224 px, stage 1", batch=32, **swin),
        WindowAttentionCase(name="Swin-T 224 px, stage 1, shifted", batch=32, shift=(3, 3), **swin),
        WindowAttentionCase(name="Swin-T 224 px, stage 3", batch=32, **{**swin, "heads": 12, "grid": (14, 14)}),
        WindowAttentionCase(name="STPT, stage 1", batch=2, heads=1, grid=(128, 24, 24), **local),
        WindowAttentionCase(name="STPT, stage 2", batch=2, heads=2, grid=(128, 12, 12), **local),
    ]


def hilo_cases() -> list[HiLoCase]:
    """Stage 3 of LITv2-S."""
    heads: dict[str, Any] = {"hi_heads": 2, "lo_heads": 10, "dim": 32, "window": 2}
    return [
        HiLoCase(name=f"{LITV2_224}", batch=64, grid=(14, 14), **heads),
        HiLoCase(name=f"{LITV2_1024}", batch=4, grid=(64, 64), large=True, **heads),
    ]


def hash_attention_cases() -> list[HashAttentionCase]:
    """PVTv2-B1 to B4 with EcoFormer attention."""
    stages = [("224 px, stage 1", 32, 1, 56**2), ("224 px, stage 2", 32, 2, 28**2), ("512 px, stage 1", 8, 1, 128**2)]
    return [
        HashAttentionCase(
            name=f"PVTv2-EcoFormer {stage}, {tokens} tokens",
            batch=batch, heads=heads, tokens=tokens, dim=64, bits=16, large=tokens > 4096,
        )
        for stage, batch, heads, tokens in stages
    ]  # fmt: skip


def deformable_cases() -> list[DeformableCase]:
    """The pixel decoder of FASeg: 1/32, 1/16 and 1/8 of the image."""
    return [
        DeformableCase(
            name=f"FASeg {side} px", batch=batch, heads=8, dim=32, points=4, large=side == 1024,
            maps=tuple((side // stride, side // stride) for stride in (32, 16, 8)),
        )
        for side, batch in ((512, 8), (1024, 2))
    ]  # fmt: skip


def boundary_cases() -> list[BoundaryCase]:
    """AFSD's head: the frame feature of 256 and 768 frames and the finest level of its pyramid."""
    return [
        BoundaryCase(name="AFSD 256 frames, frame feature", batch=8, channels=512, length=256, proposals=126),
        BoundaryCase(name="AFSD 256 frames, level 1", batch=8, channels=1024, length=64, proposals=64),
        BoundaryCase(name="AFSD 768 frames, frame feature", batch=8, channels=512, length=768, proposals=189),
    ]


def quantize_cases() -> list[QuantizeCase]:
    """Mesa in DeiT-S at 224 px: hidden maps of the MLP, attention weights and inputs of the layer norms."""
    hidden: dict[str, Any] = {"shape": (197, 1536), "groups": 6, "batch": 128}
    steps: dict[str, dict[str, Any]] = {
        "group_range": hidden,
        "quantize": hidden,
        "dequantize": hidden,
        "gelu backward": hidden,
        "softmax backward": {**hidden, "shape": (6, 197, 197)},
        "layer norm backward": {**hidden, "shape": (197, 384)},
    }
    return [QuantizeCase(name=f"Mesa DeiT-S, {step}", step=step, **sizes) for step, sizes in steps.items()]


OPS: dict[str, Sequence[Case]] = {
    "attention": attention_cases(),
    "window_attention": window_attention_cases(),
    "hilo": hilo_cases(),
    "hash_attention": hash_attention_cases(),
    "ms_deform_attn": deformable_cases(),
    "boundary_max_pool": boundary_cases(),
    "quantize": quantize_cases(),
}
