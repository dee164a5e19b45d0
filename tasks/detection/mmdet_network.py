"""Detectors of mmdetection behind this task's interface: batches become its data samples, its results our records."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tasks.core.preprocess import NormalizeAndPad
from tasks.detection.network import DetectionNetwork, Record, Target, record

# What mmdetection's use of PyTorch and of itself warns about.
HARMLESS = (r"torch\.meshgrid", r".*`num_anchors` is deprecated", r"To copy construct from a tensor")


class MMDetNetwork(DetectionNetwork):
    """A detector of mmdetection.

    Args:
        detector: Built by `build_detector`.
        preprocess: What is done to images.
        touch: Let every parameter take part in every loss. Detectors made from a plain name do so by themselves; what
            any configuration builds is not known.
    """

    def __init__(self, detector: nn.Module, preprocess: NormalizeAndPad, touch: bool = False) -> None:
        super().__init__()
        self.detector: Any = detector
        self.preprocess = preprocess
        self.touch = touch
        self.with_masks = predicts_masks(detector)

    def losses(self, images: Sequence[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        """Terms of mmdetection's loss of images (3, h, w)."""
        from tasks.core.openmmlab.models import loss_terms

        inputs = self.preprocess(images)
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        samples = self._samples(inputs, images, sizes)
        for sample, target in zip(samples, targets, strict=True):
            self._annotate(sample, target, inputs)
        return loss_terms(self.detector.loss(inputs, samples), self.parameters() if self.touch else ())

    def predict(self, images: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Record]:
        """Detections of images (3, h, w) at their original sizes (H, W)."""
        if len(images) == 0:
            return []
        inputs = self.preprocess(images)
        samples = self.detector.predict(inputs, self._samples(inputs, images, sizes), rescale=True)
        return [self._record(sample.pred_instances, size) for sample, size in zip(samples, sizes, strict=True)]

    def _samples(self, inputs: Tensor, images: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Any]:
        """mmdetection's descriptions of images that were resized from `sizes`."""
        from mmdet.structures import DetDataSample

        batch_shape = (inputs.shape[-2], inputs.shape[-1])
        samples = []
        for image, (original_height, original_width) in zip(images, sizes, strict=True):
            height, width = image.shape[-2:]
            description = {
                "img_shape": (height, width),
                "ori_shape": (original_height, original_width),
                "pad_shape": batch_shape,
                "batch_input_shape": batch_shape,
                "scale_factor": (width / original_width, height / original_height),
            }
            samples.append(DetDataSample(metainfo=description))
        return samples

    def _annotate(self, sample: Any, target: Target, inputs: Tensor) -> None:
        from mmdet.structures.mask import BitmapMasks
        from mmengine.structures import InstanceData

        instances = InstanceData(bboxes=target["boxes"], labels=target["labels"])
        if self.with_masks:
            masks = target["masks"]
            small = BitmapMasks(masks.cpu().numpy(), masks.shape[-2], masks.shape[-1])
            instances.masks = small.pad((inputs.shape[-2], inputs.shape[-1]), pad_val=0)
        sample.gt_instances = instances

    def _record(self, found: Any, size: tuple[int, int]) -> Record:
        boxes = found.bboxes if isinstance(found.bboxes, Tensor) else found.bboxes.tensor
        masks = None
        if self.with_masks:
            # no array, no shape: what an image without detections has
            masks = torch.as_tensor(found.masks).reshape(-1, *size).bool()
        return record(boxes, found.scores, found.labels, masks)


def build_detector(model: Mapping[str, Any], features: nn.Module | None = None) -> nn.Module:
    """Build and initialise a detector from mmdetection's dictionary; `features` becomes its backbone.

    Raises UserError for what mmdetection does not know or refuses.
    """
    import_mmdet()
    from mmdet.models.detectors import BaseDetector
    from mmdet.registry import MODELS

    from tasks.core.openmmlab.models import build_model

    def refuse(built: nn.Module) -> str | None:
        return None if isinstance(built, BaseDetector) else "it is no detector of images"

    return build_model("mmdetection", MODELS, model, features, refuse)


def predicts_masks(detector: Any) -> bool:
    """Whether a detector of mmdetection segments what it finds."""
    head = getattr(detector, "bbox_head", None)
    return detector.with_mask or hasattr(detector, "panoptic_head") or hasattr(head, "mask_head")


def import_mmdet() -> None:
    """Import and register mmdetection; raises UserError where the extra is not installed."""
    from tasks.core.openmmlab.models import importing

    with importing("TorchvisionDetection"):
        import mmdet.models  # noqa: F401  (registers its classes)
    from tasks.detection import mmdet_parts  # noqa: F401  (registers itself)

    for message in HARMLESS:
        warnings.filterwarnings("ignore", message=message)
