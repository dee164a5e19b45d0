"""Classification of clips: what a video backbone is pre-trained with before it detects (Kinetics-400)."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from backbones import create
from backbones.checkpoint import load_checkpoint
from backbones.keys import BACKBONE_TABLES
from backbones.video_features import VIDEO_BACKBONES
from tasks.core.errors import UserError, expect
from tasks.core.evaluation import gather_by_id
from tasks.core.optim import OptimConfig
from tasks.video.base import VideoModule

TOP = 5  # predictions written for each video
LAYOUTS = {"our checkpoint": [(r"^(?!network\.)", None), (r"^network\.", "")], **BACKBONE_TABLES}


class VideoClassification(VideoModule):
    """STPT or I3D as a classifier of clips; the defaults are MViT-B's recipe for Kinetics (arXiv 2104.11227).

    A detector starts from its checkpoint (`TemporalActionDetection`'s `weights`). In evaluation the probabilities of
    all clips of a video are averaged.

    Args:
        num_classes: Number of classes K; the command line takes it from the data.
        backbone: `stpt` or `i3d`.
        backbone_options: Further arguments of the backbone, e.g. its depths.
        pretrained: Must be false: there are no weights to download.
        weights: Weights of the backbone, or a checkpoint of ours; a classifier for other classes is left out.
        drop_path_rate: Stochastic depth of STPT; None is 0.
        drop_rate: Dropout before the classifier.
        grad_checkpointing: Compute activations again in the backward pass instead of keeping them.
        label_smoothing: Share of the target that is spread over all classes.
        mixup: alpha of mixup (arXiv 1710.09412), 0 for none. Each batch is mixed with its reverse; of an odd batch the
            last clip stays as it is.
        cutmix: alpha of cutmix (arXiv 1905.04899), 0 for none; the same rectangle is cut from all frames.
        optim: Optimizer, schedule and clipping.
        ema_decay: Decay of the moving average of the weights; None trains without.
    """

    monitor = "val/top1"

    def __init__(
        self,
        num_classes: int,
        backbone: str = "stpt",
        backbone_options: dict[str, Any] | None = None,
        pretrained: bool = False,
        weights: str | None = None,
        drop_path_rate: float | None = None,
        drop_rate: float = 0.5,
        grad_checkpointing: bool = False,
        label_smoothing: float = 0.1,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        optim: OptimConfig | None = None,
        ema_decay: float | None = None,
    ) -> None:
        arguments = dict(locals())
        expect("model.num_classes", num_classes, num_classes > 0, "at least 1")
        expect("model.backbone", backbone, backbone in VIDEO_BACKBONES, " or ".join(VIDEO_BACKBONES))
        expect("model.pretrained", pretrained, not pretrained, "false (model.weights names a file)")
        for name in ("drop_path_rate", "drop_rate", "label_smoothing"):
            value = arguments[name]
            expect(f"model.{name}", value, value is None or 0 <= value < 1, "a number of at least 0 and below 1")
        for name in ("mixup", "cutmix"):
            expect(f"model.{name}", arguments[name], arguments[name] >= 0, "at least 0")
        super().__init__(optim, ema_decay)
        self.remember_hyperparameters(arguments)
        self.num_classes = num_classes
        options = {"drop_rate": drop_rate, **(backbone_options or {})}
        if drop_path_rate is not None:
            options["drop_path_rate"] = drop_path_rate
        try:
            network: Any = create(backbone, num_classes=num_classes, **options)
        except (TypeError, ValueError) as error:
            raise UserError(f"model.backbone: {backbone!r} cannot be made: {error}") from error
        network.set_grad_checkpointing(grad_checkpointing)
        self.network = network
        self.mixup: Mixup | None = None
        self.criterion: nn.Module = LabelSmoothingCrossEntropy(label_smoothing)
        if mixup or cutmix:
            self.mixup = Mixup(mixup, cutmix, label_smoothing=label_smoothing, num_classes=num_classes)
            self.criterion = SoftTargetCrossEntropy()
        self.label_smoothing = label_smoothing
        self._seen: dict[str, dict[str, np.ndarray]] = {}
        if weights:
            rank_zero_info(str(load_checkpoint(self.network, weights, tables=LAYOUTS)))

    def setup(self, stage: str) -> None:
        """Compare the classes with those of the data; raises UserError."""
        data: Any = getattr(self._trainer, "datamodule", None)
        if data is not None:
            fits = data.num_classes == self.num_classes
            expect("model.num_classes", self.num_classes, fits, f"the data's {data.num_classes}")

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Cross-entropy against the mixed labels."""
        clips, targets = self._mixed(_normalised(batch["clip"]), batch["label"])
        loss = self.with_loss_terms(self.criterion(self.network(clips), targets))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(clips))
        return loss

    def _mixed(self, clips: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Clips and targets of a batch: class numbers, or probabilities (B, K) where clips are mixed."""
        if self.mixup is None:
            return clips, labels
        even = len(clips) - len(clips) % 2  # timm mixes an even number
        rest = nn.functional.one_hot(labels[even:], self.num_classes).to(clips.dtype)
        targets = rest * (1 - self.label_smoothing) + self.label_smoothing / self.num_classes
        if even:
            # frames as channels: what is cut out is then a rectangle of all of them
            mixed, mixed_targets = self.mixup(clips[:even].flatten(1, 2), labels[:even])
            clips = torch.cat([mixed.view_as(clips[:even]), clips[even:]])
            targets = torch.cat([mixed_targets, targets])
        return clips, targets

    # -- evaluation -----------------------------------------------------------------------------------------------

    def probabilities(self, batch: dict[str, Any]) -> dict[str, np.ndarray]:
        """Probabilities (K,) of each clip of a batch by ``<video>@<view>``."""
        if not batch["id"]:
            return {}
        with torch.autocast(self.device.type, enabled=False):
            found = self.network(_normalised(batch["clip"])).float().softmax(dim=1).cpu().numpy()
        views = batch.get("view", [0] * len(found))
        return {f"{id}@{int(view):04d}": row for id, view, row in zip(batch["id"], views, found, strict=True)}

    def evaluation_step(self, batch: dict[str, Any], stage: str) -> None:
        """Keep the probabilities and labels of one batch."""
        found = self.probabilities(batch)
        for (key, row), label in zip(found.items(), batch["label"].tolist() if found else [], strict=True):
            self._seen[key] = {"probabilities": row, "label": np.asarray(label)}

    def evaluation_results(self, stage: str) -> dict[str, float | Tensor]:
        """Share of videos, in per cent, whose class is the most probable one, and among the five most probable."""
        videos: dict[str, list[dict[str, np.ndarray]]] = defaultdict(list)
        for key, record in gather_by_id(self._seen).items():
            videos[key.rpartition("@")[0]].append(record)
        self._seen = {}
        ranks = []
        for records in videos.values():
            best = _best_first(_mean([record["probabilities"] for record in records]))
            ranks.append(np.flatnonzero(best == records[0]["label"])[0])
        return {f"top{k}": 100 * float(np.mean(np.array(ranks) < k)) if ranks else float("nan") for k in (1, 5)}

    def example_input(self) -> Tensor:
        """One clip of the data's size."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        channels = next(self.network.parameters()).shape[1]
        return torch.zeros(1, channels, data.clip_length, data.crop_size, data.crop_size, device=self.device)

    # -- predictions ----------------------------------------------------------------------------------------------

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, np.ndarray]:
        """Probabilities of each clip of a batch."""
        return self.probabilities(batch)

    def prediction_files(self, records: Mapping[str, np.ndarray]) -> Iterator[tuple[str, bytes]]:
        """``predictions.csv``: a row per video with the names and probabilities of its most probable classes."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        videos: dict[str, list[np.ndarray]] = defaultdict(list)
        for key in sorted(records):
            videos[key.rpartition("@")[0]].append(records[key])
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        columns = range(1, min(TOP, self.num_classes) + 1)
        writer.writerow(["video", *(name for i in columns for name in (f"class_{i}", f"probability_{i}"))])
        for id, rows in videos.items():
            mean = _mean(rows)
            best = _best_first(mean)[:TOP]
            writer.writerow([id, *(cell for c in best for cell in (data.class_names[c], f"{mean[c]:.6f}"))])
        yield "predictions.csv", text.getvalue().encode(errors="surrogateescape")


def _normalised(clips: Tensor) -> Tensor:
    """Clips in 0..255 as floating point from -1 to 1."""
    return clips.float() / 127.5 - 1


def _mean(rows: list[np.ndarray]) -> np.ndarray:
    return np.asarray(np.stack(rows).astype(np.float64).mean(axis=0))


def _best_first(probabilities: np.ndarray) -> np.ndarray:
    """Numbers of classes by falling probability, the first of equals first."""
    return np.argsort(-probabilities, kind="stable")
