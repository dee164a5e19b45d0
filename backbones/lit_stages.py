"""What LIT and LITv2 share: stages of pre-norm blocks with token merging between them, a classifier, a feature pyramid.

Maps are channel-last, (B, H, W, C), from the patch embedding to the end: windows, depth-wise convolutions and token
merging then need no copies. State-dict keys are those of the official repositories.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath
from timm.models import checkpoint
from torch import Tensor, nn

from backbones.deformable_merging import DeformableTokenMerging

# (stage, dim) -> layer on maps (B, H, W, C)
AttentionFactory = Callable[[int, int], nn.Module]
MlpFactory = Callable[[int], nn.Module]
TOKENS_IN_CACHE = 1600
Flavour = Literal["segmentation", "detection"]


class PatchEmbedding(nn.Module):
    """Project patches to tokens: (B, C_in, H, W) to a channel-last map (B, H // p, W // p, C)."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, norm: bool) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        """Embed an image (B, C_in, H, W)."""
        image = image.contiguous(memory_format=torch.channels_last)  # then so is the projection, and needs no copy
        return self.norm(self.proj(image).permute(0, 2, 3, 1))


class Block(nn.Module):
    """Pre-norm attention (absent in early stages) and MLP on maps (B, H, W, C), each with stochastic depth."""

    def __init__(self, dim: int, attention: nn.Module | None, mlp: nn.Module, drop_path: float) -> None:
        super().__init__()
        if attention is not None:
            self.norm1 = nn.LayerNorm(dim)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Transform a map (B, H, W, C)."""
        if self.attn is not None:
            x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """Blocks of one resolution and the token merging behind them."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample: nn.Module | None = downsample
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Apply the blocks to a map (B, H, W, C); the token merging is left to the caller."""
        if x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # A few images at a time keep the hidden maps of the MLPs in the processor's cache.
            return torch.cat([self._blocks(part) for part in x.split(_images_in_cache(x))])
        return self._blocks(x)

    def _blocks(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x)
            else:
                x = block(x)
        return x


def _images_in_cache(x: Tensor) -> int:
    """How many maps of a batch (B, H, W, C) to process together on a CPU: enough tokens for fast matrix products."""
    batch, height, width, _ = x.shape
    parts = max(1, round(batch * height * width / TOKENS_IN_CACHE))
    return max(1, -(-batch // parts))


class LITStages(nn.Module):
    """Patch embedding and stages, of dims C, 2C, 4C, 8C at strides 4, 8, 16, 32.

    Args:
        attention: Makes the attention of a block from (stage, dim).
        mlp: Makes the MLP of a block from its dim.
        in_chans: Channels of the image.
        patch_size: Side of a patch.
        embed_dim: C.
        depths: Blocks per stage.
        has_msa: Whether the blocks of each stage have attention.
        patch_norm: Layer norm behind the patch embedding.
        drop_path_rate: Stochastic depth of the last block; it rises linearly from 0 at the first.
    """

    def __init__(
        self,
        attention: AttentionFactory,
        mlp: MlpFactory,
        in_chans: int = 3,
        patch_size: int = 4,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        has_msa: Sequence[bool | int] = (False, False, True, True),
        patch_norm: bool = True,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if len(has_msa) < len(depths):
            raise ValueError(f"has_msa={tuple(has_msa)}: expected one value for each of the {len(depths)} stages")
        self.patch_size = patch_size
        self.dims = [embed_dim * 2**stage for stage in range(len(depths))]
        self.strides = [patch_size * 2**stage for stage in range(len(depths))]
        self.patch_embed = PatchEmbedding(in_chans, embed_dim, patch_size, patch_norm)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.layers = nn.ModuleList()
        for stage, (depth, dim) in enumerate(zip(depths, self.dims, strict=True)):
            blocks = [
                Block(dim, attention(stage, dim) if has_msa[stage] else None, mlp(dim), next(rates))
                for _ in range(depth)
            ]
            last = stage == len(depths) - 1
            self.layers.append(Stage(blocks, None if last else DeformableTokenMerging(dim, 2 * dim)))

    @property
    def stages(self) -> list[Stage]:
        """The stages, typed."""
        return [stage for stage in self.layers if isinstance(stage, Stage)]

    def forward_stages(self, image: Tensor) -> list[Tensor]:
        """Maps (B, H / s, W / s, C_s) of all stages from an image (B, C_in, H, W), before their token merging."""
        x = self.patch_embed(image)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
            if stage.downsample is not None:
                x = stage.downsample(x)
        return maps

    def keep_stages(self, count: int) -> None:
        """Drop the stages behind the first `count`, whose parameters would get no gradient."""
        del self.layers[count:]
        self.stages[-1].downsample = None

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of the relative position tables."""
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that number the layers for layer-wise learning rates (timm)."""
        if coarse:
            return {"stem": r"^patch_embed", "blocks": r"^layers\.(\d+)"}
        # token merging comes behind the blocks of its stage
        blocks = [(r"^layers\.(\d+)\.downsample", (9999,)), (r"^layers\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^patch_embed", "blocks": [*blocks, (r"^norm", (99999,))]}


class LITClassifier(LITStages):
    """Stages, final norm, mean over tokens and a linear classifier.

    Args:
        attention: See `LITStages`; so are all other arguments not listed here.
        mlp: See `LITStages`.
        num_classes: Classes; 0 leaves the classifier out.
        global_pool: ``avg``, or an empty string for the normalised map itself.
        drop_rate: Dropout before the classifier.
        **stages: The other arguments of `LITStages`.
    """

    def __init__(
        self,
        attention: AttentionFactory,
        mlp: MlpFactory,
        num_classes: int = 1000,
        global_pool: Literal["avg", ""] = "avg",
        drop_rate: float = 0.0,
        **stages: Any,
    ) -> None:
        super().__init__(attention, mlp, **stages)
        self.num_classes, self.drop_rate = num_classes, drop_rate
        self.num_features = self.head_hidden_size = self.dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": stride, "module": f"layers.{stage}"}
            for stage, (dim, stride) in enumerate(zip(self.dims, self.strides, strict=True))
        ]
        self.norm: nn.Module = nn.LayerNorm(self.num_features)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.global_pool = _checked_pool(global_pool)
        initialise(self)

    def forward_features(self, image: Tensor) -> Tensor:
        """Normalised map (B, H / 32, W / 32, C) of an image (B, 3, H, W)."""
        return self.norm(self.forward_stages(image)[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Class scores (B, K) of a normalised map; with `pre_logits` what enters the classifier, (B, C)."""
        if self.global_pool == "avg":
            x = x.mean(dim=(1, 2))
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def forward(self, image: Tensor) -> Tensor:
        """Class scores (B, K) of an image (B, 3, H, W)."""
        return self.forward_head(self.forward_features(image))

    def forward_intermediates(
        self,
        image: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Maps of the stages `indices` (timm): a list, or with the final map (the final map, a list).

        `norm` normalises the last stage's map, `output_fmt` is ``NCHW`` or ``NHWC``; the final map is channel-last.
        `stop_early` is accepted for timm's sake: a network whose later stages are not wanted has them pruned.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt={output_fmt!r}: expected 'NCHW' or 'NHWC'")
        chosen = feature_indices(len(self.layers), indices)
        maps = self.forward_stages(image)
        final = self.norm(maps[-1]) if len(maps) == len(self.dims) else maps[-1]  # the norm is the last stage's
        if norm:
            maps[-1] = final
        features = [maps[i].permute(0, 3, 1, 2) if output_fmt == "NCHW" else maps[i] for i in chosen]
        if intermediates_only:
            return features
        return final, features

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages behind the last of `indices`, and norm and classifier where asked; return the indices."""
        chosen = feature_indices(len(self.layers), indices)
        self.keep_stages(max(chosen) + 1)
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return chosen

    def get_classifier(self) -> nn.Module:
        """The linear classifier."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Literal["avg", ""] | None = None) -> None:
        """Replace the classifier by a new one of `num_classes` (0: none)."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = _checked_pool(global_pool)
        old = next(self.parameters())
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        initialise(self.head.to(old.device, old.dtype))


class LITFeatures(LITStages):
    """Feature pyramid for dense prediction: maps of strides 4, 8, 16, 32 of an image of any size.

    The image is zero-padded at the right and bottom to whole patches, token merging drops odd rows and columns. The
    returned maps are layer-normed, those that enter the next stage are not; for detection stage 1 has no such norm.
    ``channels`` and ``strides`` describe the returned maps.

    Args:
        attention: See `LITStages`.
        mlp: See `LITStages`.
        flavour: ``segmentation`` or ``detection``.
        out_indices: Stages to return.
        **stages: The other arguments of `LITStages`.
    """

    def __init__(
        self,
        attention: AttentionFactory,
        mlp: MlpFactory,
        flavour: Flavour = "segmentation",
        out_indices: Sequence[int] | None = None,
        **stages: Any,
    ) -> None:
        super().__init__(attention, mlp, **stages)
        if flavour not in ("segmentation", "detection"):
            raise ValueError(f"flavour={flavour!r}: expected 'segmentation' or 'detection'")
        self.out_indices = feature_indices(len(self.layers), out_indices)
        self.keep_stages(max(self.out_indices) + 1)
        self.channels = [self.dims[i] for i in self.out_indices]
        self.strides = [self.strides[i] for i in self.out_indices]
        for i in self.out_indices:
            if i > 0 or flavour == "segmentation":
                self.add_module(f"norm{i}", nn.LayerNorm(self.dims[i]))
        initialise(self)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Map an image (B, 3, H, W) to maps (B, C_i, H / s_i, W / s_i)."""
        height, width = image.shape[-2:]
        image = F.pad(image, (0, -width % self.patch_size, 0, -height % self.patch_size))
        maps = self.forward_stages(image)
        features = []
        for i in self.out_indices:
            norm = getattr(self, f"norm{i}", None)
            features.append((maps[i] if norm is None else norm(maps[i])).permute(0, 3, 1, 2))
        return features


def initialise(network: nn.Module) -> None:
    """The papers' initialisation: normal(0, 0.02) for linear layers, zero biases; other layers keep their own."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def feature_indices(count: int, indices: int | Sequence[int] | None) -> list[int]:
    """Stage numbers in rising order: all for None, the last n for an int; negative ones count from the end."""
    if indices is None:
        return list(range(count))
    if isinstance(indices, int):
        indices = range(count - indices, count)
    chosen = [i + count if i < 0 else i for i in indices]
    if not chosen or not all(0 <= i < count for i in chosen):
        raise ValueError(f"indices {list(indices)}: expected stages 0 to {count - 1}")
    return chosen


def imagenet_cfg(size: int = 224, crop_pct: float = 0.875, first_conv: str = "patch_embed.proj") -> dict[str, Any]:
    """timm's description of a network for ImageNet at `size` pixels; released files are local, so there is no URL."""
    return {
        "num_classes": 1000,
        "input_size": (3, size, size),
        "crop_pct": crop_pct,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": "head",
    }


def _checked_pool(global_pool: str) -> str:
    if global_pool not in ("avg", ""):
        raise ValueError(f"global_pool={global_pool!r}: expected 'avg' or ''")
    return global_pool
