"""LightningModules of semantic segmentation: loss, evaluation and predictions around the task's networks."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from backbones.features import create_features
from tasks.core.errors import UserError, expect
from tasks.core.evaluation import Extremes
from tasks.core.module import TaskModule
from tasks.core.optim import OptimConfig
from tasks.core.report import ReportParts
from tasks.segmentation.faseg.criterion import SetCriterion, semantic_segments
from tasks.segmentation.faseg.inference import semantic_inference
from tasks.segmentation.faseg.network import FASegNetwork
from tasks.segmentation.faseg.transformer_decoder import HIGH_RESOLUTION_LEVEL
from tasks.segmentation.labels import pixel_cross_entropy
from tasks.segmentation.metrics import SegmentationMetrics, image_miou
from tasks.segmentation.report import Case, segmentation_report, small_copies
from tasks.segmentation.semantic_fpn import SemanticFPNNetwork
from tasks.segmentation.views import EvaluationConfig, resize_maps, scores_of_views
from tasks.segmentation.weights import load_weights

PICTURES = 4  # best and worst images in the report, each


class SegmentationModule(TaskModule, abc.ABC):
    """What the segmentation methods share: evaluation, predictions and the parts of the report."""

    task = "segmentation"
    monitor = "val/mIoU"
    one_file_per_sample = True

    def __init__(
        self,
        num_classes: int,
        evaluation: EvaluationConfig | dict[str, Any] | None,
        optim: OptimConfig | dict[str, Any] | None,
        ema_decay: float | None,
    ) -> None:
        super().__init__(optim, ema_decay)
        self.evaluation = (
            evaluation if isinstance(evaluation, EvaluationConfig) else EvaluationConfig(**(evaluation or {}))
        )
        self.metrics = nn.ModuleDict(
            {f"{stage}_metrics": SegmentationMetrics(num_classes) for stage in ("val", "test")}
        )
        self._extremes = Extremes(PICTURES)
        self._last: dict[str, Any] = {}

    def load_initial_weights(self, path: str | None) -> None:
        """Start from a weight file and say what fitted."""
        if path:
            rank_zero_info(str(load_weights(self.network, path)))

    @abc.abstractmethod
    def scores(self, images: Tensor, sizes: list[tuple[int, int]]) -> Iterator[Tensor]:
        """Class scores (K, H, W) of each image of (B, 3, h, w) in 0..255, resized to its (H, W)."""

    def label_maps(self, images: list[Tensor], sizes: list[tuple[int, int]]) -> Iterator[Tensor]:
        """Train ids (H, W) of each uint8 image (3, h, w), at its original size; computed in float32."""
        with torch.autocast(self.device.type, enabled=False):
            if self.evaluation.short_sides or self.evaluation.mode == "slide":
                maps: Iterator[Tensor] = map(self._scores_of_views, images, sizes)
            elif len({image.shape for image in images}) == 1:
                maps = self.scores(torch.stack(images), sizes)
            else:
                maps = (next(self.scores(image[None], [size])) for image, size in zip(images, sizes, strict=True))
            for scores in maps:
                yield scores.argmax(dim=0)

    def _scores_of_views(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        def whole(view: Tensor) -> Tensor:
            return next(self.scores(view[None], [(view.shape[-2], view.shape[-1])]))

        return scores_of_views(whole, image, size, self.evaluation)

    # -- evaluation -----------------------------------------------------------------------------------------------

    def evaluation_step(self, batch: dict[str, Any], stage: str) -> None:
        """Count the label maps of one batch and keep the best and worst images."""
        metrics: Any = self.metrics[f"{stage}_metrics"]
        truths = batch["mask"]
        for id, image, truth, predicted in zip(
            batch["id"], batch["image"], truths, self.label_maps(batch["image"], batch["size"]), strict=True
        ):
            metrics.update(predicted, truth)

            def payload(image: Tensor = image, truth: Tensor = truth, predicted: Tensor = predicted) -> Case:
                return small_copies(image, truth, predicted)

            self._extremes.add(id, image_miou(predicted, truth), payload)

    def evaluation_results(self, stage: str) -> dict[str, float | Tensor]:
        """Return mIoU, fwIoU, mAcc and pAcc of the epoch and keep what the report shows."""
        metrics: Any = self.metrics[f"{stage}_metrics"]
        results = metrics.compute()
        best, worst = self._extremes.gather()
        self._last = {**{k: v.cpu().numpy() for k, v in results.items()}, "best": best, "worst": worst}
        metrics.reset()
        self._extremes = Extremes(PICTURES)
        return {name: results[name] for name in ("mIoU", "fwIoU", "mAcc", "pAcc")}

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, np.ndarray]:
        """Label maps (H, W) of one batch by id, with the values of the data set's official format."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        label_maps = self.label_maps(batch["image"], batch["size"])
        return {id: data.to_official(labels.cpu().numpy()) for id, labels in zip(batch["id"], label_maps, strict=True)}

    def prediction_files(self, records: Mapping[str, np.ndarray]) -> Iterator[tuple[str, bytes]]:
        """A PNG file of each label map."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        for id, label_map in records.items():
            done, png = cv2.imencode(".png", label_map)
            assert done
            yield data.prediction_name(id), png.tobytes()

    def example_input(self) -> Tensor:
        """One image of the training crop's size."""
        data: Any = getattr(self.trainer, "datamodule", None)
        height, width = data.crop_size
        return torch.zeros(1, 3, height, width, device=self.device)

    def report_parts(self, datamodule: LightningDataModule) -> ReportParts:
        """Per-class table and figure, confusion matrix, best and worst images."""
        if not self._last:
            return ReportParts()
        data: Any = datamodule
        return segmentation_report(self._last, list(data.class_names), data.palette)


