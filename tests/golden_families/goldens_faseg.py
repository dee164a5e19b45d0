"""FASeg and Mask2Former: which builder computes which golden case.

A builder takes (meta, tensors, path) and returns {"out.<name>": computed tensor}. It is found by `kind_of` from what
the case contains, never from its file name. Builders of the network parts are in goldens_faseg_network.py, those of
backbones, whole networks, checkpoints and metrics in goldens_faseg_backbones.py.
"""

from goldens_faseg_backbones import (
    run_checkpoints,
    run_full,
    run_keys,
    run_miou,
    run_optimizer,
    run_resnet,
    run_swin,
)
from goldens_faseg_network import (
    run_criterion,
    run_decoder,
    run_deformable_attention,
    run_deformable_encoder,
    run_head,
    run_inference,
    run_matcher,
    run_pixel_decoder,
)

BUILDERS = {
    "MSDeformAttn": run_deformable_attention,
    "MSDeformAttnTransformerEncoderOnly": run_deformable_encoder,
    "MSDeformAttnPixelDecoder": run_pixel_decoder,
    "MSDeformAttnPixelDecoder4ScalesFASeg": run_pixel_decoder,
    "MultiScaleMaskedTransformerDecoder": run_decoder,
    "MultiScaleMaskedTransformerDecoderFASeg": run_decoder,
    "MaskFormerHead": run_head,
    "HungarianMatcher": run_matcher,
    "SetCriterion": run_criterion,
    "MaskFormer": run_inference,
    "SwinTransformer": run_swin,
    "detectron2 ResNet": run_resnet,
    "full": run_full,
    "keys": run_keys,
    "optimizer": run_optimizer,
    "checkpoints": run_checkpoints,
    "miou": run_miou,
}


def kind_of(meta, tensors):
    """Name the kind of a case: its official class, else what its json or state dict contains."""
    if meta.get("official_class") in BUILDERS:
        return meta["official_class"]
    marks = {  # the first mark found decides
        "sd.pixel_decoder.mask_features.weight": "MaskFormerHead",
        "sd.input_proj.0.0.weight": "MSDeformAttnPixelDecoder4ScalesFASeg",
        "sd.query_feat.weight": "MultiScaleMaskedTransformerDecoderFASeg",
        "fill_rule": "full",
        "params_by_module": "keys",
        "base_lr": "optimizer",
        "expected_keys": "checkpoints",
        "out.confusion_target_rows": "miou",
    }
    for mark, kind in marks.items():
        if mark in tensors or mark in meta:
            return kind
    raise LookupError(f"case {meta.get('case')!r}: no builder for official_class {meta.get('official_class')!r}")


def run_case(meta, tensors, path):
    return BUILDERS[kind_of(meta, tensors)](meta, tensors, path)
