"""LIT-Ti: "Less is More: Pay Less Attention in Vision Transformers" (AAAI 2022, arXiv 2105.14217).

The smallest LIT has an architecture of its own, close to PVT's: learned absolute position embeddings in every stage and
a class token in the last one. The others are in `backbones.lit`. State-dict keys are those of the official repository.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import Mlp, to_2tuple, trunc_normal_
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from backbones.attention import GlobalAttention
from backbones.deformable_merging import DeformableTokenMerging
from backbones.lit_stages import Block, PatchEmbedding
from backbones.registration import build, imagenet_cfg
from backbones.staged import StagedClassifier, StagedFeatures, Stages

NUM_STAGES = 4


class LITTiStages(Stages):
    """Stages 1 to 4 at strides 4, 8, 16, 32: embedding, position embedding, blocks; attention in stages 3 and 4.

    Position embeddings belong to the grids of `img_size` and are resized (bilinear) to others. The last one has an
    entry for the class token in front. Modules are numbered from 1: ``patch_embed1``, ``pos_embed1``, ``block1``.

    Args:
        img_size: Side, or height and width, of the image whose grids the position embeddings have.
        patch_size: Side of a patch.
        in_chans: Channels of the image.
        embed_dims: Channels per stage.
        depths: Blocks per stage.
        num_heads: Heads per stage; those of stages 1 and 2 are unused.
        mlp_ratios: Hidden width of the MLPs over their dim, per stage.
        qkv_bias: Biases of the query, key and value projections.
        drop_path_rate: Stochastic depth of the last block; it rises linearly from 0 at the first.
    """

    class_token: ClassVar[bool] = False
    cls_token: nn.Parameter | None
    # Official dense code leaves a position embedding of stage 1 as it is when only the number of tokens agrees.
    resize_equal_counts = True

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 4, 6, 3),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        per_stage = {"embed_dims": embed_dims, "depths": depths, "num_heads": num_heads, "mlp_ratios": mlp_ratios}
        for name, values in per_stage.items():
            if len(values) != NUM_STAGES:
                raise ValueError(f"{name}={tuple(values)}: expected {NUM_STAGES} values, one per stage")
        self.dims = list(embed_dims)
        self.strides = [patch_size * 2**i for i in range(NUM_STAGES)]
        self.stage_names = [f"block{stage}" for stage in range(1, NUM_STAGES + 1)]
        self.num_stages = NUM_STAGES
        self.register_parameter("cls_token", None)
        rows, columns = (side // patch_size for side in to_2tuple(img_size))
        self.grids = [(max(rows >> i, 1), max(columns >> i, 1)) for i in range(NUM_STAGES)]
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        for stage, dim in enumerate(self.dims, 1):
            embedding = (
                PatchEmbedding(in_chans, dim, patch_size, norm=True)
                if stage == 1
                else DeformableTokenMerging(self.dims[stage - 2], dim)
            )
            blocks = nn.ModuleList()
            for _ in range(depths[stage - 1]):
                attention = GlobalAttention(dim, num_heads[stage - 1], qkv_bias=qkv_bias) if stage >= 3 else None
                blocks.append(Block(dim, attention, Mlp(dim, int(mlp_ratios[stage - 1] * dim)), next(rates)))
            for module in blocks.modules():
                if isinstance(module, nn.LayerNorm):
                    module.eps = 1e-6  # the patch embedding keeps 1e-5
            self.add_module(f"patch_embed{stage}", embedding)
            height, width = self.grids[stage - 1]
            positions = torch.empty(1, height * width + (stage == NUM_STAGES), dim)
            self.register_parameter(f"pos_embed{stage}", nn.Parameter(trunc_normal_(positions, std=0.02)))
            self.add_module(f"block{stage}", blocks)
        if self.class_token:
            self.cls_token = nn.Parameter(trunc_normal_(torch.empty(1, 1, self.dims[-1]), std=0.02))
        self.grad_checkpointing = False

    def forward_stages(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """Maps (B, H / s, W / s, C_s) of the stages for an image (B, C_in, H, W), and the last stage's tokens.

        The tokens (B, L, C) are those of the last map, behind the class token where there is one.
        """
        x, maps = image, []
        for stage in range(1, self.num_stages + 1):
            x = self.get_submodule(f"patch_embed{stage}")(x)
            batch, height, width, _ = x.shape
            x = x.flatten(1, 2)
            positions = self.positions(stage, height, width)
            if stage == NUM_STAGES and self.cls_token is not None:
                x = torch.cat([self.cls_token.expand(batch, -1, -1), x], dim=1)
            tokens = self._blocks(stage, x + positions[:, -x.shape[1] :])
            x = tokens[:, -height * width :].unflatten(1, (height, width))
            maps.append(x)
        return maps, tokens

    def positions(self, stage: int, height: int, width: int) -> Tensor:
        """Position embedding of a stage for a grid, (1, L, C); that of the last stage has the class token's first."""
        embedding: Tensor = getattr(self, f"pos_embed{stage}")  # also where torch.func puts a tensor in its place
        rows, columns = self.grids[stage - 1]
        count = rows * columns
        if (height, width) == (rows, columns):
            return embedding
        if stage == 1 and not self.resize_equal_counts and height * width == count:
            return embedding
        prefix, patches = embedding[:, :-count], embedding[:, -count:]
        patches = patches.unflatten(1, (rows, columns)).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, size=(height, width), mode="bilinear", align_corners=False)
        return torch.cat([prefix, patches.flatten(2).transpose(1, 2)], dim=1)

    def _blocks(self, stage: int, tokens: Tensor) -> Tensor:
        for block in self.get_submodule(f"block{stage}").children():
            if self.grad_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens)
            else:
                tokens = block(tokens)
        return tokens

    def keep_stages(self, count: int) -> None:
        """Drop the stages behind the first `count`, and the class token with the last one."""
        for stage in range(count + 1, self.num_stages + 1):
            for name in ("patch_embed", "pos_embed", "block"):
                delattr(self, f"{name}{stage}")
        self.num_stages = count
        if count < NUM_STAGES:
            self.cls_token = None

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """The class token; the official recipe decays position embeddings."""
        return {"cls_token"} if self.cls_token is not None else set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that number the layers for layer-wise learning rates (timm)."""
        stem = r"^(?:patch_embed1|pos_embed1)"
        blocks: list[tuple[str, tuple[int, ...] | None]]
        if coarse:
            blocks = [(r"^(?:patch_embed|pos_embed|block)(\d)", None), (r"^cls_token", (4,)), (r"^norm", (99999,))]
            return {"stem": stem, "blocks": blocks}
        blocks = [
            (r"^block(\d)\.(\d+)", None),
            (r"^(?:patch_embed|pos_embed)(\d)", (0,)),
            (r"^cls_token", (4, 0)),
            (r"^norm", (99999,)),
        ]
        return {"stem": stem, "blocks": blocks}


class LITTi(StagedClassifier, LITTiStages):
    """LIT-Ti classifier for images (B, 3, H, W) of any size of at least 32; arguments are those of its two bases.

    The class token is classified; features are tokens (B, 1 + L, C), the class token first.
    """

    class_token = True
    pooling = "token"
    norm_eps = 1e-6

    def pool(self, x: Tensor) -> Tensor:
        """The class token (B, C) of tokens (B, 1 + L, C)."""
        return x[:, 0]


class LITTiDense(StagedFeatures, LITTiStages):
    """LIT-Ti feature pyramid: un-normalised maps of strides 4, 8, 16, 32, for images of any size of at least 32.

    Rows and columns that fill no patch are left out; both flavours are the same network.

    Args:
        official_positions: Do not resize the position embedding of stage 1 to a grid that has as many tokens in
            another shape (28 x 112 tokens at 224 pixels): the official code reads it row by row, which released weights
            saw on such images only.
        **features: The arguments of `StagedFeatures` and `LITTiStages`.
    """

    def __init__(self, *, official_positions: bool = False, **features: Any) -> None:
        super().__init__(**features)
        self.resize_equal_counts = not official_positions


DENSE_VARIANTS: dict[str, Callable[..., nn.Module]] = {"lit_ti": LITTiDense}

default_cfgs = generate_default_cfgs({"lit_ti": imagenet_cfg(first_conv="patch_embed1.proj")})


@register_model
def lit_ti(pretrained: bool = False, **kwargs: Any) -> LITTi:
    """LIT-Ti: 19 M parameters, 3.6 GMACs."""
    return build(LITTi, "lit_ti", pretrained, **kwargs)
