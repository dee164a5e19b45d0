"""Key tables: how released backbones name their weights, and how the feature pyramids here do.

A table is a list of rows (pattern, replacement) for ``re.sub``, applied in order to every key; None drops the key.
"""

import re
from collections.abc import Mapping, Sequence

Table = Sequence[tuple[str, str | None]]

# Endings of what networks compute by themselves: counters of batch norms, index tables and masks.
# The hash functions of EcoFormer are fitted to whatever its projections are.
HASH_FUNCTIONS = tuple(f".fast_attention.{name}" for name in ("projection_matrix", "ksh.A", "ksh.mvec", "ksh.anchor"))
COMPUTED = ("num_batches_tracked", "relative_position_index", "attn_mask", *HASH_FUNCTIONS)
BUFFERS: Table = [(r"^(.+\.)?(relative_position_index|attn_mask)$", None)]

# Final norm, classifier and class token of LIT, LITv2 and Swin, which networks for dense prediction have no use for.
CLASSIFIER = r"^(backbone\.((body|features)\.)?)?(norm\.|head\.|cls_token$)"

# timm's and torchvision's own names, also as timm's feature lists flatten them (layers_0 for layers.0).
TIMM: Table = [(r"^(layers|stages|blocks|levels|features)_(\d+)\.", r"\1.\2."), (r"^(?!body\.)", "body.")]

# detectron2's ResNet: norms are children of the convolutions, stages count from res2.
DETECTRON2_RESNET: Table = [
    (r"^stem\.conv1\.norm\.", "body.bn1."),
    (r"^stem\.conv1\.", "body.conv1."),
    *((rf"^res{stage + 1}\.", f"body.layer{stage}.") for stage in (1, 2, 3, 4)),
    (r"^(body\.layer\d\.\d+)\.conv(\d)\.norm\.", r"\1.bn\2."),
    (r"^(body\.layer\d\.\d+)\.shortcut\.norm\.", r"\1.downsample.1."),
    (r"^(body\.layer\d\.\d+)\.shortcut\.", r"\1.downsample.0."),
]
TO_DETECTRON2_RESNET: Table = [
    (r"^body\.bn1\.", "stem.conv1.norm."),
    (r"^body\.conv1\.", "stem.conv1."),
    *((rf"^body\.layer{stage}\.", f"res{stage + 1}.") for stage in (1, 2, 3, 4)),
    (r"^(res\d\.\d+)\.bn(\d)\.", r"\1.conv\2.norm."),
    (r"^(res\d\.\d+)\.downsample\.1\.", r"\1.shortcut.norm."),
    (r"^(res\d\.\d+)\.downsample\.0\.", r"\1.shortcut."),
]

# Microsoft's and Mask2Former's Swin merges patches at the end of stage i, timm and we at the start of stage i + 1.
OFFICIAL_SWIN: Table = [
    *BUFFERS,
    *((rf"^layers\.{stage}\.downsample\.", f"layers.{stage + 1}.downsample.") for stage in (2, 1, 0)),
]
TO_OFFICIAL_SWIN: Table = [
    (rf"^layers\.{stage}\.downsample\.", f"layers.{stage - 1}.downsample.") for stage in (1, 2, 3)
]

# PVTv2 as its authors and EcoFormer's name it: stages count from 1, and their parts have no common parent.
OFFICIAL_PVT: Table = [
    (r"^patch_embed1\.", "patch_embed."),
    *((rf"^patch_embed{stage + 1}\.", f"stages.{stage}.downsample.") for stage in (1, 2, 3)),
    *((rf"^block{stage + 1}\.", f"stages.{stage}.blocks.") for stage in (0, 1, 2, 3)),
    *((rf"^norm{stage + 1}\.", f"stages.{stage}.norm.") for stage in (0, 1, 2, 3)),
    (r"\.dwconv\.dwconv\.", ".dwconv."),
]

# Detectors and segmentation networks of mmdetection and mmsegmentation, of which the backbone is taken.
MM_BACKBONE: Table = [(r"^(?!backbone\.)", None), (r"^backbone\.", "")]

# What a file with a backbone alone may look like; `load_checkpoint` takes the one that fits.
BACKBONE_TABLES: Mapping[str, Table] = {
    "our names": [],
    "timm or torchvision names": TIMM,
    "detectron2 ResNet names": DETECTRON2_RESNET,
    "official Swin names": OFFICIAL_SWIN,
    "official PVTv2 names": OFFICIAL_PVT,
    "official PVTv2 names, features": [*OFFICIAL_PVT, (r"^", "body.")],
    "backbone of an mmdetection or mmsegmentation model": MM_BACKBONE,
}


def prefixed(table: Table, prefix: str) -> Table:
    """The rows of `table` for keys below `prefix` (e.g. ``backbone.``), which stays; every pattern starts with ^."""
    return [
        ("^" + re.escape(prefix) + pattern.removeprefix("^"), None if replacement is None else prefix + replacement)
        for pattern, replacement in table
    ]
