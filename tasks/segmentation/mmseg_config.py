"""Any configuration file of mmsegmentation: its model with the number of classes of the data at hand."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from tasks.core.openmmlab.config import dictionaries, forget_pretrained, require_trusted
from tasks.segmentation.mmseg_network import MMSegNetwork, build_network
from tasks.segmentation.views import EvaluationConfig


def network_of(described: Mapping[str, Any], num_classes: int) -> MMSegNetwork:
    """The segmentor `described`, with `num_classes` classes and without pretrained weights.

    Synchronised batch normalisation becomes plain: `trainer.sync_batchnorm` is what synchronises. Raises UserError for
    classes that are not OpenMMLab's, for models of anything but images, and for what mmsegmentation refuses.
    """
    require_trusted(described)
    model = dict(copy.deepcopy(described))
    forget_pretrained(model)
    set_classes(model, num_classes)
    for part in dictionaries(model):
        if part.get("type") == "SyncBN":
            part["type"] = "BN"
    return build_network(model, touch=True)


def set_classes(model: dict[str, Any], num_classes: int) -> None:
    """Set the number of classes of every head of `model`; weights of single classes are dropped where it changes."""
    for part in dictionaries(model):
        before = part.get("num_classes")
        if not isinstance(before, int):
            continue
        part["num_classes"] = num_classes
        if "out_channels" in part and part["out_channels"] in (before, 1):
            part["out_channels"] = None if part["out_channels"] == 1 else num_classes
        for loss in dictionaries(part):
            weights = loss.get("class_weight")
            if not isinstance(weights, list) or before == num_classes:
                continue
            if len(weights) == before + 1:  # the last one is that of "no object"
                loss["class_weight"] = [1.0] * num_classes + weights[-1:]
            else:
                loss["class_weight"] = None


def evaluation_of(model: Mapping[str, Any]) -> EvaluationConfig:
    """How the configuration tests: whole images, or a sliding window of its size."""
    test = model.get("test_cfg") or {}
    if test.get("mode") != "slide":
        return EvaluationConfig()
    (height, width), (down, right) = test["crop_size"], test["stride"]
    return EvaluationConfig(mode="slide", window=(height, width), stride=(down, right))
