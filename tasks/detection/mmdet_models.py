"""Detectors of mmdetection on any backbone: the papers' standard settings, as arguments of mmdetection's classes.

Each function gives the dictionary from which mmdetection builds a detector, without its backbone. What is left out is
the default of mmdetection's class. Settings are those of the 12-epoch COCO configurations (Deformable DETR and
Mask2Former: 50 epochs).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tasks.detection.mmdet_queries import FOCAL, WIDTH, Model, deformable_detr, dino, mask2former

DENSE_STRIDES = [8, 16, 32, 64, 128]
RPN_STRIDES = [4, 8, 16, 32, 64]


def model_dict(detector: str, channels: Sequence[int], num_classes: int, options: Mapping[str, Any]) -> Model:
    """The detector `detector` for maps of `channels` and K classes; `options` replaces single values in it."""
    from tasks.core.openmmlab.config import merge  # needs the extra openmmlab

    model = MODELS[detector](list(channels), num_classes)
    merge(model, options)
    return model


# -- one stage ------------------------------------------------------------------------------------------------------


def retinanet(channels: list[int], num_classes: int) -> Model:
    """RetinaNet (arXiv 1708.02002)."""
    head = {
        "type": "RetinaHead",
        "num_classes": num_classes,
        "in_channels": WIDTH,
        "stacked_convs": 4,
        "anchor_generator": {
            "type": "AnchorGenerator",
            "octave_base_scale": 4,
            "scales_per_octave": 3,
            "ratios": [0.5, 1.0, 2.0],
            "strides": DENSE_STRIDES,
        },
        "bbox_coder": _deltas(1.0, 1.0),
        "loss_cls": {**FOCAL},
        "loss_bbox": {"type": "L1Loss"},
    }
    return {
        "type": "RetinaNet",
        "neck": _fpn(channels, start_level=1, add_extra_convs="on_input"),
        "bbox_head": head,
        "train_cfg": {"assigner": _assigner(0.5, 0.4, 0.0), "sampler": {"type": "PseudoSampler"}, **_ANCHOR_LOSS},
        "test_cfg": _dense_test(0.5),
    }


def fcos(channels: list[int], num_classes: int) -> Model:
    """FCOS (arXiv 1904.01355), with group normalisation in the head."""
    head = {"type": "FCOSHead", "num_classes": num_classes, "in_channels": WIDTH, "strides": DENSE_STRIDES}
    neck = _fpn(channels, start_level=1, add_extra_convs="on_output", relu_before_extra_convs=True)
    return {"type": "FCOS", "neck": neck, "bbox_head": head, "test_cfg": _dense_test(0.5)}


def atss(channels: list[int], num_classes: int) -> Model:
    """ATSS (arXiv 1912.02424): RetinaNet's head with one anchor, assigned by statistics of the overlaps."""
    head = {
        "type": "ATSSHead",
        "num_classes": num_classes,
        "in_channels": WIDTH,
        "anchor_generator": {
            "type": "AnchorGenerator",
            "octave_base_scale": 8,
            "scales_per_octave": 1,
            "ratios": [1.0],
            "strides": DENSE_STRIDES,
        },
        "bbox_coder": _deltas(0.1, 0.2),
        "loss_cls": {**FOCAL},
        "loss_bbox": {"type": "GIoULoss", "loss_weight": 2.0},
        "loss_centerness": {"type": "CrossEntropyLoss", "use_sigmoid": True},
    }
    return {
        "type": "ATSS",
        "neck": _fpn(channels, start_level=1, add_extra_convs="on_output"),
        "bbox_head": head,
        "train_cfg": {"assigner": {"type": "ATSSAssigner", "topk": 9}, **_ANCHOR_LOSS},
        "test_cfg": _dense_test(0.6),
    }


# -- two stages -----------------------------------------------------------------------------------------------------


def faster_rcnn(channels: list[int], num_classes: int) -> Model:
    """Faster R-CNN (arXiv 1506.01497) with a feature pyramid network (arXiv 1612.03144)."""
    boxes = _box_head(num_classes, _deltas(0.1, 0.2), {"type": "L1Loss"}, reg_class_agnostic=False)
    roi_head = {"type": "StandardRoIHead", "bbox_roi_extractor": _roi_extractor(7), "bbox_head": boxes}
    return {
        "type": "FasterRCNN",
        "neck": _fpn(channels),
        "rpn_head": _rpn_head({"type": "L1Loss"}),
        "roi_head": roi_head,
        "train_cfg": _two_stage_train(_rcnn_train(0.5, match_low_quality=False), max_per_img=1000, allowed_border=-1),
        "test_cfg": _two_stage_test(),
    }


def mask_rcnn(channels: list[int], num_classes: int) -> Model:
    """Mask R-CNN (arXiv 1703.06870)."""
    model = faster_rcnn(channels, num_classes)
    model["type"] = "MaskRCNN"
    _add_masks(model, num_classes)
    rcnn = _rcnn_train(0.5, match_low_quality=True)
    model["train_cfg"] = _two_stage_train({**rcnn, "mask_size": 28}, max_per_img=1000, allowed_border=-1)
    return model


