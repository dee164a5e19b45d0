"""LIT: classification and dense networks, lists of keys, resized position tables; found by what a case contains."""

import re

import torch
from backbone_cases import check_keys, run_model, tolerance
from backbone_cases import is_expected as is_output
from timm.layers import to_2tuple

from backbones.lit import LIT, LITDense
from backbones.lit_ti import LITTi, LITTiDense
from backbones.positions import resize_relative_table

__all__ = ["is_expected", "run_case", "tolerance"]


def is_expected(name):
    return is_output(name) and not re.fullmatch(r"table_\d+", name)


def run_case(meta, tensors, path):
    if "keys" in meta:
        with torch.device("meta"):
            return check_keys(network({name for name, _ in meta["keys"]}, meta["config"]), meta)
    names = {name.removeprefix("sd.") for name in tensors if name.startswith("sd.")}
    if not names:
        return run_table_resize(tensors)
    model = network(names, meta["constructor"])
    return run_model(model, tensors, last_blocks(model))


def network(names, options):
    """The network with parameters `names`: LIT-Ti or another, a classifier or one for dense prediction."""
    # "norm" describes the layer norms in words
    arguments = {name: value for name, value in options.items() if name not in ("norm", "table_base_px")}
    dense = "norm.weight" not in names
    if "pos_embed1" in names:
        return LITTiDense(**arguments, official_positions=True) if dense else LITTi(**arguments)
    if not dense:
        return LIT(**arguments)
    flavour = "segmentation" if "norm0.weight" in names else "detection"
    return LITDense(**arguments, flavour=flavour, table_size=options.get("table_base_px"))


def last_blocks(model):
    """The last block of every stage of a classifier, by the name of its golden tokens."""
    if isinstance(model, LIT):
        stages = [stage.blocks for stage in model.layers]
    elif isinstance(model, LITTi):
        stages = [model.get_submodule(f"block{stage}") for stage in (1, 2, 3, 4)]
    else:
        return {}
    return {f"stage{i}": blocks[-1] for i, blocks in enumerate(stages)}


def run_table_resize(tensors):
    """Every ``table_A_to_B`` from ``table_A``, A and B being the sides 2 * grid - 1 of the tables."""
    computed = {}
    for name in filter(is_expected, tensors):
        source, _, target = name.rpartition("_to_")
        computed[name] = resize_relative_table(tensors[source], to_2tuple((int(target) + 1) // 2))
    return computed
