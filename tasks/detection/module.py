"""LightningModules of detection: loss, evaluation and predictions around detectors of torchvision and mmdetection."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from backbones.features import create_features
from tasks.core.errors import UserError, expect
from tasks.core.evaluation import Extremes
from tasks.core.module import TaskModule
from tasks.core.optim import OptimConfig
from tasks.core.preprocess import NormalizeAndPad
from tasks.core.report import ReportParts
from tasks.detection.matching import ErrorCounts, Truth, match_image
from tasks.detection.metrics import DetectionMetrics
from tasks.detection.mmdet_models import MODELS, model_dict
from tasks.detection.mmdet_network import MMDetNetwork, build_detector
from tasks.detection.network import DetectionNetwork, Record, Target
from tasks.detection.report import detection_report, small_copies
from tasks.detection.torchvision_detectors import TorchvisionNetwork, freeze_unused_norms
from tasks.detection.weights import load_weights

PICTURES = 4  # best and worst images in the report, each
EXAMPLE_SIZE = (800, 1280)  # of which published FLOPs of detectors are
BOX_DIGITS, SCORE_DIGITS = 3, 6


class DetectionModule(TaskModule):
    """What the detectors share: training, evaluation, predictions and the parts of the report."""

    task = "detection"
    monitor = "val/box_AP"
    network: DetectionNetwork

    def __init__(self, num_classes: int, optim: OptimConfig | dict[str, Any] | None, ema_decay: float | None) -> None:
        expect("model.num_classes", num_classes, num_classes > 0, "at least 1")
        super().__init__(optim, ema_decay)
        self.num_classes = num_classes
        self._truths: dict[str, dict[str, Truth]] = {}
        self._last: dict[str, Any] = {}

    def set_network(self, network: DetectionNetwork, weights: str | None) -> None:
        """Take `network`, start from a weight file, if there is one, and say what fitted."""
        self.network = network
        self._begin_evaluation()
        if weights:
            rank_zero_info(str(load_weights(network, weights)))

    @property
    def iou_types(self) -> tuple[Literal["box", "mask"], ...]:
        """What is evaluated."""
        return ("box", "mask") if self.network.with_masks else ("box",)

    def setup(self, stage: str) -> None:
        """Compare classes and kind of annotations with those of the data; raises UserError."""
        data: Any = getattr(self._trainer, "datamodule", None)
        if data is None:
            return
        fits = data.num_classes == self.num_classes
        expect("model.num_classes", self.num_classes, fits, f"the data's {data.num_classes}")
        if self.network.with_masks and not data.with_masks:
            raise UserError("data.with_masks: false was given, but the model learns and predicts masks; set it to true")

    # -- training -------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Sum of the detector's loss terms of one batch."""
        terms = self.network(batch["image"], self._targets(batch))
        loss = self.with_loss_terms(torch.stack([term.float() for term in terms.values()]).sum())
        self.log("train/loss", loss, prog_bar=True)
        for name, term in terms.items():
            if "." not in name and name != "loss_untouched":  # not those of every decoder layer
                self.log(f"train/{name}", term)
        return loss

    def _targets(self, batch: dict[str, Any]) -> list[Target]:
        names: tuple[Literal["boxes", "labels", "masks"], ...] = ("boxes", "labels")
        names += ("masks",) if self.network.with_masks else ()
        return [{name: batch[name][i] for name in names} for i in range(len(batch["id"]))]  # type: ignore[misc]

    # -- evaluation -----------------------------------------------------------------------------------------------

    def _begin_evaluation(self) -> None:
        self._metrics = DetectionMetrics(self.iou_types)
        self._errors = ErrorCounts(self.num_classes)
        self._extremes = Extremes(PICTURES)

    def records(self, batch: dict[str, Any]) -> dict[str, Record]:
        """What is found in the images of a batch, by id; computed in float32."""
        with torch.autocast(self.device.type, enabled=False):
            return dict(zip(batch["id"], self.network.predict(batch["image"], batch["size"]), strict=True))

    def evaluation_step(self, batch: dict[str, Any], stage: str) -> None:
        """Keep the records of one batch, count mistakes and keep the best and worst images."""
        truths = self._truths_of(stage)
        for i, (id, record) in enumerate(self.records(batch).items()):
            self._metrics.update(id, record)
            truth = truths[id]
            matches = match_image(record, truth)
            self._errors.add(matches)
            make = functools.partial(small_copies, batch["image"][i], batch["size"][i], record, truth, matches)
            self._extremes.add(id, matches.score, make)

    def _truths_of(self, stage: str) -> dict[str, Truth]:
        """The annotated objects, crowds included, by image id."""
        if stage not in self._truths:
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            content = data.ground_truth(stage)
            grouped: dict[str, list[dict[str, Any]]] = {str(image["id"]): [] for image in content["images"]}
            for annotation in content["annotations"]:
                grouped[str(annotation["image_id"])].append(annotation)
            self._truths[stage] = {
                id: Truth.of(annotations, data.categories, self.network.with_masks)
                for id, annotations in grouped.items()
            }
        return self._truths[stage]

    def evaluation_results(self, stage: str) -> dict[str, float | Tensor]:
        """COCO's average precisions and recalls of the epoch; keeps what the report shows."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        metrics, errors, extremes = self._metrics, self._errors, self._extremes
        self._begin_evaluation()
        if self.trainer.sanity_checking:  # of a few images, which would be compared with the whole ground truth
            return {}
        results = metrics.compute(data.ground_truth(stage), data.categories.ids)
        best, worst = extremes.gather()
        labels = np.concatenate([truth.labels[~truth.crowd] for truth in self._truths_of(stage).values()])
        self._last = {
            **{name: results[name] for name in ("bbox", "segm") if name in results},
            "num_truths": np.bincount(labels, minlength=self.num_classes),
            "errors": errors.gather(),
            "best": best,
            "worst": worst,
        }
        return {name: value for name, value in results.items() if isinstance(value, float)}

    def report_parts(self, datamodule: LightningDataModule) -> ReportParts:
        """Tables of classes, sizes and mistakes, curves, best and worst images."""
        data: Any = datamodule
        return detection_report(self._last, list(data.class_names), data.palette) if self._last else ReportParts()

    def example_input(self) -> Tensor:
        """One image of 800 x 1280 pixels, of which the papers give the cost, or smaller where the data's are."""
        data: Any = getattr(self._trainer, "datamodule", None)
        height, width = EXAMPLE_SIZE
        if data is not None:
            height, width = min(height, data.test_short_side), min(width, data.test_max_long_side)
        return torch.zeros(1, 3, height, width, device=self.device)

    # -- predictions ----------------------------------------------------------------------------------------------

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Record]:
        """What is found in the images of one batch, by id."""
        return self.records(batch)

    def prediction_files(self, records: Mapping[str, Record]) -> Iterator[tuple[str, bytes]]:
        """``predictions.json`` in COCO's format of results: official category ids, boxes as x, y, width, height.

        `image_id` is the id of the annotation file, or, for a folder of images, the path of the image in it.
        """
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        rows = []
        for id, record in records.items():
            image_id: int | str = int(id) if data.images is None else id
            categories = data.categories.to_official(record["labels"].tolist())
            corners = record["boxes"].astype(np.float64)
            boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).round(BOX_DIGITS)
            for i, (category, box, score) in enumerate(zip(categories, boxes, record["scores"], strict=True)):
                row = {"image_id": image_id, "category_id": category, "bbox": box.tolist()}
                row["score"] = round(float(score), SCORE_DIGITS)
                if record["masks"] is not None:
                    mask = record["masks"][i]
                    row["segmentation"] = {"size": list(mask["size"]), "counts": mask["counts"].decode()}
                rows.append(row)
        lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        yield "predictions.json", f"[\n{lines}\n]\n".encode(errors="surrogateescape")


