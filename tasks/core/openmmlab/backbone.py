"""Frugal's backbones, and timm's, for configurations of mmdet and mmseg."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mmengine.logging import print_log
from mmengine.model import BaseModule, PretrainedInit
from mmengine.registry import MODELS
from torch import Tensor

import backbones
from backbones.checkpoint import CheckpointError, first_names, read_state_dict


@MODELS.register_module()
class FrugalBackbone(BaseModule):
    """Any backbone of `backbones.create_features`: `dict(type="FrugalBackbone", name="litv2_s")` in a configuration.

    `name` is a network of `python -m backbones list`, ours or timm's. `out_indices` picks levels of its `feature_info`;
    without it there are the maps of strides 4, 8, 16 and 32. `norm="frozen"` makes every batch normalisation a fixed
    affine map. `flavour`, "segmentation" or "detection", says whose norms and position tables LIT and LITv2 have. Other
    arguments are those of the network, such as `drop_path_rate`. `channels`, which the `in_channels` of a neck repeats,
    and `strides` describe the maps.

    `init_cfg=dict(type="Pretrained", checkpoint=path)` loads weights of Frugal, timm, torchvision, detectron2 or a
    paper's authors by `backbones.load_checkpoint`, which runs nothing that is in the file; with `prefix` it loads what
    has this prefix in the checkpoint of a whole model of OpenMMLab. Raises ValueError for arguments and
    `CheckpointError` for files that cannot be used.
    """

    init_cfg: Any

    def __init__(
        self,
        name: str,
        out_indices: Sequence[int] | None = None,
        norm: Literal["batch", "frozen"] = "batch",
        flavour: Literal["segmentation", "detection"] = "segmentation",
        pretrained: bool = False,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(init_cfg)
        self.features = backbones.create_features(
            name, pretrained=pretrained, out_indices=out_indices, norm=norm, flavour=flavour, **kwargs
        )
        self.channels: list[int] = self.features.channels  # type: ignore[assignment]
        self.strides: list[int] = self.features.strides  # type: ignore[assignment]
        self.is_init = pretrained and init_cfg is None

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Map normalised images (B, 3, H, W) to maps (B, C_i, H / s_i, W / s_i)."""
        return tuple(self.features(image))

    def init_weights(self) -> None:
        """Initialise as `init_cfg` says; without it the network keeps its own initialisation."""
        whole = self.init_cfg
        configs = [whole] if isinstance(whole, dict) else list(whole or [])
        files = [config for config in configs if config["type"] in ("Pretrained", PretrainedInit)]
        # mmengine would read files with its own loader, which unpickles whatever it finds.
        self.init_cfg = [config for config in configs if config not in files]
        super().init_weights()
        self.init_cfg = whole
        for config in files:
            self._load(config)

    def _load(self, config: Mapping[str, Any]) -> None:
        path, prefix = config["checkpoint"], config.get("prefix")
        if prefix is None:
            print_log(str(backbones.load_checkpoint(self.features, path)), logger="current")
            return
        prefix = prefix.rstrip(".") + "."
        weights = {k.removeprefix(prefix): v for k, v in read_state_dict(path).items() if k.startswith(prefix)}
        if missing := sorted(self.state_dict().keys() - weights.keys()):
            raise CheckpointError(f"{path} has no {first_names([prefix + name for name in missing])}")
        self.load_state_dict(weights)
