"""What Mesa knows of a network's layers: their kind, and how the tensors they keep fall into groups."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from efficiency.mesa_policy import Policy, Setting, deploy, read_rules

KINDS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Linear, "fc"),
    (_ConvNd, "conv"),
    (nn.GELU, "gelu"),
    (nn.ReLU, "relu"),
    (_BatchNorm, "bn"),
    (nn.LayerNorm, "layernorm"),
    (nn.Softmax, "softmax"),
)
# Operations after which a tensor may depend on data that needs no gradient.
MIXING = ("Convolution", "Mm", "Addmm", "Bmm", "Baddbmm", "Linear", "Mkldnn", "SlowConv", "Thnn", "Cudnn")
MAX_PARAMETER_CHAIN = 24


@dataclass(frozen=True)
class Layer:
    """One module.

    `num_heads` is that of the attention module it is, is in, or stands nearest to; None without attention. `widths`
    are the channels going in and out of an attention module.
    """

    name: str
    tag: str
    setting: Setting
    num_heads: int | None
    spatial: int = 0  # dimensions behind the channels
    widths: frozenset[int] = frozenset()


class Groups(NamedTuple):
    """`size` neighbours of dimension `dim` fall into `groups` groups; what is left of the dimension counts as batch.

    `width` is the number of features, channels or those of one head.
    """

    dim: int
    size: int
    groups: int
    width: int


def describe(network: nn.Module, policy: Policy | str | Path | None) -> dict[str, Layer]:
    """All modules of `network` by name. `policy` may be an official file; None is the default one."""
    modules = dict(network.named_modules())
    tags = {name: kind_of(module) for name, module in modules.items()}
    if isinstance(policy, str | Path):
        rules = read_rules(policy)
        try:
            settings = settings_of_modules(tags, deploy(rules, units(tags)))
        except ValueError as error:
            raise ValueError(f"policy {policy}: {error}") from None
    else:
        settings = {name: getattr(policy or Policy(), tag) for name, tag in tags.items()}
    heads = {name: module.num_heads for name, module in modules.items() if tags[name] == "matmul"}
    order = {name: number for number, name in enumerate(modules)}
    layers = {}
    for name, module in modules.items():
        linear = [child for child in module.children() if isinstance(child, nn.Linear)] if name in heads else []
        layers[name] = Layer(
            name,
            tags[name],
            settings[name],
            _nearest(name, heads, order),
            len(module.kernel_size) if isinstance(module, _ConvNd) else 0,
            frozenset(width for child in linear for width in (child.in_features, child.out_features)),
        )
    return layers


def kind_of(module: nn.Module) -> str:
    """The field of `Policy` that a module falls under."""
    for cls, tag in KINDS:
        if isinstance(module, cls):
            return tag
    if type(getattr(module, "num_heads", None)) is int and not hasattr(module, "blocks"):
        return "matmul"
    return "functional" if any(True for _ in module.children()) else "other"


def units(tags: dict[str, str]) -> dict[str, tuple[str, int]]:
    """Layers as official files number them: within their kind; products and softmax have two operands, `.quant1/2`."""
    counts: Counter[str] = Counter()
    numbered = {}
    for name, tag in tags.items():
        operands = ("1", "2") if tag in ("matmul", "softmax") else ("",)
        for operand in operands:
            unit = f"{name}.quant{operand}" if operand else name
            numbered[unit] = (f"{tag}-{operand}" if operand else tag, counts[tag])
        counts[tag] += 1
    return numbered


def settings_of_modules(tags: dict[str, str], settings: dict[str, Setting]) -> dict[str, Setting]:
    """One setting per module: attention is compressed where both operands are, a softmax where its output is."""
    merged = {}
    for name, tag in tags.items():
        first, second = (settings.get(f"{name}.quant{operand}") for operand in (1, 2))
        if tag == "matmul" and first and second:
            merged[name] = first if second.enable else second
        else:
            merged[name] = second or settings[name]
    return merged


def _nearest(name: str, heads: dict[str, int], order: dict[str, int]) -> int | None:
    """The heads of the attention below the closest ancestor that has any: the last one up to here, else the first."""
    ancestor = name
    while heads:
        inside = [other for other in heads if not ancestor or f"{other}.".startswith(f"{ancestor}.")]
        if inside:
            before = [other for other in inside if order[other] <= order[name]]
            return heads[before[-1] if before else inside[0]]
        ancestor = ancestor.rpartition(".")[0]
    return None


def groups_of(shape: Sequence[int], layer: Layer, num_groups: int | None, group_size: int) -> Groups:
    """Find the groups of a saved tensor: heads in attention, elsewhere blocks of channels.

    `num_groups` overrides the number of heads; where neither divides the channels, groups have `group_size`, or there
    is one.
    """
    heads, ndim = layer.num_heads or 1, len(shape)
    wanted = num_groups or layer.num_heads
    if layer.tag in ("matmul", "softmax"):
        if ndim >= 4 and not (shape[-1] in layer.widths and shape[-3] != heads):
            dim = ndim - 3 if shape[-3] % heads == 0 or shape[-2] % heads else ndim - 2
            return Groups(dim, shape[dim], math.gcd(shape[dim], wanted or 1), shape[-1])
        if ndim == 3 and shape[-1] not in layer.widths and shape[0] % heads == 0:
            return Groups(0, heads, math.gcd(heads, wanted or 1), shape[-1])
    dim = _channel_dim(shape, layer)
    return Groups(dim, shape[dim], channel_groups(shape[dim], wanted, group_size), shape[dim])


def channel_groups(channels: int, wanted: int | None, group_size: int) -> int:
    """Number of groups of some channels."""
    if wanted and channels % wanted == 0:
        return wanted
    return channels // group_size if channels % group_size == 0 else 1


def _channel_dim(shape: Sequence[int], layer: Layer) -> int:
    ndim = len(shape)
    if layer.tag == "conv":
        return ndim - 1 - layer.spatial
    if layer.tag == "bn":
        return 1
    # Maps are square more often than channels are as many as rows.
    if ndim == 4 and layer.tag in ("gelu", "relu", "other", "functional") and shape[2] == shape[3] != shape[1]:
        return 1
    return ndim - 1


def of_parameters(tensor: Tensor) -> bool:
    """Whether a tensor comes from one parameter alone: a view of it, its copy in mixed precision, a bias table."""
    if isinstance(tensor, nn.Parameter):
        return True
    node = tensor.grad_fn
    for _ in range(MAX_PARAMETER_CHAIN):
        if node is None:
            return False
        if hasattr(node, "variable"):
            return isinstance(node.variable, nn.Parameter)
        if node.name().startswith(MIXING):
            return False
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        if len(parents) != 1:
            return False
        node = parents[0]
    return False
