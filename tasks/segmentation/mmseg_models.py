"""Segmentors of mmsegmentation on any backbone: the papers' settings, as arguments of mmsegmentation's classes.

Each function gives the dictionary from which mmsegmentation builds a segmentor, without its backbone. What is left out
is the default of mmsegmentation's class. Settings are those of its ADE20K configurations.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Model = dict[str, Any]

BATCH_NORM = {"type": "BN", "requires_grad": True}  # `trainer.sync_batchnorm` makes it one over all processes
WIDTH = 256  # of Mask2Former


def semantic_fpn(channels: Sequence[int], num_classes: int) -> Model:
    """Semantic FPN (arXiv 1901.02446)."""
    head = {"type": "FPNHead", "in_channels": [256] * 4, "feature_strides": [4, 8, 16, 32], "channels": 128}
    return {
        "type": "EncoderDecoder",
        "neck": {"type": "FPN", "in_channels": list(channels), "out_channels": 256, "num_outs": 4},
        "decode_head": {**head, "in_index": [0, 1, 2, 3], **_classifier(num_classes)},
    }


def upernet(channels: Sequence[int], num_classes: int) -> Model:
    """UPerNet (arXiv 1807.10221) with an auxiliary head on the third map."""
    head = {"type": "UPerHead", "in_channels": list(channels), "in_index": [0, 1, 2, 3], "channels": 512}
    auxiliary = {"type": "FCNHead", "in_channels": channels[2], "in_index": 2, "channels": 256, "num_convs": 1}
    return {
        "type": "EncoderDecoder",
        "decode_head": {**head, "pool_scales": [1, 2, 3, 6], **_classifier(num_classes)},
        "auxiliary_head": {**auxiliary, "concat_input": False, **_classifier(num_classes, weight=0.4)},
    }


def segformer(channels: Sequence[int], num_classes: int) -> Model:
    """SegFormer's head (arXiv 2105.15203), which mixes the maps by linear layers."""
    head = {"type": "SegformerHead", "in_channels": list(channels), "in_index": [0, 1, 2, 3], "channels": 256}
    return {"type": "EncoderDecoder", "decode_head": {**head, **_classifier(num_classes)}}


def mask2former(channels: Sequence[int], num_classes: int) -> Model:
    """Mask2Former (arXiv 2112.01527): 100 queries, nine decoder layers; images are padded to multiples of 32."""
    attention = {"embed_dims": WIDTH, "num_heads": 8, "batch_first": True}
    position = {"num_feats": WIDTH // 2, "normalize": True}
    relu = {"type": "ReLU", "inplace": True}

    def feedforward(hidden: int) -> Model:
        return {"embed_dims": WIDTH, "feedforward_channels": hidden, "num_fcs": 2, "ffn_drop": 0.0, "act_cfg": relu}

    deformable = {**attention, "num_levels": 3, "num_points": 4, "dropout": 0.0}
    pixel_decoder = {
        "type": "mmdet.MSDeformAttnPixelDecoder",
        "num_outs": 3,
        "norm_cfg": {"type": "GN", "num_groups": 32},
        "act_cfg": {"type": "ReLU"},
        "encoder": {"num_layers": 6, "layer_cfg": {"self_attn_cfg": deformable, "ffn_cfg": feedforward(1024)}},
        "positional_encoding": position,
    }
    layer = {"self_attn_cfg": attention, "cross_attn_cfg": attention, "ffn_cfg": feedforward(2048)}
    cross_entropy = {"type": "mmdet.CrossEntropyLoss", "use_sigmoid": True, "loss_weight": 5.0}
    dice = {"type": "mmdet.DiceLoss", "activate": True, "naive_dice": True, "eps": 1.0, "loss_weight": 5.0}
    costs = [
        {"type": "mmdet.ClassificationCost", "weight": 2.0},
        {"type": "mmdet.CrossEntropyLossCost", "weight": 5.0, "use_sigmoid": True},
        {"type": "mmdet.DiceCost", "weight": 5.0, "pred_act": True, "eps": 1.0},
    ]
    head = {
        "type": "Mask2FormerHead",
        "in_channels": list(channels),
        "strides": [4, 8, 16, 32],
        "feat_channels": WIDTH,
        "out_channels": WIDTH,
        "num_classes": num_classes,
        "num_queries": 100,
        "num_transformer_feat_level": 3,
        "pixel_decoder": pixel_decoder,
        "enforce_decoder_input_project": False,
        "positional_encoding": position,
        "transformer_decoder": {"return_intermediate": True, "num_layers": 9, "layer_cfg": layer, "init_cfg": None},
        "loss_cls": {
            "type": "mmdet.CrossEntropyLoss",
            "use_sigmoid": False,
            "loss_weight": 2.0,
            "class_weight": [1.0] * num_classes + [0.1],
        },
        "loss_mask": cross_entropy,
        "loss_dice": dice,
        "train_cfg": {
            "num_points": 12544,
            "oversample_ratio": 3.0,
            "importance_sample_ratio": 0.75,
            "assigner": {"type": "mmdet.HungarianAssigner", "match_costs": costs},
            "sampler": {"type": "mmdet.MaskPseudoSampler"},
        },
    }
    return {
        "type": "EncoderDecoder",
        "data_preprocessor": {"type": "SegDataPreProcessor", "test_cfg": {"size_divisor": 32}, **IMAGENET},
        "decode_head": head,
    }


IMAGENET = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "bgr_to_rgb": True}
MODELS: Mapping[str, Callable[[Sequence[int], int], Model]] = {
    "semantic_fpn": semantic_fpn,
    "upernet": upernet,
    "segformer": segformer,
    "mask2former": mask2former,
}


def _classifier(num_classes: int, weight: float = 1.0) -> Model:
    loss = {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": weight}
    return {
        "num_classes": num_classes,
        "dropout_ratio": 0.1,
        "norm_cfg": BATCH_NORM,
        "align_corners": False,
        "loss_decode": loss,
    }
