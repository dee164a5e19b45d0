"""The LightningModule of classification: losses, evaluation, predictions and the parts of the report."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from backbones.spvit_architecture import Architecture
from tasks.classification.distillation import DistillationConfig, Teacher, distillation_loss
from tasks.classification.metrics import ClassificationMetrics
from tasks.classification.network import create_classifier
from tasks.classification.report import Case, classification_report, distinct, restored
from tasks.classification.weights import load_weights
from tasks.core.errors import UserError, expect
from tasks.core.evaluation import Extremes
from tasks.core.module import TaskModule
from tasks.core.optim import OptimConfig
from tasks.core.report import ReportParts

PICTURES = 8  # best and worst images in the report, each
TOP = 5  # predictions written for each image
SCALARS = ("top1", "top5", "macro_f1", "mean_class_accuracy", "ece", "loss")


class Classification(TaskModule):
    """Any backbone as a classifier, trained with the recipes of DeiT, LIT and HVT.

    Args:
        num_classes: Number of classes K; the command line takes it from the data.
        backbone: Any timm model, or one of ours.
        img_size: Side of the images, for models that are made for one size; the command line takes it from the data.
        pretrained: Start from timm's ImageNet weights.
        weights: An official release, timm's weights or a checkpoint of ours to start from; a classifier for other
            classes is left out.
        drop_path_rate: Stochastic depth; None keeps the model's default.
        drop_rate: Dropout before the classifier; None keeps the model's default.
        grad_checkpointing: Compute activations again in the backward pass instead of keeping them.
        backbone_options: Further arguments of the model, e.g. its depths.
        label_smoothing: Share of the target that is spread over all classes.
        mixup: alpha of mixup (arXiv 1710.09412), 0 for none. Each batch is mixed with its reverse; of an odd batch the
            last image stays as it is.
        cutmix: alpha of cutmix (arXiv 1905.04899), 0 for none. With both, each batch gets one of them.
        mixup_switch_prob: Probability of cutmix where both are on.
        distillation: Learn from a teacher too.
        optim: Optimizer, schedule and clipping.
        ema_decay: Decay of the moving average of the weights; None trains without.
    """

    task = "classification"
    monitor = "val/top1"
    from_data: ClassVar[Mapping[str, str]] = {**TaskModule.from_data, "image_size": "img_size"}

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet50",
        img_size: int | None = None,
        pretrained: bool = False,
        weights: str | None = None,
        drop_path_rate: float | None = None,
        drop_rate: float | None = None,
        grad_checkpointing: bool = False,
        backbone_options: dict[str, Any] | None = None,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mixup_switch_prob: float = 0.5,
        distillation: DistillationConfig | None = None,
        optim: OptimConfig | None = None,
        ema_decay: float | None = None,
    ) -> None:
        arguments = dict(locals())
        for name in ("drop_path_rate", "drop_rate", "label_smoothing"):
            value = arguments[name]
            expect(f"model.{name}", value, value is None or 0 <= value < 1, "a number of at least 0 and below 1")
        for name in ("mixup", "cutmix"):
            expect(f"model.{name}", arguments[name], arguments[name] >= 0, "at least 0")
        expect("model.mixup_switch_prob", mixup_switch_prob, 0 <= mixup_switch_prob <= 1, "a probability")
        expect("model.num_classes", num_classes, num_classes > 0, "at least 1")
        super().__init__(optim, ema_decay)
        if isinstance(file := (backbone_options or {}).get("architecture"), str):  # the checkpoint needs no other file
            try:
                plain = Architecture.read(file).to_dict()
            except ValueError as error:
                raise UserError(f"model.backbone_options.architecture: {error}") from None
            arguments["backbone_options"] = {**(backbone_options or {}), "architecture": plain}
        self.remember_hyperparameters(arguments)
        if isinstance(distillation, Mapping):  # a checkpoint holds plain values
            distillation = DistillationConfig(**distillation)
        self.num_classes = num_classes
        self.img_size = img_size
        self.distillation = distillation
        self.teacher: Teacher | None = None
        rates = {"drop_path_rate": drop_path_rate, "drop_rate": drop_rate}
        self.network = create_classifier(
            backbone,
            num_classes,
            img_size=img_size,
            pretrained=pretrained and not weights,
            options={**{name: rate for name, rate in rates.items() if rate is not None}, **(backbone_options or {})},
        )
        network: Any = self.network
        if grad_checkpointing:
            try:
                network.set_grad_checkpointing(True)
            except (AttributeError, AssertionError):
                raise UserError(f"model.grad_checkpointing: {backbone!r} has no gradient checkpointing") from None
        if distillation and hasattr(network, "set_distilled_training"):
            network.set_distilled_training(True)
        self.label_smoothing = label_smoothing
        self.mixup: Mixup | None = None
        self.criterion: nn.Module = LabelSmoothingCrossEntropy(label_smoothing)
        if mixup or cutmix:
            self.mixup = Mixup(
                mixup, cutmix, switch_prob=mixup_switch_prob, label_smoothing=label_smoothing, num_classes=num_classes
            )
            self.criterion = SoftTargetCrossEntropy()
        self.metrics = nn.ModuleDict(
            {f"{stage}_metrics": ClassificationMetrics(num_classes) for stage in ("val", "test")}
        )
        self._extremes = Extremes(PICTURES)
        self._last: dict[str, Any] = {}
        if weights:
            rank_zero_info(str(load_weights(self.network, weights)))

    # -- training -------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Compare the classes with those of the data and read the teacher of a training; raises UserError."""
        data = getattr(self._trainer, "datamodule", None)
        if data is not None:
            fits = data.num_classes == self.num_classes
            expect("model.num_classes", self.num_classes, fits, f"the data's {data.num_classes}")
        if stage == "fit" and self.distillation and self.teacher is None:
            self.teacher = Teacher(self.distillation, self.num_classes, self.img_size)

    def on_fit_start(self) -> None:
        """Bring the teacher to this process's device."""
        super().on_fit_start()
        if self.teacher:
            self.teacher.network.to(self.device)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Cross-entropy against the mixed labels, and against the teacher."""
        images, targets = self._mixed(batch["image"], batch["label"])
        outputs = self.network(images)
        # A model with a head for distillation returns the logits of both in training.
        logits, distilled = outputs if isinstance(outputs, tuple) else (outputs, outputs)
        loss = self.criterion(logits, targets)
        if self.teacher:
            assert self.distillation is not None
            learned = distillation_loss(distilled, self.teacher.logits(images), self.distillation)
            self.log("train/loss_labels", loss)
            self.log("train/loss_distillation", learned)
            loss = (1 - self.distillation.alpha) * loss + self.distillation.alpha * learned
        loss = self.with_loss_terms(loss)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def _mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images and targets of a batch: class numbers, or probabilities (B, K) where batches are mixed."""
        if self.mixup is None:
            return images, labels
        targets = mixup_target(labels, self.num_classes, smoothing=self.label_smoothing)
        even = len(images) - len(images) % 2  # timm mixes an even number, in place
        if even:
            images[:even], targets[:even] = self.mixup(images[:even], labels[:even])
        return images, targets

    # -- evaluation -----------------------------------------------------------------------------------------------

    def evaluation_step(self, batch: dict[str, Any], stage: str) -> None:
        """Count the predictions of one batch and keep the best and worst images.

        Equal for any number of processes: the datamodule makes the same batches for each, and metrics are integers.
        """
        if not batch["id"]:
            return
        metrics: Any = self.metrics[f"{stage}_metrics"]
        logits, labels = self.network(batch["image"]).float(), batch["label"]
        metrics.update(logits, labels)
        probabilities = logits.softmax(1)
        chances, predicted = probabilities.gather(1, labels[:, None])[:, 0].tolist(), logits.argmax(1).tolist()
        for i, (id, label) in enumerate(zip(batch["id"], labels.tolist(), strict=True)):

            def payload(i: int = i, label: int = label) -> Case:
                data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
                picture = restored(batch["image"][i], data.mean, data.std)
                return Case(picture, label, predicted[i], float(probabilities[i, predicted[i]]))

            self._extremes.add(id, chances[i], payload)

    def evaluation_results(self, stage: str) -> dict[str, float | Tensor]:
        """The metrics of the epoch; keeps what the report shows."""
        metrics: Any = self.metrics[f"{stage}_metrics"]
        results = metrics.compute()
        best, worst = self._extremes.gather()
        self._last = {**{name: value.numpy() for name, value in results.items()}, "best": best, "worst": worst}
        metrics.reset()
        self._extremes = Extremes(PICTURES)
        return {name: results[name] for name in SCALARS}

    def example_input(self) -> Tensor:
        """One image of the data's size."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        return torch.zeros(1, 3, data.image_size, data.image_size, device=self.device)

    def report_parts(self, datamodule: LightningDataModule) -> ReportParts:
        """Tables of classes and confused pairs, reliability diagram, confusion matrix, best and worst images."""
        data: Any = datamodule
        return classification_report(self._last, distinct(data.class_names)) if self._last else ReportParts()

    # -- predictions ----------------------------------------------------------------------------------------------

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, list[tuple[int, float]]]:
        """The most probable classes of each image by id, at most five: (class number, probability), best first."""
        if not batch["id"]:
            return {}
        logits = self.network(batch["image"]).float()
        order = logits.sort(dim=1, descending=True, stable=True).indices[:, :TOP]
        probabilities = logits.softmax(1).gather(1, order)
        return {
            id: list(zip(classes, values, strict=True))
            for id, classes, values in zip(batch["id"], order.tolist(), probabilities.tolist(), strict=True)
        }

    def prediction_files(self, records: Mapping[str, list[tuple[int, float]]]) -> Iterator[tuple[str, bytes]]:
        """``predictions.csv``: a row per image with the names and probabilities of its classes."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        names = distinct(data.class_names)
        columns = [(f"class_{i}", f"probability_{i}") for i in range(1, min(TOP, self.num_classes) + 1)]
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["image", *(column for pair in columns for column in pair)])
        for id, classes in sorted(records.items()):
            writer.writerow([id, *(cell for c, probability in classes for cell in (names[c], f"{probability:.6f}"))])
        # File names that are no valid Unicode keep their bytes.
        yield "predictions.csv", text.getvalue().encode(errors="surrogateescape")
