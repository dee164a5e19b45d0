"""Weights of one kind of attention for another: spatially reduced or windowed, full, and EcoFormer's."""

from collections.abc import Mapping

import torch
from torch import Tensor

# Which of queries, keys and values each projection makes.
PARTS = {"qkv": slice(0, 3), "q": slice(0, 1), "kv": slice(1, 3), "to_qk": slice(0, 1), "to_v": slice(2, 3)}
REDUCTION = ("sr.weight", "sr.bias", "norm.weight", "norm.bias")  # of the map that queries of PVT and Twins attend to


def exchange_attention(
    state_dict: Mapping[str, Tensor], target: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Make the projections that a network with the tensors `target` lacks of those of the attention it replaces.

    ``qkv`` is joined of ``q`` and ``kv`` or split into them; EcoFormer's ``to_qk`` is the query's part of either and
    ``to_v`` the value's, the key's is left out. Returns the tensors and the names of those that have no use any more:
    spatial reductions.
    """
    result, unused = dict(state_dict), []
    for name in target:
        stem, _, leaf = name.rpartition(".")
        attention, _, projection = stem.rpartition(".")
        if name in state_dict or projection not in PARTS:
            continue
        joint = _joint(state_dict, f"{attention}.", leaf)
        if joint is None or len(joint) % 3:
            continue
        for part in ("qkv", "q", "kv"):
            if f"{attention}.{part}.{leaf}" not in target:
                result.pop(f"{attention}.{part}.{leaf}", None)
        result[name] = joint.unflatten(0, (3, -1))[PARTS[projection]].flatten(0, 1)
        reduction = (f"{attention}.{part}" for part in REDUCTION)
        unused += [key for key in reduction if key in result and key not in target]
    unused = list(dict.fromkeys(unused))
    return {name: tensor for name, tensor in result.items() if name not in unused}, unused


def _joint(state_dict: Mapping[str, Tensor], attention: str, leaf: str) -> Tensor | None:
    """Projections of queries, keys and values on top of each other, or None where there are none."""
    if (joint := state_dict.get(f"{attention}qkv.{leaf}")) is not None:
        return joint
    query, rest = (state_dict.get(f"{attention}{part}.{leaf}") for part in ("q", "kv"))
    return None if query is None or rest is None else torch.cat((query, rest))