class TorchvisionDetection(DetectionModule):
    """RetinaNet, Faster R-CNN or Mask R-CNN of torchvision; needs nothing of OpenMMLab.

    Args:
        num_classes: Number of classes K; the command line takes it from the data.
        detector: ``retinanet``, ``faster_rcnn`` or ``mask_rcnn``.
        backbone: Any timm model with maps of strides 4, 8, 16, 32.
        backbone_norm: `batch` normalisation or `frozen`.
        backbone_options: Further arguments of the backbone.
        pretrained: Start the backbone from timm's ImageNet weights.
        drop_path_rate: Stochastic depth of the backbone; None keeps the model's default.
        weights: A backbone's weights, or a checkpoint of ours to start from.
        fpn_channels: Width of the feature pyramid, and of the heads.
        levels: First and last level l of the pyramid, of stride 2^l; None takes 3 to 7 for RetinaNet, 2 to 6 else.
        anchor_scale: Side of a level's smallest anchors in its strides; None takes 4 for RetinaNet, 8 else.
        head_convs: 3 x 3 convolutions in each branch of RetinaNet's head, or in Mask R-CNN's mask head.
        head_norm: Group normalisation in them and in the feature pyramid, for trainings from scratch.
        options: Numbers for torchvision's class, e.g. ``score_thresh`` or ``box_batch_size_per_image``.
        optim: Optimizer, schedule and clipping.
        ema_decay: Decay of the moving average of the weights; None trains without.
    """

    def __init__(
        self,
        num_classes: int,
        detector: Literal["retinanet", "faster_rcnn", "mask_rcnn"] = "retinanet",
        backbone: str = "resnet50",
        backbone_norm: Literal["frozen", "batch"] = "frozen",
        backbone_options: dict[str, Any] | None = None,
        pretrained: bool = False,
        drop_path_rate: float | None = None,
        weights: str | None = None,
        fpn_channels: int = 256,
        levels: tuple[int, int] | None = None,
        anchor_scale: float | None = None,
        head_convs: int = 4,
        head_norm: bool = False,
        options: dict[str, Any] | None = None,
        optim: OptimConfig | None = None,
        ema_decay: float | None = None,
    ) -> None:
        arguments = dict(locals())
        super().__init__(num_classes, optim, ema_decay)
        self.remember_hyperparameters(arguments)
        features = _backbone(backbone, backbone_norm, pretrained and not weights, drop_path_rate, backbone_options)
        network = TorchvisionNetwork(
            features,
            detector,
            num_classes,
            fpn_channels=fpn_channels,
            levels=levels,
            anchor_scale=anchor_scale,
            head_convs=head_convs,
            head_norm=head_norm,
            options=options,
        )
        self.set_network(network, weights)


