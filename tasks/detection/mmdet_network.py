"""Detectors of mmdetection behind this task's interface: batches become its data samples, its results our records."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tasks.core.errors import UserError
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
        inputs = self.preprocess(images)
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        samples = self._samples(inputs, images, sizes)
        for sample, target in zip(samples, targets, strict=True):
            self._annotate(sample, target, inputs)
        # What has no "loss" in its name, such as an accuracy, is for logs.
        terms = {name: value for name, value in self.detector.loss(inputs, samples).items() if "loss" in name}
        losses = {name: _mean(value) for name, value in terms.items()}
        if self.touch:
            first = [parameter.flatten()[0] for parameter in self.parameters() if parameter.requires_grad]
            losses["loss_untouched"] = 0 * torch.stack(first).sum()
        return losses

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
    from mmengine.config import ConfigDict
    from mmengine.registry import DefaultScope

    model = dict(model)
    if features is not None:
        model["backbone"] = {"type": nn.Identity}
    try:
        # Only while it is built: another package's scope may be in use in this process.
        with DefaultScope.overwrite_default_scope("mmdet"):
            detector = MODELS.build(ConfigDict(model))
            if not isinstance(detector, BaseDetector):
                raise TypeError("it is no detector of images")
            detector.init_weights()
    except (KeyError, TypeError, ValueError, AssertionError, AttributeError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"model: mmdetection cannot build {model.get('type')!r}: {reason}") from error
    if features is not None:
        detector.backbone = features
    return detector


def predicts_masks(detector: Any) -> bool:
    """Whether a detector of mmdetection segments what it finds."""
    head = getattr(detector, "bbox_head", None)
    return detector.with_mask or hasattr(detector, "panoptic_head") or hasattr(head, "mask_head")


def import_mmdet() -> None:
    """Import and register mmdetection; raises UserError where the extra is not installed."""
    from tasks.core.openmmlab import install

    install()
    try:
        import mmdet.models  # noqa: F401  (registers its classes)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} cannot be imported: install Frugal with its extra openmmlab, "
            "pip install 'frugal-vision[openmmlab]', or take class TorchvisionDetection"
        ) from error
    from mmengine.logging import MMLogger

    from tasks.detection import mmdet_parts  # noqa: F401  (registers itself)

    for message in HARMLESS:
        warnings.filterwarnings("ignore", message=message)
    # It would list how each parameter was initialised.
    MMLogger.get_current_instance().setLevel(logging.WARNING)


def _mean(value: Tensor | Sequence[Tensor]) -> Tensor:
    if isinstance(value, Tensor):
        return value.mean()
    return torch.stack([part.mean() for part in value]).sum()
