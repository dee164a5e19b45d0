"""Segmentors of mmsegmentation behind this task's interface: batches become its data samples, logits come back."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tasks.core.errors import UserError
from tasks.core.preprocess import IMAGENET_MEAN, IMAGENET_STD, NormalizeAndPad
from tasks.segmentation.labels import IGNORE


class MMSegNetwork(nn.Module):
    """A segmentor of mmsegmentation.

    Args:
        segmentor: Built by `build_segmentor`.
        preprocess: What is done to images.
        touch: Let every parameter take part in every loss. Segmentors made from a plain name do so by themselves; what
            any configuration builds is not known.
    """

    def __init__(self, segmentor: nn.Module, preprocess: NormalizeAndPad, touch: bool = False) -> None:
        super().__init__()
        self.segmentor: Any = segmentor
        self.preprocess = preprocess
        self.touch = touch

    def losses(self, images: Tensor, masks: Tensor) -> dict[str, Tensor]:
        """Terms of mmsegmentation's loss of images (B, 3, H, W) in 0..255 and train ids (B, H, W)."""
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample

        from tasks.core.openmmlab.models import loss_terms

        inputs = self.preprocess(images)
        height, width = inputs.shape[-2:]
        labels = F.pad(masks.long(), (0, width - masks.shape[-1], 0, height - masks.shape[-2]), value=IGNORE)
        metas = self._metas(inputs)
        samples = [
            SegDataSample(metainfo=meta, gt_sem_seg=PixelData(data=label[None]))
            for meta, label in zip(metas, labels, strict=True)
        ]
        return loss_terms(self.segmentor.loss(inputs, samples), self.parameters() if self.touch else ())

    def scores(self, images: Tensor) -> Tensor:
        """Class scores (B, K, H, W) of images (B, 3, H, W) in 0..255."""
        inputs = self.preprocess(images)
        height, width = images.shape[-2:]
        return self.segmentor.encode_decode(inputs, self._metas(inputs))[..., :height, :width]

    def forward(self, images: Tensor, masks: Tensor | None = None) -> Any:
        """`losses` with label maps, else `scores`; what hooks on the network see."""
        return self.scores(images) if masks is None else self.losses(images, masks)

    @staticmethod
    def _metas(inputs: Tensor) -> list[dict[str, Any]]:
        """mmsegmentation's descriptions of images that are as large as the batch."""
        size = inputs.shape[-2:]  # as a torch.Size: heads then resize to it whatever else is said
        return [{"img_shape": size, "ori_shape": size, "pad_shape": size} for _ in range(len(inputs))]


def build_network(described: Mapping[str, Any], features: nn.Module | None = None, touch: bool = False) -> MMSegNetwork:
    """Build and initialise what is `described` by mmsegmentation's dictionary; `features` becomes its backbone.

    Raises UserError for what mmsegmentation does not know or refuses, and for a model that is no segmentor of images.
    """
    import_mmseg()
    from mmseg.models.segmentors import DepthEstimator, EncoderDecoder
    from mmseg.registry import MODELS

    from tasks.core.openmmlab.models import build_model

    def refuse(built: nn.Module) -> str | None:
        supported = isinstance(built, EncoderDecoder) and not isinstance(built, DepthEstimator)
        return None if supported else "only EncoderDecoder and CascadeEncoderDecoder are supported"

    model = dict(described)
    preprocess = _preprocess(model.pop("data_preprocessor", None) or {})
    with warnings.catch_warnings():
        # That its mean over pixels counts ignored ones: so do the published results.
        warnings.filterwarnings("ignore", message="Default ``avg_non_ignore`` is False")
        segmentor = build_model("mmsegmentation", MODELS, model, features, refuse)
    return MMSegNetwork(segmentor, preprocess, touch)


def import_mmseg() -> None:
    """Import and register mmsegmentation; raises UserError where the extra is not installed."""
    from tasks.core.openmmlab.models import importing

    with importing("FASeg or SemanticFPN"):
        import mmdet.models  # noqa: F401  (parts of Mask2Former)
        import mmseg.models  # noqa: F401


def _preprocess(options: Mapping[str, Any]) -> NormalizeAndPad:
    """What mmsegmentation's preprocessor does to one image in a test; without options only the normalisation.

    It expects OpenCV's order of channels, we read RGB: unless it turns them the network wants BGR.
    """
    kind = str(options.get("type", "SegDataPreProcessor")).rpartition(".")[2]
    if kind != "SegDataPreProcessor":
        raise UserError(f"model.config: data_preprocessor {kind!r} is not supported, only SegDataPreProcessor")
    if not options:
        return NormalizeAndPad(size_divisor=1)
    return NormalizeAndPad(
        mean=options.get("mean") or IMAGENET_MEAN,
        std=options.get("std") or IMAGENET_STD,
        size_divisor=(options.get("test_cfg") or {}).get("size_divisor") or 1,
        bgr=not (options.get("bgr_to_rgb") or options.get("rgb_to_bgr")),
    )