def cascade_mask_rcnn(channels: list[int], num_classes: int) -> Model:
    """Cascade Mask R-CNN (arXiv 1906.09756): three box heads for rising overlap thresholds."""
    deviations, thresholds = ((0.1, 0.2), (0.05, 0.1), (0.033, 0.067)), (0.5, 0.6, 0.7)
    smooth = {"type": "SmoothL1Loss", "beta": 1.0}
    roi_head = {
        "type": "CascadeRoIHead",
        "num_stages": 3,
        "stage_loss_weights": [1, 0.5, 0.25],
        "bbox_roi_extractor": _roi_extractor(7),
        "bbox_head": [_box_head(num_classes, _deltas(*pair), {**smooth}, True) for pair in deviations],
    }
    rcnn = [{**_rcnn_train(iou, match_low_quality=False), "mask_size": 28} for iou in thresholds]
    model = {
        "type": "CascadeRCNN",
        "neck": _fpn(channels),
        "rpn_head": _rpn_head({"type": "SmoothL1Loss", "beta": 1 / 9}),
        "roi_head": roi_head,
        "train_cfg": _two_stage_train(rcnn, max_per_img=2000, allowed_border=0),
        "test_cfg": _two_stage_test(),
    }
    _add_masks(model, num_classes)
    return model


MODELS: Mapping[str, Callable[[list[int], int], Model]] = {
    "retinanet": retinanet,
    "faster_rcnn": faster_rcnn,
    "mask_rcnn": mask_rcnn,
    "cascade_mask_rcnn": cascade_mask_rcnn,
    "fcos": fcos,
    "atss": atss,
    "mask2former": mask2former,
    "deformable_detr": deformable_detr,
    "dino": dino,
}


# -- parts ----------------------------------------------------------------------------------------------------------

_ANCHOR_LOSS = {"allowed_border": -1, "pos_weight": -1, "debug": False}


def _fpn(channels: list[int], **options: Any) -> Model:
    return {"type": "FPN", "in_channels": channels, "out_channels": WIDTH, "num_outs": 5, **options}


def _deltas(centre: float, size: float) -> Model:
    """Offsets of boxes to anchors, divided by the standard deviations of their centres and sizes."""
    return {"type": "DeltaXYWHBBoxCoder", "target_stds": [centre, centre, size, size]}


def _assigner(positive: float, negative: float, least: float, **options: Any) -> Model:
    thresholds = {"pos_iou_thr": positive, "neg_iou_thr": negative, "min_pos_iou": least, "ignore_iof_thr": -1}
    return {"type": "MaxIoUAssigner", **thresholds, **options}


def _sampler(num: int, fraction: float, add_truth: bool) -> Model:
    return {
        "type": "RandomSampler",
        "num": num,
        "pos_fraction": fraction,
        "neg_pos_ub": -1,
        "add_gt_as_proposals": add_truth,
    }


def _nms(threshold: float) -> Model:
    return {"type": "nms", "iou_threshold": threshold}


def _dense_test(iou: float) -> Model:
    return {"nms_pre": 1000, "min_bbox_size": 0, "score_thr": 0.05, "nms": _nms(iou), "max_per_img": 100}


def _rpn_head(loss_bbox: Model) -> Model:
    return {
        "type": "RPNHead",
        "in_channels": WIDTH,
        "feat_channels": WIDTH,
        "anchor_generator": {
            "type": "AnchorGenerator",
            "scales": [8],
            "ratios": [0.5, 1.0, 2.0],
            "strides": RPN_STRIDES,
        },
        "bbox_coder": _deltas(1.0, 1.0),
        "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": True},
        "loss_bbox": loss_bbox,
    }


def _roi_extractor(size: int) -> Model:
    return {
        "type": "SingleRoIExtractor",
        "roi_layer": {"type": "RoIAlign", "output_size": size, "sampling_ratio": 0},
        "out_channels": WIDTH,
        "featmap_strides": RPN_STRIDES[:4],
    }


def _box_head(num_classes: int, bbox_coder: Model, loss_bbox: Model, reg_class_agnostic: bool) -> Model:
    return {
        "type": "Shared2FCBBoxHead",
        "in_channels": WIDTH,
        "fc_out_channels": 1024,
        "roi_feat_size": 7,
        "num_classes": num_classes,
        "bbox_coder": bbox_coder,
        "reg_class_agnostic": reg_class_agnostic,
        "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": False},
        "loss_bbox": loss_bbox,
    }


def _add_masks(model: Model, num_classes: int) -> None:
    model["roi_head"]["mask_roi_extractor"] = _roi_extractor(14)
    model["roi_head"]["mask_head"] = {
        "type": "FCNMaskHead",
        "num_convs": 4,
        "in_channels": WIDTH,
        "conv_out_channels": WIDTH,
        "num_classes": num_classes,
        "loss_mask": {"type": "CrossEntropyLoss", "use_mask": True},
    }
    model["test_cfg"]["rcnn"]["mask_thr_binary"] = 0.5


def _rcnn_train(iou: float, match_low_quality: bool) -> Model:
    assigner = _assigner(iou, iou, iou, match_low_quality=match_low_quality)
    return {"assigner": assigner, "sampler": _sampler(512, 0.25, True), "pos_weight": -1, "debug": False}


def _two_stage_train(rcnn: Model | list[Model], max_per_img: int, allowed_border: int) -> Model:
    assigner = _assigner(0.7, 0.3, 0.3, match_low_quality=True)
    rpn = {**_ANCHOR_LOSS, "assigner": assigner, "sampler": _sampler(256, 0.5, False), "allowed_border": allowed_border}
    proposal = {"nms_pre": 2000, "max_per_img": max_per_img, "nms": _nms(0.7), "min_bbox_size": 0}
    return {"rpn": rpn, "rpn_proposal": proposal, "rcnn": rcnn}


def _two_stage_test() -> Model:
    rpn = {"nms_pre": 1000, "max_per_img": 1000, "nms": _nms(0.7), "min_bbox_size": 0}
    return {"rpn": rpn, "rcnn": {"score_thr": 0.05, "nms": _nms(0.5), "max_per_img": 100}}