class MMDetection(DetectionModule):
    """A detector of mmdetection on any backbone, with its paper's settings; needs the extra openmmlab.

    Args:
        num_classes: Number of classes K; the command line takes it from the data.
        detector: ``retinanet``, ``faster_rcnn``, ``mask_rcnn``, ``cascade_mask_rcnn``, ``fcos``, ``atss``,
            ``mask2former``, ``deformable_detr`` or ``dino``.
        backbone: Any timm model with maps of strides 4, 8, 16, 32.
        backbone_norm: `batch` normalisation or `frozen`.
        backbone_options: Further arguments of the backbone.
        pretrained: Start the backbone from timm's ImageNet weights.
        drop_path_rate: Stochastic depth of the backbone; None keeps the model's default.
        weights: Released detectors of LIT and LITv2, a file of mmdetection, a backbone's weights, or a checkpoint of
            ours to start from.
        options: Values to replace in mmdetection's dictionary of the model, e.g. ``{test_cfg: {score_thr: 0.3}}``.
        optim: Optimizer, schedule and clipping.
        ema_decay: Decay of the moving average of the weights; None trains without.
    """

    def __init__(
        self,
        num_classes: int,
        detector: str = "retinanet",
        backbone: str = "resnet50",
        backbone_norm: Literal["frozen", "batch"] = "frozen",
        backbone_options: dict[str, Any] | None = None,
        pretrained: bool = False,
        drop_path_rate: float | None = None,
        weights: str | None = None,
        options: dict[str, Any] | None = None,
        optim: OptimConfig | None = None,
        ema_decay: float | None = None,
    ) -> None:
        arguments = dict(locals())
        expect("model.detector", detector, detector in MODELS, f"one of {', '.join(MODELS)}")
        super().__init__(num_classes, optim, ema_decay)
        self.remember_hyperparameters(arguments)
        features: Any = _backbone(backbone, backbone_norm, pretrained and not weights, drop_path_rate, backbone_options)
        model = model_dict(detector, features.channels, num_classes, options or {})
        freeze_unused_norms(features, model["neck"].get("start_level", 0) if "neck" in model else 0)
        self.set_network(MMDetNetwork(build_detector(model, features), NormalizeAndPad()), weights)


class MMDetectionConfig(DetectionModule):
    """What a configuration file of mmdetection calls its model; needs the extra openmmlab.

    Data, evaluation and optimizer are this project's: of the file only `model` is used, without the weights that it
    would download, and with the data's number of classes.

    Args:
        num_classes: Number of classes K; the command line takes it from the data.
        config: The file, or ``mmdet::`` and the name of one that comes with mmdetection. A checkpoint holds its model.
        allow_config_code: Read another file than mmdetection's own. Such a file is a program: it runs when it is read.
        weights: A file of mmdetection, a backbone's weights, or a checkpoint of ours to start from.
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
        optim: OptimConfig | None = None,
        ema_decay: float | None = None,
        model: dict[str, Any] | None = None,
    ) -> None:
        arguments = dict(locals())
        super().__init__(num_classes, optim, ema_decay)
        from tasks.core.openmmlab.config import read_model  # needs the extra openmmlab
        from tasks.detection.mmdet_config import network_of

        model = model or read_model(config, "mmdet", allow_config_code)
        self.remember_hyperparameters({**arguments, "model": model})
        self.set_network(network_of(model, num_classes), weights)


def _backbone(
    name: str,
    norm: Literal["frozen", "batch"],
    pretrained: bool,
    drop_path_rate: float | None,
    options: dict[str, Any] | None,
) -> nn.Module:
    try:
        return create_features(
            name,
            pretrained=pretrained,
            norm=norm,
            drop_path_rate=drop_path_rate,
            flavour="detection",
            **(options or {}),
        )
    except (ValueError, RuntimeError) as error:  # says what is wrong with the name, or that no weights were found
        raise UserError(f"model.backbone: {error}") from error
    except TypeError as error:
        raise UserError(f"model.backbone_options: {name!r} does not take them: {error}") from error
