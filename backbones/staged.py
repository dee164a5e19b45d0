"""Networks made of stages, as LIT-Ti, LIT and LITv2 are: a classifier and a feature pyramid over the stages of each.

Maps are channel-last, (B, H, W, C), between the stages. A network is made by inheritance:
``class LIT(StagedClassifier, <stages>)``, ``class LITDense(StagedFeatures, <stages>)``.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

Flavour = Literal["segmentation", "detection"]


class Stages(nn.Module):
    """What a network needs of its stages, numbered from 0.

    `dims`, `strides` and `stage_names` (of the modules) are those of all stages; the first `num_stages` are kept.
    """

    dims: list[int]
    strides: list[int]
    stage_names: list[str]
    num_stages: int

    def forward_stages(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """Maps (B, H / s, W / s, C_s) of the kept stages of an image (B, C_in, H, W), and what a classifier reads.

        That is the last map, or its tokens (B, L, C) behind a class token.
        """
        raise NotImplementedError

    def keep_stages(self, count: int) -> None:
        """Drop the stages behind the first `count`, whose parameters would get no gradient."""
        raise NotImplementedError


class LayeredStages(Stages):
    """Stages named as in Swin: ``patch_embed``, ``layers`` with their ``blocks``, and ``downsample`` but in the last.

    A module of `layers` transforms a map (B, H, W, C), leaves `downsample` to the network and recomputes its blocks
    in the backward pass where ``grad_checkpointing`` is true.
    """

    patch_embed: nn.Module
    layers: nn.ModuleList

    def embed(self, image: Tensor) -> Tensor:
        """The map (B, H / p, W / p, C) that enters the first stage, of an image (B, C_in, H, W)."""
        return self.patch_embed(image)

    def forward_stages(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """Maps (B, H / s, W / s, C_s) of the stages, before they are merged, for an image (B, C_in, H, W)."""
        x, maps = self.embed(image), []
        layers: Any = self.layers
        for stage in layers:
            x = stage(x)
            maps.append(x)
            if stage.downsample is not None:
                x = stage.downsample(x)
        return maps, maps[-1]

    def keep_stages(self, count: int) -> None:
        """Drop the stages behind the first `count`, whose parameters would get no gradient."""
        del self.layers[count:]
        last: Any = self.layers[-1]
        last.downsample = None
        self.num_stages = count

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass."""
        layers: Any = self.layers
        for stage in layers:
            stage.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of the relative position tables."""
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that number the layers for layer-wise learning rates (timm)."""
        if coarse:
            return {"stem": r"^patch_embed", "blocks": r"^layers\.(\d+)"}
        # tokens are merged behind the blocks of their stage
        blocks = [(r"^layers\.(\d+)\.downsample", (9999,)), (r"^layers\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^patch_embed", "blocks": [*blocks, (r"^norm", (99999,))]}


class StagedClassifier(Stages):
    """Stages, final norm, pooling and a linear classifier, with timm's methods.

    Args:
        num_classes: Classes; 0 leaves the classifier out.
        global_pool: None or `pooling`, or an empty string for all normalised tokens.
        drop_rate: Dropout before the classifier.
        **stages: The arguments of the stages.
    """

    pooling: ClassVar[str] = "avg"
    norm_eps: ClassVar[float] = 1e-5

    def __init__(
        self, *, num_classes: int = 1000, global_pool: str | None = None, drop_rate: float = 0.0, **stages: Any
    ) -> None:
        super().__init__(**stages)
        self.drop_rate = drop_rate
        self.num_features = self.head_hidden_size = self.dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": stride, "module": name}
            for dim, stride, name in zip(self.dims, self.strides, self.stage_names, strict=True)
        ]
        self.norm: nn.Module = nn.LayerNorm(self.num_features, eps=self.norm_eps)
        self._set_classifier(num_classes, self.pooling if global_pool is None else global_pool)
        initialise(self)

    def forward_features(self, image: Tensor) -> Tensor:
        """Normalised output of the last stage for an image (B, 3, H, W): a map (B, H / 32, W / 32, C) or tokens."""
        return self.norm(self.forward_stages(image)[1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Class scores (B, K) of `forward_features`; with `pre_logits` what enters the classifier, (B, C)."""
        if self.global_pool:
            x = self.pool(x)
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def pool(self, x: Tensor) -> Tensor:
        """One vector (B, C) for each map (B, H, W, C): the mean of its tokens."""
        return x.mean(dim=(1, 2))

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
        """Maps of the stages `indices` (timm): a list, or with the last stage's output (that, a list).

        `norm` normalises the last stage's map, `output_fmt` is ``NCHW`` or ``NHWC``; maps are without class token.
        `stop_early` is accepted for timm's sake: a network whose later stages are not wanted has them pruned.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt={output_fmt!r}: expected 'NCHW' or 'NHWC'")
        chosen = feature_indices(self.num_stages, indices)
        maps, final = self.forward_stages(image)
        if self.num_stages == len(self.dims):  # the norm is the last stage's
            final = self.norm(final)
            if norm:
                height, width = maps[-1].shape[1:3]
                maps[-1] = final.flatten(1, -2)[:, -height * width :].unflatten(1, (height, width))
        features = [maps[i].permute(0, 3, 1, 2) if output_fmt == "NCHW" else maps[i] for i in chosen]
        return features if intermediates_only else (final, features)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages behind the last of `indices`, and norm and classifier where asked; return the indices."""
        chosen = feature_indices(self.num_stages, indices)
        self.keep_stages(max(chosen) + 1)
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return chosen

    def get_classifier(self) -> nn.Module:
        """The linear classifier."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one of `num_classes` (0: none)."""
        self._set_classifier(num_classes, self.global_pool if global_pool is None else global_pool)
        old = next(self.parameters())
        initialise(self.head.to(old.device, old.dtype))

    def _set_classifier(self, num_classes: int, global_pool: str) -> None:
        if global_pool not in (self.pooling, ""):
            raise ValueError(f"global_pool={global_pool!r}: expected {self.pooling!r} or ''")
        self.num_classes, self.global_pool = num_classes, global_pool
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()


class StagedFeatures(Stages):
    """Feature pyramid for dense prediction: the maps of stages as (B, C, H, W).

    ``channels`` and ``strides`` describe the returned maps; a module ``norm{i}`` normalises that of stage i.

    Args:
        flavour: ``segmentation`` or ``detection``, for whose official code the network is.
        out_indices: Stages to return.
        **stages: The arguments of the stages.
    """

    def __init__(
        self, *, flavour: Flavour = "segmentation", out_indices: Sequence[int] | None = None, **stages: Any
    ) -> None:
        super().__init__(**stages)
        if flavour not in ("segmentation", "detection"):
            raise ValueError(f"flavour={flavour!r}: expected 'segmentation' or 'detection'")
        self.out_indices = feature_indices(self.num_stages, out_indices)
        self.keep_stages(max(self.out_indices) + 1)
        self.channels = [self.dims[i] for i in self.out_indices]
        self.strides = [self.strides[i] for i in self.out_indices]
        initialise(self)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Map an image (B, 3, H, W) to maps (B, C_i, H / s_i, W / s_i)."""
        maps, _ = self.forward_stages(image)
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
    """Stage numbers: all for None, the last n for an int; negative ones count from the end.

    Raises ValueError for a stage that is not among the `count` there are.
    """
    if indices is None:
        return list(range(count))
    if isinstance(indices, int):
        indices = range(count - indices, count)
    chosen = [i + count if i < 0 else i for i in indices]
    if not chosen or not all(0 <= i < count for i in chosen):
        raise ValueError(f"indices {list(indices)}: expected stages 0 to {count - 1}")
    return chosen
