"""LightningModules around mmsegmentation's segmentors; they need the extra openmmlab."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from tasks.core.errors import expect
from tasks.core.optim import OptimConfig
from tasks.segmentation.mmseg_models import MODELS
from tasks.segmentation.mmseg_network import MMSegNetwork, build_network, import_mmseg
from tasks.segmentation.module import SegmentationModule, create_backbone
from tasks.segmentation.views import EvaluationConfig, resize_maps
from tasks.segmentation.weights import load_mmseg_weights


class MMSegModule(SegmentationModule):
    """What segmentors of mmsegmentation share: their losses and scores."""

    network: MMSegNetwork

    def load_initial_weights(self, path: str | None) -> None:
        """Start from a weight file and say what fitted."""
        if path:
            rank_zero_info(str(load_mmseg_weights(self.network.segmentor, path)))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Sum of the segmentor's loss terms of one batch."""
        terms = self.network(batch["image"], batch["mask"])
        loss = self.with_loss_terms(torch.stack(list(terms.values())).sum())
        self.log("train/loss", loss, prog_bar=True)
        for name, term in terms.items():
            if ".d" not in name and name != "loss_untouched":  # not those of every decoder layer
                self.log(f"train/{name.replace('.', '_')}", term)
        return loss

    def scores(self, images: Tensor, sizes: list[tuple[int, int]]) -> Iterator[Tensor]:
        """Logits, or what a segmentor has in their place, resized."""
        for image_scores, size in zip(self.network(images), sizes, strict=True):
            yield resize_maps(image_scores, size)


class MMSegmentation(MMSegModule):
    """A segmentor of mmsegmentation on any backbone, with its paper's settings; needs the extra openmmlab.

    Args:
        num_classes: Number of classes K; the command line takes it from the data.
        segmentor: ``semantic_fpn``, ``upernet``, ``segformer`` or ``mask2former``.
        backbone: Any timm model with maps of strides 4, 8, 16, 32.
        backbone_norm: `batch` normalisation or `frozen`.
        pretrained: Start the backbone from timm's ImageNet weights.
        drop_path_rate: Stochastic depth of the backbone; None keeps the model's default.
        weights: A file of mmsegmentation, a backbone's weights, or a checkpoint of ours to start from.
        options: Values to replace in mmsegmentation's dictionary of the model, e.g. ``{decode_head: {channels: 256}}``.
        evaluation: Whole image, sliding window, multi-scale.
        optim: Optimizer, schedule and clipping.
        ema_decay: Decay of the moving average of the weights; None trains without.
    """

    def __init__(
        self,
        num_classes: int,
        segmentor: str = "upernet",
        backbone: str = "resnet50",
        backbone_norm: Literal["frozen", "batch"] = "batch",
        pretrained: bool = False,
        drop_path_rate: float | None = None,
        weights: str | None = None,
        options: dict[str, Any] | None = None,
        evaluation: EvaluationConfig | None = None,
        optim: OptimConfig | None = None,
        ema_decay: float | None = None,
    ) -> None:
        arguments = dict(locals())
        expect("model.segmentor", segmentor, segmentor in MODELS, f"one of {', '.join(MODELS)}")
        super().__init__(num_classes, evaluation, optim, ema_decay)
        self.remember_hyperparameters(arguments)
        import_mmseg()
        from tasks.core.openmmlab.config import merge

        features: Any = create_backbone(backbone, backbone_norm, pretrained and not weights, drop_path_rate)
        model = MODELS[segmentor](features.channels, num_classes)
        merge(model, options or {})
        self.network = build_network(model, features)
        self.load_initial_weights(weights)


class MMSegmentationConfig(MMSegModule):
    """What a configuration file of mmsegmentation calls its model; needs the extra openmmlab.

    Data and optimizer are this project's: of the file only `model` is used, without the weights that it would download,
    and with the data's number of classes.

    Args:
        num_classes: Number of classes K; the command line takes it from the data.
        config: The file, or ``mmseg::`` and the name of one that comes with mmsegmentation.
        allow_config_code: Read another file than mmsegmentation's own. Such a file is a program that runs when read.
        weights: A file of mmsegmentation, a backbone's weights, or a checkpoint of ours to start from.
        evaluation: Whole image, sliding window, multi-scale; None takes the file's `test_cfg`.
        optim: Optimizer, schedule and clipping.
        ema_decay: Decay of the moving average of the weights; None trains without.
        model: The dictionary `model` itself, as a checkpoint holds it: the file is then not read.
    """

    def __init__(
        self,
        num_classes: int,
        config: str,
        allow_config_code: bool = False,
        weights: str | None = None,
        evaluation: EvaluationConfig | None = None,
        optim: OptimConfig | None = None,
        ema_decay: float | None = None,
        model: dict[str, Any] | None = None,
    ) -> None:
        arguments = dict(locals())
        import_mmseg()
        from tasks.core.openmmlab.config import read_model
        from tasks.segmentation.mmseg_config import evaluation_of, network_of

        model = model or read_model(config, "mmseg", allow_config_code)
        super().__init__(num_classes, evaluation or evaluation_of(model), optim, ema_decay)
        self.remember_hyperparameters({**arguments, "model": model})
        self.network = network_of(model, num_classes)
        self.load_initial_weights(weights)
