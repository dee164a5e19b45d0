"""Detectors of mmdetection whose transformers decode queries: Deformable DETR, DINO and Mask2Former.

Like `mmdet_models`: dictionaries without a backbone, with the papers' settings.
"""

from __future__ import annotations

from typing import Any

Model = dict[str, Any]

WIDTH = 256
FOCAL = {"type": "FocalLoss", "use_sigmoid": True, "gamma": 2.0, "alpha": 0.25}


def deformable_detr(channels: list[int], num_classes: int) -> Model:
    """Deformable DETR (arXiv 2010.04159), single stage without box refinement."""
    dropout = 0.1
    return {
        "type": "DeformableDETR",
        "num_queries": 300,
        "num_feature_levels": 4,
        "with_box_refine": False,
        "as_two_stage": False,
        "neck": _channel_mapper(channels),
        **_detr_transformer(feedforward=1024, dropout=dropout),
        "positional_encoding": {"num_feats": WIDTH // 2, "normalize": True, "offset": -0.5},
        "bbox_head": _detr_head("DeformableDETRHead", num_classes, focal_weight=2.0),
        "train_cfg": {"assigner": _hungarian_boxes()},
        "test_cfg": {"max_per_img": 100},
    }


def dino(channels: list[int], num_classes: int) -> Model:
    """DINO (arXiv 2203.03605), four scales: two stages, box refinement, denoising queries."""
    return {
        "type": "DINO",
        "num_queries": 900,
        "with_box_refine": True,
        "as_two_stage": True,
        "neck": _channel_mapper(channels),
        **_detr_transformer(feedforward=2048, dropout=0.0),
        "positional_encoding": {"num_feats": WIDTH // 2, "normalize": True, "offset": 0.0, "temperature": 20},
        "bbox_head": _detr_head("DINOHead", num_classes, focal_weight=1.0),
        "dn_cfg": {
            "label_noise_scale": 0.5,
            "box_noise_scale": 1.0,
            "group_cfg": {"dynamic": True, "num_groups": None, "num_dn_queries": 100},
        },
        "train_cfg": {"assigner": _hungarian_boxes()},
        "test_cfg": {"max_per_img": 300},
    }


def mask2former(channels: list[int], num_classes: int) -> Model:
    """Mask2Former (arXiv 2112.01527) for instances: 100 queries, nine decoder layers."""
    attention = {"embed_dims": WIDTH, "num_heads": 8, "dropout": 0.0, "batch_first": True}
    position = {"num_feats": WIDTH // 2, "normalize": True}
    relu = {"type": "ReLU", "inplace": True}

    def feedforward(hidden: int) -> dict[str, Any]:
        return {"embed_dims": WIDTH, "feedforward_channels": hidden, "num_fcs": 2, "ffn_drop": 0.0, "act_cfg": relu}

    pixel_decoder = {
        "type": "MSDeformAttnPixelDecoder",
        "num_outs": 3,
        "norm_cfg": {"type": "GN", "num_groups": 32},
        "act_cfg": {"type": "ReLU"},
        "encoder": {
            "num_layers": 6,
            "layer_cfg": {
                "self_attn_cfg": {**attention, "num_levels": 3, "num_points": 4},
                "ffn_cfg": feedforward(1024),
            },
        },
        "positional_encoding": {**position},
    }
    decoder = {
        "return_intermediate": True,
        "num_layers": 9,
        "layer_cfg": {
            "self_attn_cfg": {**attention},
            "cross_attn_cfg": {**attention},
            "ffn_cfg": feedforward(2048),
        },
        "init_cfg": None,
    }
    head = {
        "type": "Mask2FormerHead",
        "in_channels": channels,
        "strides": [4, 8, 16, 32],
        "feat_channels": WIDTH,
        "out_channels": WIDTH,
        "num_things_classes": num_classes,
        "num_stuff_classes": 0,
        "num_queries": 100,
        "num_transformer_feat_level": 3,
        "pixel_decoder": pixel_decoder,
        "enforce_decoder_input_project": False,
        "positional_encoding": {**position},
        "transformer_decoder": decoder,
        "loss_cls": {
            "type": "CrossEntropyLoss",
            "use_sigmoid": False,
            "loss_weight": 2.0,
            "class_weight": [1.0] * num_classes + [0.1],
        },
        "loss_mask": {"type": "CrossEntropyLoss", "use_sigmoid": True, "loss_weight": 5.0},
        "loss_dice": {"type": "DiceLoss", "activate": True, "naive_dice": True, "eps": 1.0, "loss_weight": 5.0},
    }
    costs = [
        {"type": "ClassificationCost", "weight": 2.0},
        {"type": "CrossEntropyLossCost", "weight": 5.0, "use_sigmoid": True},
        {"type": "DiceCost", "weight": 5.0, "pred_act": True, "eps": 1.0},
    ]
    return {
        "type": "Mask2Former",
        "panoptic_head": head,
        "panoptic_fusion_head": {
            "type": "MaskFormerFusionHead",
            "num_things_classes": num_classes,
            "num_stuff_classes": 0,
            "loss_panoptic": None,
            "init_cfg": None,
        },
        "train_cfg": {
            "num_points": 12544,
            "oversample_ratio": 3.0,
            "importance_sample_ratio": 0.75,
            "assigner": {"type": "HungarianAssigner", "match_costs": costs},
            "sampler": {"type": "MaskPseudoSampler"},
        },
        "test_cfg": {
            "panoptic_on": False,
            "semantic_on": False,
            "instance_on": True,
            "max_per_image": 100,
            "iou_thr": 0.8,
            "filter_low_score": True,
        },
    }


# -- parts ----------------------------------------------------------------------------------------------------------


def _channel_mapper(channels: list[int]) -> Model:
    return {
        "type": "LaterChannelMapper",
        "in_channels": channels[1:],
        "kernel_size": 1,
        "out_channels": WIDTH,
        "act_cfg": None,
        "norm_cfg": {"type": "GN", "num_groups": 32},
        "num_outs": 4,
    }


def _detr_transformer(feedforward: int, dropout: float) -> Model:
    """Encoder and decoder of six layers that attend deformably to four levels."""
    ffn = {"embed_dims": WIDTH, "feedforward_channels": feedforward, "ffn_drop": dropout}
    deformable = {"embed_dims": WIDTH, "num_levels": 4, "dropout": dropout, "batch_first": True}
    own = {"embed_dims": WIDTH, "num_heads": 8, "dropout": dropout, "batch_first": True}
    return {
        "encoder": {"num_layers": 6, "layer_cfg": {"self_attn_cfg": {**deformable}, "ffn_cfg": {**ffn}}},
        "decoder": {
            "num_layers": 6,
            "return_intermediate": True,
            "layer_cfg": {"self_attn_cfg": own, "cross_attn_cfg": {**deformable}, "ffn_cfg": {**ffn}},
            "post_norm_cfg": None,
        },
    }


def _detr_head(kind: str, num_classes: int, focal_weight: float) -> Model:
    return {
        "type": kind,
        "num_classes": num_classes,
        "embed_dims": WIDTH,
        "sync_cls_avg_factor": True,
        "loss_cls": {**FOCAL, "loss_weight": focal_weight},
        "loss_bbox": {"type": "L1Loss", "loss_weight": 5.0},
        "loss_iou": {"type": "GIoULoss", "loss_weight": 2.0},
    }


def _hungarian_boxes() -> Model:
    costs = [
        {"type": "FocalLossCost", "weight": 2.0},
        {"type": "BBoxL1Cost", "weight": 5.0, "box_format": "xywh"},
        {"type": "IoUCost", "iou_mode": "giou", "weight": 2.0},
    ]
    return {"type": "HungarianAssigner", "match_costs": costs}
