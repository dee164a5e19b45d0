"""Weights of classifiers: our checkpoints, and releases under timm's, the official or our own names."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from backbones.checkpoint import LoadReport, load_checkpoint
from backbones.keys import BACKBONE_TABLES, Table

LAYOUTS: Mapping[str, Table] = {
    "our checkpoint": [(r"^(?!network\.)", None), (r"^network\.", "")],
    **BACKBONE_TABLES,
}


def load_weights(network: nn.Module, path: str | Path) -> LoadReport:
    """Load a weight file of any known layout into `network`; see `backbones.load_checkpoint`.

    A classifier for other classes is left out with a warning.
    """
    return load_checkpoint(network, path, tables=LAYOUTS)
