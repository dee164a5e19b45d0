"""Names of official AFSD weights, and the names used here."""

from backbones.keys import Table

_BRANCHES = (("cur_point_conv", "short"), ("lr_conv", "boundary"), ("roi_conv", "frame"), ("proposal_conv", "fuse"))

# Rows are (pattern, replacement) for re.sub, applied in order to every key.
OFFICIAL_HEAD_KEYS: Table = [
    (r"^coarse_pyramid_detection\.", "head."),
    (r"^head\.loc_heads\.(\d+)\.scale$", r"head.scales.\1"),
    (r"^head\.pyramids\.(\d+)\.", r"head.pyramid.levels.\1."),
    *((rf"^head\.deconv\.{3 * i}\.", f"head.frame_feature.layers.{i}.0.") for i in range(3)),
    *((rf"^head\.deconv\.{3 * i + 1}\.", f"head.frame_feature.layers.{i}.1.") for i in range(3)),
    *((rf"^head\.(loc|conf)_proposal_branch\.{name}\.", rf"head.\1_branch.{ours}.") for name, ours in _BRANCHES),
    (r"^head\.center_head\.", "head.quality_head."),
    # a convolution and its norm are children 0 and 1 of a sequence
    (r"^(head\..+)\.0\.conv[13]d\.", r"\1.conv."),
    (r"^(head\..+)\.1\.(weight|bias)$", r"\1.norm.\2"),
    (r"^(head\.\w+_head)\.conv1d\.", r"\1."),
    (r"^backbone\._model\.", "backbone."),
]
