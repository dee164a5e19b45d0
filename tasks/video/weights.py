"""Weights of detectors: our checkpoints, AFSD's official ones, and backbones alone."""

from pathlib import Path

from torch import nn

from backbones.checkpoint import LoadReport, load_checkpoint
from backbones.keys import BACKBONE_TABLES, Table
from tasks.video.afsd.keys import OFFICIAL_HEAD_KEYS


def _layouts() -> dict[str, Table]:
    """Every layout a file may have, as the key table that leads to our networks."""
    layouts: dict[str, Table] = {
        "our checkpoint": [(r"^(?!network\.)", None), (r"^network\.", "")],
        "our network": [],
        "official AFSD": OFFICIAL_HEAD_KEYS,
        "checkpoint of our classifier": [(r"^(?!network\.)", None), (r"^network\.", "backbone.")],
    }
    for name, table in BACKBONE_TABLES.items():
        layouts[f"backbone alone, {name}"] = [*table, (r"^", "backbone.")]
        layouts[f"backbone of images, {name}"] = [*table, (r"^", "backbone.features.")]
    return layouts


def load_weights(network: nn.Module, path: str | Path) -> LoadReport:
    """Load a weight file of any known layout into a detector; see `backbones.checkpoint.load_checkpoint`.

    Knows checkpoints of our trainings, of detectors and of classifiers, AFSD's official ones, and files with a
    backbone alone: I3D for RGB or flow, STPT, or a network for images. Then the head keeps its initial values.
    """
    return load_checkpoint(network, path, tables=_layouts())
