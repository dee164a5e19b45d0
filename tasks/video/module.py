"""LightningModules of temporal action detection: losses, evaluation and predictions around the task's networks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from backbones.video_features import create_video_features
from tasks.core.errors import UserError, expect
from tasks.core.evaluation import all_gather
from tasks.core.optim import OptimConfig
from tasks.core.report import ReportParts
from tasks.video.afsd.decoding import decode
from tasks.video.afsd.head import AFSDHead, AFSDOutput
from tasks.video.afsd.losses import AFSDLossConfig, boundary_losses, detection_losses, total_loss, triplet_loss
from tasks.video.afsd.network import AFSDNetwork
from tasks.video.base import VideoModule
from tasks.video.classification import VideoClassification
from tasks.video.evaluators import THUMOS14_TIOUS, EvaluatorName
from tasks.video.metrics import TemporalDetectionMetric
from tasks.video.post_processing import PostProcessingConfig, Record, clip_to_video, label_by_video, suppress
from tasks.video.predictions import action_csv, action_srt, activitynet_json, merge_windows, window_key
from tasks.video.video_labels import VideoLabels
from tasks.video.weights import load_weights

__all__ = ["TemporalActionDetection", "VideoClassification", "VideoModule"]


class TemporalActionDetection(VideoModule):
    """AFSD (CVPR 2021, arXiv 2103.13137) on STPT (ECCV 2022, arXiv 2207.10448), I3D, an image backbone or features.

    The defaults are those for THUMOS14. On ActivityNet-1.3 AFSD detects actions without their class, with
    `class_agnostic`, `class_scores`, `maps` coarse, `scale_by_level` and `small_init`.

    Args:
        num_classes: Number of classes K; the command line takes it from the data, like the next three.
        image_size: Height and width of the frames.
        feature_dim: Channels of features that are read instead of frames; None for frames.
        frames_per_feature: Frames from one feature to the next.
        backbone: `stpt`, `i3d` or any timm model with maps of strides 4, 8, 16, 32; not used with features.
        backbone_norm: `frozen` batch normalisation or `batch`.
        backbone_options: Further arguments of the backbone, e.g. its depths.
        pretrained: Start an image backbone from timm's ImageNet weights.
        drop_path_rate: Stochastic depth of the backbone; None keeps its default.
        grad_checkpointing: Compute the backbone's activations again in the backward pass instead of keeping them.
        weights: An official AFSD checkpoint, a backbone's weights, or a checkpoint of ours to start from.
        dim: Width of the head.
        num_levels: Levels of the pyramid.
        maps: Maps of the backbone that the head reads: `both`, or the `coarse` one alone.
        scale_by_level: Predict distances in units that double with the level.
        small_init: Initialise the predictors from normal(0, 0.01).
        class_agnostic: Detect actions of any class as one.
        class_scores: File with the class probabilities of each video, which then label its detections: the layout of
            the CUHK scores, ``{"class": [...], "results": {"<video>": [...]}}``.
        loss: Weights and rules of the losses.
        post_processing: Suppression of repeated detections.
        clip_to_video: Cut detections at the ends of their video.
        padding: Pixel value, 0..255, of the frames of a clip behind the end of its video.
        eval_padding: The same in evaluation; None is `padding`. For THUMOS14, the official code of AFSD trains with 0
            and tests with 127.5; for ActivityNet-1.3 both are 127.5.
        evaluator: The official program whose rules the mean AP follows.
        tious: Thresholds of the temporal IoU.
        optim: Optimizer, schedule and clipping.
        ema_decay: Decay of the moving average of the weights; None trains without.
    """

    monitor = "val/mAP"
    network: AFSDNetwork

    def __init__(
        self,
        num_classes: int,
        image_size: int | None = None,
        feature_dim: int | None = None,
        frames_per_feature: int | None = None,
        backbone: str = "stpt",
        backbone_norm: Literal["frozen", "batch"] = "frozen",
        backbone_options: dict[str, Any] | None = None,
        pretrained: bool = False,
        drop_path_rate: float | None = None,
        grad_checkpointing: bool = False,
        weights: str | None = None,
        dim: int = 512,
        num_levels: int = 6,
        maps: Literal["both", "coarse"] = "both",
        scale_by_level: bool = False,
        small_init: bool = False,
        class_agnostic: bool = False,
        class_scores: str | None = None,
        loss: AFSDLossConfig | None = None,
        post_processing: PostProcessingConfig | None = None,
        clip_to_video: bool = False,
        padding: float = 0.0,
        eval_padding: float | None = None,
        evaluator: EvaluatorName = "afsd",
        tious: list[float] | None = None,
        optim: OptimConfig | None = None,
        ema_decay: float | None = None,
    ) -> None:
        arguments = dict(locals())
        expect("model.num_classes", num_classes, num_classes > 0, "at least 1")
        expect("model.num_levels", num_levels, num_levels >= 2, "at least 2")
        for name in ("padding", "eval_padding"):
            value = arguments[name]
            expect(f"model.{name}", value, value is None or 0 <= value <= 255, "a pixel value between 0 and 255")
        super().__init__(optim, ema_decay)
        self.remember_hyperparameters(arguments)
        if class_scores and not class_agnostic:
            raise UserError("model.class_scores: it labels detections without a class; expected class_agnostic too")
        self.num_classes = num_classes
        self.class_agnostic = class_agnostic
        self.clip_to_video = clip_to_video
        # a checkpoint holds plain values
        self.loss = AFSDLossConfig(**loss) if isinstance(loss, Mapping) else loss or AFSDLossConfig()
        self.post_processing = (
            PostProcessingConfig(**post_processing)
            if isinstance(post_processing, Mapping)
            else post_processing or PostProcessingConfig()
        )
        if self.loss.level_ranges is not None:
            ranges = self.loss.level_ranges
            expect("model.loss.level_ranges", ranges, len(ranges) == num_levels, f"one for each of {num_levels} levels")
        features: Any = None
        if feature_dim is None:
            features = _backbone(
                backbone, backbone_norm, pretrained and not weights, drop_path_rate, maps, backbone_options or {}
            )
            if grad_checkpointing and hasattr(features, "set_grad_checkpointing"):
                features.set_grad_checkpointing(True)
        head = _head(
            features.channels if feature_dim is None else [feature_dim],
            [None] if feature_dim is not None else [math.ceil((image_size or 96) / s) for _, s, _ in features.strides],
            num_classes=1 if class_agnostic else num_classes,
            dim=dim,
            num_levels=num_levels,
            scale_by_level=scale_by_level,
            small_init=small_init,
        )
        self.network = AFSDNetwork(features, head, frames_per_feature or 1)
        self.class_scores = class_scores
        self.video_labels: VideoLabels | None = None
        self.padding = (padding, padding if eval_padding is None else eval_padding)
        self.in_chans = (backbone_options or {}).get("in_chans", 3)
        self._durations: dict[str, float] = {}
        self._evaluated_stage: str | None = None
        self.metrics = nn.ModuleDict(
            {
                f"{stage}_metrics": TemporalDetectionMetric(
                    [], evaluator, tious or THUMOS14_TIOUS, self.merge_detections
                )
                for stage in ("val", "test")
            }
        )
        if weights:
            rank_zero_info(str(load_weights(self.network, weights)))

    def setup(self, stage: str) -> None:
        """Compare the classes with those of the data; raises UserError."""
        data: Any = getattr(self._trainer, "datamodule", None)
        if data is None:
            return
        fits = data.num_classes == self.num_classes
        expect("model.num_classes", self.num_classes, fits, f"the data's {data.num_classes}")
        if self.class_agnostic and self.num_classes > 1 and self.class_scores is None:
            raise UserError(
                "model.class_scores: with class_agnostic it must name a file that tells which of the data's "
                f"{self.num_classes} classes a video shows"
            )
        if self.class_scores is not None:
            self.video_labels = VideoLabels.read(Path(self.class_scores))
            self.video_labels.arrange(data.class_names)
        for metric in self.metrics.values():
            metric.class_names = list(data.class_names)  # type: ignore[assignment]

    # -- training -------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """All losses of AFSD on one batch; the triplet loss on those clips that could be spliced."""
        inputs, spliced, valid = self._inputs(batch, self.padding[0]), None, batch.get("triplet_valid")
        if valid is not None and valid.any():
            spliced = batch[f"triplet_{_input_name(batch)}"][valid]
        output, boundaries = self.network(inputs, spliced)
        with torch.autocast(self.device.type, enabled=False):
            labels = [torch.zeros_like(x) if self.class_agnostic else x for x in batch["labels"]]
            losses = detection_losses(output, batch["segments"], labels, self.loss)
            masks = torch.stack([batch["start_mask"], batch["end_mask"]], dim=1)
            losses |= boundary_losses(output.boundaries, masks)
            if boundaries is not None:
                segments = batch["triplet_segments"][valid]
                losses["triplet"] = triplet_loss(boundaries, segments, self.loss.triplet_stride)
            total = total_loss(losses, self.loss)
        total = self.with_loss_terms(total)
        self.log("train/loss", total, prog_bar=True, batch_size=len(batch["id"]))
        for term, value in losses.items():
            self.log(f"train/loss_{term}", value, batch_size=len(batch["id"]))
        return total

    def _inputs(self, batch: dict[str, Any], padding: float) -> Tensor:
        """The clips or features of a batch; frames behind the end of a video, zeros in the data, become `padding`."""
        inputs: Tensor = batch[_input_name(batch)]
        lengths = batch["valid"]
        if "clip" not in batch or not padding or min(lengths) >= inputs.shape[2]:
            return inputs
        inputs = inputs.float()
        for clip, length in zip(inputs, lengths, strict=True):
            clip[:, length:] = padding
        return inputs

    # -- evaluation -----------------------------------------------------------------------------------------------

    def detections(self, batch: dict[str, Any]) -> Iterator[tuple[str, float, dict[str, np.ndarray]]]:
        """Video, offset and detections in seconds of each window of a batch, before suppression; in float32."""
        if not batch["id"]:
            return
        with torch.autocast(self.device.type, enabled=False):
            output: AFSDOutput = self.network(self._inputs(batch, self.padding[1]))[0]
            segments, scores = (x.double().cpu().numpy() for x in decode(output))
        for i, id in enumerate(batch["id"]):
            offset, fps = float(batch["offset"][i]), float(batch["fps"][i])
            self._durations[id] = float(batch["duration"][i])
            points, labels = np.nonzero(scores[i] > self.post_processing.score_threshold)
            times = (segments[i][points] + offset) / fps
            yield id, offset, {"segments": times, "scores": scores[i][points, labels], "labels": labels}

    def merge_detections(self, id: str, record: Record) -> dict[str, np.ndarray]:
        """What is left of the detections of all windows of the video `id`."""
        left = suppress(record, self.post_processing)
        if self.video_labels is not None:
            left = label_by_video(left, self.video_labels[id])
        return clip_to_video(left, self._durations[id]) if self.clip_to_video else left

    def evaluation_step(self, batch: dict[str, Any], stage: str) -> None:
        """Keep the detections of one batch of windows."""
        metric: Any = self.metrics[f"{stage}_metrics"]
        for id, offset, found in self.detections(batch):
            metric.update(id, offset, found["segments"], found["scores"], found["labels"])

    def evaluation_results(self, stage: str) -> dict[str, float | Tensor]:
        """Mean AP at each threshold and on average, and average recall, in the epoch."""
        metric: Any = self.metrics[f"{stage}_metrics"]
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if metric.ground_truth is None:
            metric.ground_truth = data.ground_truth("val" if stage == "val" else data.splits[-1])
        for durations in all_gather(self._durations):
            self._durations |= durations
        results = metric.compute()
        metric.reset()
        self._evaluated_stage = stage
        return results

    def report_parts(self, datamodule: LightningDataModule) -> ReportParts:
        """Tables and pictures of the last evaluation."""
        if self._evaluated_stage is None:
            return ReportParts()
        from tasks.video.report import detection_report

        metric: Any = self.metrics[f"{self._evaluated_stage}_metrics"]
        return detection_report(metric)

    def example_input(self) -> Tensor:
        """One window of the data's length."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        steps = data.clip_length // data.frames_per_feature
        if data.feature_dim is not None:
            return torch.zeros(1, data.feature_dim, steps, device=self.device)
        return torch.zeros(1, self.in_chans, steps, data.crop_size, data.crop_size, device=self.device)

    # -- predictions ----------------------------------------------------------------------------------------------

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, dict[str, Any]]:
        """Detections of each window of a batch, with the length of its video, by `window_key`."""
        found = self.detections(batch)
        return {window_key(id, offset): {**record, "duration": self._durations[id]} for id, offset, record in found}

    def prediction_files(self, records: Mapping[str, dict[str, Any]]) -> Iterator[tuple[str, bytes]]:
        """ActivityNet's json of all videos, and of each video a table, subtitles and a picture of its timeline."""
        from tasks.video.timeline import FRAMES, action_timeline

        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        names = list(data.class_names)
        self._durations |= {key.rpartition("@")[0]: record["duration"] for key, record in records.items()}
        videos = merge_windows(records, self.merge_detections)
        yield activitynet_json(videos, names)
        for id, found in track(videos.items(), "Drawing timelines", console=Console(stderr=True), transient=True):
            yield action_csv(id, found, names)
            yield action_srt(id, found, names)
            yield action_timeline(id, found, names, self._durations[id], data.thumbnails(id, FRAMES))


def _input_name(batch: Mapping[str, Any]) -> str:
    return "clip" if "clip" in batch else "features"


def _backbone(
    name: str, norm: Any, pretrained: bool, drop_path_rate: float | None, maps: Any, options: dict[str, Any]
) -> Any:
    try:
        return create_video_features(
            name, pretrained=pretrained, norm=norm, drop_path_rate=drop_path_rate, maps=maps, **options
        )
    except TypeError as error:
        raise UserError(f"model.backbone_options: {name!r} cannot be made: {error}") from error
    except (ValueError, RuntimeError) as error:  # says what is wrong with the name, or that no weights were found
        raise UserError(f"model.backbone: {error}") from error


def _head(channels: list[int], sides: list[int | None], **options: Any) -> AFSDHead:
    try:
        return AFSDHead(channels, sides=sides, **options)
    except ValueError as error:
        raise UserError(f"model.{error}") from error
