"""What any configuration file of mmdetection calls its model, with the number of classes of the data at hand."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from tasks.core.errors import UserError
from tasks.core.openmmlab.config import dictionaries, forget_pretrained, require_trusted
from tasks.core.preprocess import NormalizeAndPad
from tasks.detection.mmdet_network import MMDetNetwork, build_detector

COUNTS = ("num_classes", "num_things_classes")


def network_of(model: Mapping[str, Any], num_classes: int) -> MMDetNetwork:
    """The network that `model` describes, with `num_classes` classes and without pretrained weights.

    Raises UserError for classes that are not OpenMMLab's, for another preprocessor than that of plain detectors and
    for what mmdetection refuses.
    """
    require_trusted(model)
    own = copy.deepcopy(dict(model))
    preprocess = _preprocess(own.pop("data_preprocessor", None) or {})
    forget_pretrained(own)
    set_classes(own, num_classes)
    return MMDetNetwork(build_detector(own), preprocess, touch=True)


def set_classes(model: dict[str, Any], num_classes: int) -> None:
    """Set the number of classes of every head of `model` that has as many as its first; things, if there is stuff."""
    heads = {name: part for name, part in model.items() if name not in ("backbone", "neck", "train_cfg", "test_cfg")}
    before = next((part[key] for part in dictionaries(heads) for key in COUNTS if key in part), None)
    for part in dictionaries(heads):
        for key in COUNTS:
            if key in part and part[key] == before:
                part[key] = num_classes
                if key == "num_things_classes":
                    part["num_stuff_classes"] = 0
                _set_class_weight(part.get("loss_cls"), num_classes)


def _set_class_weight(loss: Any, num_classes: int) -> None:
    """One weight for every class, and the last for what is no object."""
    weights = loss.get("class_weight") if isinstance(loss, dict) else None
    if isinstance(weights, list):
        loss["class_weight"] = [weights[0]] * num_classes + [weights[-1]]


def _preprocess(options: Mapping[str, Any]) -> NormalizeAndPad:
    """What mmdetection's preprocessor of plain detectors does; its augmentations of whole batches are left out.

    It expects OpenCV's order of channels, we read RGB: unless it turns them the network wants BGR.
    """
    kind = str(options.get("type", "DetDataPreprocessor")).rpartition(".")[2]
    if kind != "DetDataPreprocessor":
        raise UserError(f"model.config: data_preprocessor {kind!r} is not supported, only DetDataPreprocessor")
    return NormalizeAndPad(
        mean=options.get("mean") or (0.0, 0.0, 0.0),
        std=options.get("std") or (1.0, 1.0, 1.0),
        size_divisor=options.get("pad_size_divisor", 1),
        bgr=not (options.get("bgr_to_rgb") or options.get("rgb_to_bgr")),
        pad_value=options.get("pad_value", 0),
    )
