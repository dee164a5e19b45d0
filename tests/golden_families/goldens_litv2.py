"""LITv2: HiLo alone, classification and dense networks, lists of keys; found by what a case says it is."""

import torch
from backbone_cases import check_keys, is_expected, run_model, tolerance

from backbones.litv2 import HiLo, LITv2, LITv2Dense
from backbones.macs import count_macs

__all__ = ["is_expected", "run_case", "tolerance"]


def run_case(meta, tensors, path):
    if "keys" in meta:
        return run_keys(meta)
    # LITv2 has no position tables, hence no image size; the json describes its norm in words.
    options = {name: value for name, value in meta["constructor"].items() if name not in ("norm", "img_size")}
    if "H" in meta:
        return run_hilo(meta, options, tensors)
    if ("local_ws" in options and "out_indices" in options) or "backbone" in meta["variant"]:
        flavour = "segmentation" if "segmentation" in meta["variant"] else "detection"
        return run_model(LITv2Dense(flavour=flavour, **options), tensors)
    model = LITv2(**options)
    return run_model(model, tensors, {f"stage{i}": stage.blocks[-1] for i, stage in enumerate(model.layers)})


def run_hilo(meta, options, tensors):
    """HiLo on tokens; the official dense code pads the map, the other leaves out what its window does not divide."""
    module = HiLo(**options, pad="detection" in meta["variant"] or "padded" in meta["variant"])
    assert module.lo_heads == meta["lo_heads"]
    assert module.hi_heads == meta["hi_heads"]
    if not module.pad and meta.get("official_flops"):
        with torch.device("meta"):
            x = torch.zeros(1, meta["H"], meta["W"], options["dim"])
            assert count_macs(HiLo(**options), x) == meta["official_flops"]

    def on_tokens(network, x):
        return network(x.unflatten(1, (meta["H"], meta["W"]))).flatten(1, 2)

    return run_model(module, tensors, forward=on_tokens)


def run_keys(meta):
    """A network of its real size on the meta device."""
    options = dict(meta["config"])
    options.pop("img_size", None)
    with torch.device("meta"):
        if "backbone" in meta["variant"]:
            flavour = "segmentation" if "seg" in meta["variant"] else "detection"
            return check_keys(LITv2Dense(flavour=flavour, **options), meta)
        return check_keys(LITv2(**options), meta)
