"""Names of official FASeg and Mask2Former head weights, and the names used here."""

import re

from backbones.keys import Table

# (name here, official name): prefixes, "{}" stands for a layer or level number; the first row that fits counts.
_PREFIXES = [
    ("pixel_decoder.input_proj.{}.conv.", "sem_seg_head.pixel_decoder.input_proj.{}.0."),
    ("pixel_decoder.input_proj.{}.norm.", "sem_seg_head.pixel_decoder.input_proj.{}.1."),
    ("pixel_decoder.pos_conv.", "sem_seg_head.pixel_decoder.pos_linear."),
    ("pixel_decoder.encoder.level_embed", "sem_seg_head.pixel_decoder.transformer.level_embed"),
    ("pixel_decoder.encoder.", "sem_seg_head.pixel_decoder.transformer.encoder."),
    ("pixel_decoder.lateral.norm.", "sem_seg_head.pixel_decoder.adapter_1.norm."),
    ("pixel_decoder.lateral.conv.", "sem_seg_head.pixel_decoder.adapter_1."),
    ("pixel_decoder.output.norm.", "sem_seg_head.pixel_decoder.layer_1.norm."),
    ("pixel_decoder.output.conv.", "sem_seg_head.pixel_decoder.layer_1."),
    ("pixel_decoder.", "sem_seg_head.pixel_decoder."),
    (
        "decoder.layers.{}.cross_attn.",
        "sem_seg_head.predictor.transformer_cross_attention_layers.{}.multihead_attn.",
    ),
    ("decoder.layers.{}.cross_norm.", "sem_seg_head.predictor.transformer_cross_attention_layers.{}.norm."),
    ("decoder.layers.{}.self_attn.", "sem_seg_head.predictor.transformer_self_attention_layers.{}.self_attn."),
    ("decoder.layers.{}.self_norm.", "sem_seg_head.predictor.transformer_self_attention_layers.{}.norm."),
    ("decoder.layers.{}.ffn_norm.", "sem_seg_head.predictor.transformer_ffn_layers.{}.norm."),
    ("decoder.layers.{}.", "sem_seg_head.predictor.transformer_ffn_layers.{}."),
    ("decoder.norm.", "sem_seg_head.predictor.decoder_norm."),
    ("decoder.mask_embed.0.", "sem_seg_head.predictor.mask_embed.layers.0."),
    ("decoder.mask_embed.2.", "sem_seg_head.predictor.mask_embed.layers.1."),
    ("decoder.mask_embed.4.", "sem_seg_head.predictor.mask_embed.layers.2."),
    ("decoder.query_pos_mlp.", "sem_seg_head.predictor.adapt_pos2d."),
    ("decoder.", "sem_seg_head.predictor."),
]


def _row(source: str, target: str) -> tuple[str, str]:
    return "^" + re.escape(source).replace(r"\{\}", r"(\d+)"), target.replace("{}", r"\1")


# Rows are (pattern, replacement) for re.sub, applied in order to every key; None drops the key.
HEAD_KEYS: Table = [
    (r"^module\.", ""),
    (r"^criterion\.empty_weight$", None),
    # MaskFormer v1 kept the pixel decoder directly in the head and called the query features static_query.
    (r"^sem_seg_head\.(?!pixel_decoder\.|predictor\.)", "sem_seg_head.pixel_decoder."),
    (r"^sem_seg_head\.predictor\.static_query\.", "sem_seg_head.predictor.query_feat."),
    *(_row(official, ours) for ours, official in _PREFIXES),
]

# The other direction, for export. The official `criterion.empty_weight` has no counterpart here.
OFFICIAL_HEAD_KEYS: Table = [(r"^auxiliary_head\.", None), *(_row(ours, official) for ours, official in _PREFIXES)]