class FASeg(SegmentationModule):
    """FASeg (CVPR 2023, arXiv 2204.01244), or Mask2Former with its three ideas switched off.

    The defaults are FASeg's published model; Mask2Former is `num_layers=9`, `mask_threshold=0.5` and
    `dynamic_queries`, `high_resolution` and `conditional_positions` false.

    Args:
        num_classes: Number of classes K; the command line takes it from the data.
        backbone: Any timm model with maps of strides 4, 8, 16, 32.
        backbone_norm: `frozen` batch normalisation (ADE20K recipe) or `batch`.
        pretrained: Start the backbone from timm's ImageNet weights.
        drop_path_rate: Stochastic depth of the backbone; None keeps the model's default.
        weights: Official FASeg or Mask2Former release, a backbone's weights, or a checkpoint of ours to start from.
        hidden_dim: Width of pixel decoder and transformer decoder.
        mask_dim: Channels of the mask embedding.
        num_queries: Number of queries Q.
        num_heads: Attention heads.
        dim_feedforward: Hidden width of the decoder's feed-forward networks.
        num_layers: Decoder layers.
        encoder_layers: Deformable encoder layers in the pixel decoder.
        encoder_dim_feedforward: Hidden width of theirs.
        omega_rate: One in how many 1/32 cells is attended at high resolution.
        mask_threshold: Mask probability below which a position is blocked in masked attention.
        dynamic_queries: Renew the positional queries in every layer.
        high_resolution: Attend the selected windows of the 1/4 map in every fourth layer.
        conditional_positions: Positions of image features by depthwise convolution instead of sines.
        num_points: Points per mask in matching and losses.
        auxiliary_weight: Weight of an additional per-pixel cross-entropy on the mask features in training. Not part
            of the paper; it shortens trainings from scratch. 0 leaves it out.
        evaluation: Whole image, sliding window, multi-scale.
        optim: Optimizer, schedule and clipping.
        ema_decay: Decay of the moving average of the weights; None trains without.
    """

    network: FASegNetwork

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet50",
        backbone_norm: Literal["frozen", "batch"] = "frozen",
        pretrained: bool = False,
        drop_path_rate: float | None = None,
        weights: str | None = None,
        hidden_dim: int = 256,
        mask_dim: int = 256,
        num_queries: int = 100,
        num_heads: int = 8,
        dim_feedforward: int = 2048,
        num_layers: int = 13,
        encoder_layers: int = 6,
        encoder_dim_feedforward: int = 1024,
        omega_rate: int = 32,
        mask_threshold: float = 0.15,
        dynamic_queries: bool = True,
        high_resolution: bool = True,
        conditional_positions: bool = True,
        num_points: int = 12544,
        auxiliary_weight: float = 0.0,
        evaluation: EvaluationConfig | None = None,
        optim: OptimConfig | None = None,
        ema_decay: float | None = None,
    ) -> None:
        arguments = dict(locals())
        least = HIGH_RESOLUTION_LEVEL + 1 if high_resolution else 1  # else the 1/4 level would be left untrained
        expect("model.num_layers", num_layers, num_layers >= least, f"at least {least}")
        expect("model.auxiliary_weight", auxiliary_weight, auxiliary_weight >= 0, "at least 0")
        super().__init__(num_classes, evaluation, optim, ema_decay)
        self.remember_hyperparameters(arguments)
        features = create_backbone(backbone, backbone_norm, pretrained and not weights, drop_path_rate)
        self.network = FASegNetwork(
            features,
            features.channels,
            num_classes,
            hidden_dim=hidden_dim,
            mask_dim=mask_dim,
            num_queries=num_queries,
            num_heads=num_heads,
            dim_feedforward=dim_feedforward,
            num_layers=num_layers,
            encoder_layers=encoder_layers,
            encoder_dim_feedforward=encoder_dim_feedforward,
            omega_rate=omega_rate,
            mask_threshold=mask_threshold,
            dynamic_queries=dynamic_queries,
            high_resolution=high_resolution,
            conditional_positions=conditional_positions,
            auxiliary_head=auxiliary_weight > 0,
        )
        self.auxiliary_weight = auxiliary_weight
        self.criterion = SetCriterion(num_classes, num_points)
        self.load_initial_weights(weights)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Deeply supervised mask classification loss of one batch."""
        outputs = self.network(batch["image"])
        losses = self.criterion(outputs, semantic_segments(batch["mask"]))
        total = self.criterion.total(losses)
        if "pixel_logits" in outputs:
            losses["loss_pixel"] = pixel_cross_entropy(outputs["pixel_logits"], batch["mask"])
            total = total + self.auxiliary_weight * losses["loss_pixel"]
        total = self.with_loss_terms(total)
        self.log("train/loss", total, prog_bar=True)
        for name in sorted(losses.keys() & {"loss_ce", "loss_mask", "loss_dice", "loss_pixel"}):
            self.log(f"train/{name}", losses[name])
        return total

    def scores(self, images: Tensor, sizes: list[tuple[int, int]]) -> Iterator[Tensor]:
        """Class probability times mask probability, summed over queries."""
        outputs = self.network(images)
        input_size = (images.shape[-2], images.shape[-1])
        for logits, masks, size in zip(outputs["pred_logits"], outputs["pred_masks"], sizes, strict=True):
            yield semantic_inference(logits, masks, input_size, size)


class SemanticFPN(SegmentationModule):
    """Semantic FPN (arXiv 1901.02446): the per-pixel baseline of the LIT papers.

    Args:
        num_classes: Number of classes K; the command line takes it from the data.
        backbone: Any timm model with maps of strides 4, 8, 16, 32.
        backbone_norm: `batch` normalisation or `frozen`.
        pretrained: Start the backbone from timm's ImageNet weights.
        drop_path_rate: Stochastic depth of the backbone; None keeps the model's default.
        weights: A backbone's weights, or a checkpoint of ours to start from.
        evaluation: Whole image, sliding window, multi-scale.
        optim: Optimizer, schedule and clipping.
        ema_decay: Decay of the moving average of the weights; None trains without.
    """

    network: SemanticFPNNetwork

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet50",
        backbone_norm: Literal["frozen", "batch"] = "batch",
        pretrained: bool = False,
        drop_path_rate: float | None = None,
        weights: str | None = None,
        evaluation: EvaluationConfig | None = None,
        optim: OptimConfig | None = None,
        ema_decay: float | None = None,
    ) -> None:
        arguments = dict(locals())
        super().__init__(num_classes, evaluation, optim, ema_decay)
        self.remember_hyperparameters(arguments)
        features = create_backbone(backbone, backbone_norm, pretrained and not weights, drop_path_rate)
        self.network = SemanticFPNNetwork(features, num_classes)
        self.load_initial_weights(weights)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Per-pixel cross-entropy of one batch."""
        loss = self.with_loss_terms(pixel_cross_entropy(self.network(batch["image"]), batch["mask"]))
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def scores(self, images: Tensor, sizes: list[tuple[int, int]]) -> Iterator[Tensor]:
        """Logits upsampled to the padded input, cropped and resized."""
        logits = self.network(images)
        height, width = images.shape[-2:]
        padded = F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False)[..., :height, :width]
        for image_scores, size in zip(padded, sizes, strict=True):
            yield resize_maps(image_scores, size)


def create_backbone(name: str, norm: Literal["frozen", "batch"], pretrained: bool, drop_path_rate: float | None) -> Any:
    """A pyramid of `backbones.create_features`; raises UserError for what it does not know or find."""
    try:
        return create_features(name, pretrained=pretrained, norm=norm, drop_path_rate=drop_path_rate)
    except (ValueError, RuntimeError) as error:  # says what is wrong with the name, or that no weights were found
        raise UserError(f"model.backbone: {error}") from error
