"""Weights of detectors: our checkpoints, bare backbones, and models in the layout of mmdetection, as LIT has them."""

from pathlib import Path

from torch import nn

from backbones.checkpoint import LoadReport, load_checkpoint
from backbones.keys import BACKBONE_TABLES, TIMM, Table, prefixed
from tasks.detection.network import DetectionNetwork
from tasks.detection.torchvision_detectors import Pyramid


def load_weights(network: DetectionNetwork, path: str | Path) -> LoadReport:
    """Load a weight file of any known layout into a detector; see `backbones.checkpoint.load_checkpoint`.

    Knows checkpoints of our training, models of mmdetection 2 and 3, which name their parts alike, and files with a
    backbone alone or with that of a segmentation network (then neck and heads keep their initial values). Detectors of
    mmdetection take whole models; those of torchvision take the backbone of them and ignore the rest, because
    torchvision's anchors, pooling and coarse levels compute something else from the same weights. Names in the report
    are those of `network.detector`.
    """
    detector = network.detector
    prefix = _backbone_prefix(detector)
    return load_checkpoint(detector, path, tables=_layouts(detector, prefix), backbone=prefix)


def _backbone_prefix(detector: nn.Module) -> str:
    """Where the backbone is in detectors of torchvision, in those with `FrugalBackbone`, and in others."""
    backbone = detector.backbone
    if isinstance(backbone, Pyramid):
        return "backbone.body."
    return "backbone.features." if hasattr(getattr(backbone, "features", None), "channels") else "backbone."


def _layouts(detector: nn.Module, prefix: str) -> dict[str, Table]:
    """Every layout a file may have, as the key table that leads to the detector."""
    layouts: dict[str, Table] = {}
    if not isinstance(detector.backbone, Pyramid):
        layouts["mmdetection model"] = [(r"^backbone\.", prefix)]
        layouts["mmdetection model, timm or torchvision names"] = [
            *prefixed(TIMM, "backbone."),
            (r"^backbone\.", prefix),
        ]
    layouts["our checkpoint"] = [(r"^(?!network\.detector\.)", None), (r"^network\.detector\.", "")]
    layouts["our network"] = [(r"^detector\.", "")]
    for name, table in BACKBONE_TABLES.items():
        layouts[f"backbone alone, {name}"] = [*table, (r"^", prefix)]
    return layouts
