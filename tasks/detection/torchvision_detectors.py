"""RetinaNet, Faster R-CNN and Mask R-CNN of torchvision on any backbone: detection without OpenMMLab.

Losses, box coding and post-processing are torchvision's; anchors, numbers of proposals and of detections are those of
mmdetection's standard configurations. `docs/detection.md` says where the two differ.
"""

from __future__ import annotations

import inspect
import itertools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool

from tasks.core.errors import expect
from tasks.core.preprocess import NormalizeAndPad
from tasks.detection.network import DetectionNetwork, Record, Target, record

BACKBONE_LEVELS = (2, 3, 4, 5)  # strides 4, 8, 16, 32
NORM_GROUPS = 32
MASK_THRESHOLD = 0.5


class TorchvisionNetwork(DetectionNetwork):
    """One of torchvision's detectors on the maps of `features`.

    Args:
        features: Module with `channels` whose forward maps images to a list of maps of strides 4, 8, 16, 32.
        detector: ``retinanet``, ``faster_rcnn`` or ``mask_rcnn``.
        num_classes: Number of classes K.
        fpn_channels: Width of the feature pyramid.
        levels: First and last level l of the pyramid, of stride 2^l; None takes 3 to 7 for RetinaNet, 2 to 6 else.
        anchor_scale: Side of a level's smallest anchors in its strides; None takes 4 for RetinaNet, 8 else.
        head_convs: 3 x 3 convolutions in each branch of RetinaNet's head, or in Mask R-CNN's mask head.
        head_norm: Group normalisation in them and in the feature pyramid.
        options: Further arguments of torchvision's class, plain values.
    """

    def __init__(
        self,
        features: nn.Module,
        detector: str,
        num_classes: int,
        *,
        fpn_channels: int = 256,
        levels: tuple[int, int] | None = None,
        anchor_scale: float | None = None,
        head_convs: int = 4,
        head_norm: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        expect("model.detector", detector, detector in DETECTORS, f"one of {', '.join(DETECTORS)}")
        one_stage = detector == "retinanet"
        first, last = levels or ((3, 7) if one_stage else (2, 6))
        most = 7 if one_stage else 6
        expect("model.levels", levels, 2 <= first <= 5 <= last <= most, f"2 to 5 and 5 to {most}")
        expect("model.head_convs", head_convs, 1 <= head_convs <= 4, "1 to 4")
        self.with_masks = detector == "mask_rcnn"
        self.first_label = 0 if one_stage else 1  # two-stage detectors of torchvision call the background 0
        norm = group_norm if head_norm else None
        pyramid = Pyramid(features, fpn_channels, first, last, convolutions=one_stage, norm=norm)
        scale = anchor_scale or (4.0 if one_stage else 8.0)
        self.detector: Any = DETECTORS[detector](
            pyramid, num_classes, range(first, last + 1), scale, head_convs, norm, dict(options or {})
        )
        self.detector.transform = PrepareImages()

    def losses(self, images: Sequence[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        """Terms of torchvision's loss of images (3, h, w)."""
        shifted = [{**target, "labels": target["labels"] + self.first_label} for target in targets]
        terms = self.detector(list(images), shifted)
        return {f"loss_{name.removeprefix('loss_')}": term for name, term in terms.items()}

    def predict(self, images: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Record]:
        """Detections of images (3, h, w) at their original sizes (H, W)."""
        if len(images) == 0:
            return []
        found = self.detector(list(images))
        return [
            self._record(one, (image.shape[-2], image.shape[-1]), size)
            for one, image, size in zip(found, images, sizes, strict=True)
        ]

    def _record(self, found: dict[str, Tensor], shape: tuple[int, int], size: tuple[int, int]) -> Record:
        (height, width), (original_height, original_width) = shape, size
        ratio = found["boxes"].new_tensor([original_width / width, original_height / height]).repeat(2)
        boxes = found["boxes"] * ratio
        masks = None
        if self.with_masks:
            masks = paste_masks_in_image(found["masks"], boxes, size)[:, 0] >= MASK_THRESHOLD
        return record(boxes, found["scores"], found["labels"] - self.first_label, masks)


class PrepareImages(nn.Module):
    """Takes the place of torchvision's transform, which would resize images once more."""

    def __init__(self) -> None:
        super().__init__()
        self.preprocess = NormalizeAndPad()

    def forward(self, images: list[Tensor], targets: Any = None) -> tuple[ImageList, Any]:
        """Batch of images, with their sizes; targets as they are."""
        return ImageList(self.preprocess(images), [(image.shape[-2], image.shape[-1]) for image in images]), targets

    def postprocess(self, result: Any, image_shapes: Any, original_image_sizes: Any) -> Any:
        """Boxes stay in pixels of the given images."""
        return result


class Pyramid(nn.Module):
    """Backbone and feature pyramid network: levels `first` to `last` by name, "0" being the first.

    Levels above 5 are made by strided convolutions of the last map, or, without `convolutions`, by subsampling P5.
    """

    def __init__(
        self,
        features: nn.Module,
        out_channels: int,
        first: int,
        last: int,
        convolutions: bool,
        norm: Callable[[int], nn.Module] | None,
    ) -> None:
        super().__init__()
        self.body = features
        self.skipped = BACKBONE_LEVELS.index(first)
        self.out_channels = out_channels
        all_channels: Any = features.channels
        channels: list[int] = all_channels[self.skipped :]
        extra: ExtraFPNBlock | None = None
        if last > BACKBONE_LEVELS[-1]:
            count = last - BACKBONE_LEVELS[-1]
            extra = StridedConvolutions(channels[-1], out_channels, count) if convolutions else LastLevelMaxPool()
        self.fpn = FeaturePyramidNetwork(channels, out_channels, extra, norm)
        freeze_unused_norms(features, self.skipped)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Map (B, 3, H, W) to maps (B, C, H / 2^l, W / 2^l)."""
        maps = self.body(images)[self.skipped :]
        levels = self.fpn(OrderedDict((str(i), level) for i, level in enumerate(maps)))
        return OrderedDict((str(i), level) for i, level in enumerate(levels.values()))


class StridedConvolutions(ExtraFPNBlock):
    """RetinaNet's coarse levels, from the backbone's last map: P6 = conv(C5), P7 = conv(relu(P6)), ..."""

    def __init__(self, in_channels: int, out_channels: int, count: int) -> None:
        super().__init__()
        widths = [in_channels, *[out_channels] * count]
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2, padding=1) for before, after in itertools.pairwise(widths)
        )

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """Append the levels to `results`; `x` are the backbone's maps."""
        level = x[-1]
        for i, conv in enumerate(self.convs):
            level = conv(level if i == 0 else F.relu(level))
            results.append(level)
            names.append(f"extra{i}")
        return results, names


def freeze_unused_norms(features: nn.Module, count: int) -> None:
    """Let output norms of the first `count` levels rest: they are computed, but nothing is made of them."""
    for level in range(count):
        norm = getattr(features, f"norm{level}", None)
        if isinstance(norm, nn.LayerNorm) and norm.normalized_shape[-1] == features.channels[level]:  # type: ignore[index]
            norm.requires_grad_(False)


def group_norm(channels: int) -> nn.Module:
    """At least two channels per group."""
    return nn.GroupNorm(min(NORM_GROUPS, channels // 2), channels)


# -- detectors ------------------------------------------------------------------------------------------------------


def _retinanet(
    pyramid: Pyramid,
    num_classes: int,
    levels: Sequence[int],
    scale: float,
    head_convs: int,
    norm: Callable[[int], nn.Module] | None,
    options: dict[str, Any],
) -> nn.Module:
    """RetinaNet (arXiv 1708.02002): three sizes of anchors per octave."""
    sizes = tuple(tuple(scale * 2 ** (level + octave / 3) for octave in range(3)) for level in levels)
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    head: Any = RetinaNetHead(pyramid.out_channels, anchors.num_anchors_per_location()[0], num_classes, norm)
    for branch in (head.classification_head, head.regression_head):
        branch.conv = branch.conv[:head_convs]
    options = _checked(RetinaNet, {"detections_per_img": 100, **options})
    return RetinaNet(pyramid, num_classes, anchor_generator=anchors, head=head, **options)


def _two_stage(
    cls: Any,
    pyramid: Pyramid,
    num_classes: int,
    levels: Sequence[int],
    scale: float,
    head_convs: int,
    norm: Callable[[int], nn.Module] | None,
    options: dict[str, Any],
) -> nn.Module:
    """Faster R-CNN (arXiv 1506.01497) or Mask R-CNN (arXiv 1703.06870): one size of anchors per level."""
    sizes = tuple((scale * 2**level,) for level in levels)
    pooled = [str(i) for i, level in enumerate(levels) if level in BACKBONE_LEVELS]
    width, hidden = pyramid.out_channels, 4 * pyramid.out_channels
    parts: dict[str, Any] = {
        "rpn_anchor_generator": AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        "box_roi_pool": MultiScaleRoIAlign(pooled, output_size=7, sampling_ratio=2),
        "box_head": TwoMLPHead(width * 7**2, hidden),
        "box_predictor": FastRCNNPredictor(hidden, num_classes + 1),
    }
    if cls is MaskRCNN:
        parts["mask_roi_pool"] = MultiScaleRoIAlign(pooled, output_size=14, sampling_ratio=2)
        parts["mask_head"] = MaskRCNNHeads(width, [width] * head_convs, 1, norm)
        parts["mask_predictor"] = MaskRCNNPredictor(width, width, num_classes + 1)
    return cls(pyramid, **parts, **_checked(cls, {"rpn_post_nms_top_n_train": 1000, **options}))


def _checked(cls: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The options, if they are numbers that torchvision's class takes."""
    numbers = [name for name, p in inspect.signature(cls).parameters.items() if isinstance(p.default, int | float)]
    known = [name for name in numbers if name not in ("min_size", "max_size")]  # images are not resized here
    for name, value in options.items():
        expect(f"model.options.{name}", value, name in known, f"one of the numbers {', '.join(known)}")
        expect(f"model.options.{name}", value, isinstance(value, int | float), "a number")
    return options


DETECTORS: Mapping[str, Callable[..., nn.Module]] = {
    "retinanet": _retinanet,
    "faster_rcnn": partial(_two_stage, FasterRCNN),
    "mask_rcnn": partial(_two_stage, MaskRCNN),
}
