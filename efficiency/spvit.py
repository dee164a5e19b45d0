"""SPViT (He et al. 2021, "Pruning Self-attentions into Convolutional Layers in Single Path", arXiv 2111.11802).

`convert` makes the super-network of a DeiT or Swin Transformer, whose gates choose a mixer per block and the hidden
units of every feed-forward network. Trained with `target_loss`, it holds an architecture of the wanted cost
(`found_architecture`), which `prune` makes a smaller network. `prune_plain` makes the same of weights that went through
no search, as the authors do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from timm.layers import DropPath, Mlp
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from backbones.checkpoint import read_state_dict, rename
from backbones.keys import TO_OFFICIAL_SWIN
from backbones.spvit import SPViTDeiT
from backbones.spvit_architecture import Architecture, BlockChoice
from backbones.spvit_layers import MixerBlock
from backbones.spvit_swin import SPViTSwin
from efficiency.spvit_gates import Gated, GatedAttention, GatedMlp, GatedWindowAttention, expected_gates, open_gates

Network = SPViTDeiT | SPViTSwin
INDICATORS = "mlp.assigned_indicator_index"
TIMM_SWIN = [*TO_OFFICIAL_SWIN, (r"^head\.fc\.", "head.")]


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of one image: of the whole network, of its mixers and of its feed-forward networks.

    Scalars in float64, with gradients for the gates.
    """

    total: Tensor
    mixers: Tensor
    feed_forward: Tensor


def convert(network: nn.Module, alpha: float | None = None) -> Network:
    """The super-network of a DeiT or Swin Transformer, with its weights; self-attention and all hidden units are on.

    `network` is timm's ``VisionTransformer`` as DeiT is one, timm's ``SwinTransformer`` with windows of 7 x 7 tokens,
    or an `SPViTDeiT` or `SPViTSwin` that is not pruned. `alpha` is the temperature of the softmax over heads of
    convolutions, the family's own (DeiT 0.01, Swin 100) where None. Raises ValueError for any other network.
    """
    plain = split_network(network)
    if alpha is not None and alpha <= 0:
        raise ValueError(f"alpha {alpha}: expected a positive temperature")
    architecture = plain.architecture
    if any(block.mixer != "msa" for block in architecture.blocks):
        raise ValueError("the network is pruned already: expected self-attention in every block")
    plain.architecture = replace(architecture, alpha=architecture.alpha if alpha is None else alpha)
    gated: Gated
    for block in blocks_of(plain):
        mixer = cast(Any, block.attn)
        dim, hidden = mixer.proj.in_features, cast(Any, block.mlp).fc1.out_features
        if isinstance(plain, SPViTDeiT):
            gated = GatedAttention(dim, mixer.num_heads, plain.architecture.alpha)
        else:
            side = (round(len(mixer.relative_position_bias_table) ** 0.5) + 1) // 2
            gated = GatedWindowAttention(dim, mixer.num_heads, side, plain.architecture.alpha)
        block.attn = _with_state(gated, mixer)
        block.mlp = _with_state(GatedMlp(dim, hidden), block.mlp)
    return plain


def _with_state(layer: nn.Module, source: nn.Module) -> nn.Module:
    """`layer` with the weights, device, data type and mode of `source`, which has some of its parameters."""
    weight = next(source.parameters())
    layer.load_state_dict({**layer.state_dict(), **source.state_dict()})
    return layer.to(weight.device, weight.dtype).train(source.training)


def split_network(network: nn.Module) -> Network:
    """An unpruned network of ours with the function and weights of `network`: see `convert`."""
    if isinstance(network, SPViTDeiT | SPViTSwin):
        if is_gated(network):
            raise ValueError("the network has gates already: expected a plain one")
        return network
    model: Any = network
    ours: Network
    if type(network) is VisionTransformer:
        ours = _split_deit(model)
    elif type(network) is SwinTransformer:
        ours = _split_swin(model)
    else:
        raise ValueError(f"SPViT prunes DeiT and Swin Transformers of timm; got a {type(network).__name__}")
    activations = {type(module.act) for module in model.modules() if isinstance(module, Mlp)} - {nn.GELU}
    if activations:
        raise ValueError(f"{type(network).__name__} has {activations.pop().__name__}; expected GELU as in the papers")
    state = network.state_dict()
    state = split_state_dict(rename(state, TIMM_SWIN) if isinstance(ours, SPViTSwin) else state)
    shapes, own = ({name: tuple(t.shape) for name, t in each.items()} for each in (state, ours.state_dict()))
    if shapes != own:
        differing = min(set(shapes.items()) ^ set(own.items()))[0]
        raise ValueError(f"{type(network).__name__}: expected that of the DeiT or Swin paper, but {differing} differs")
    ours.load_state_dict(state)
    weight = next(network.parameters())
    return ours.to(weight.device, weight.dtype).train(network.training)


def _split_deit(model: Any) -> SPViTDeiT:
    block = model.blocks[0]
    architecture = Architecture.unpruned(
        "deit",
        model.embed_dim,
        (len(model.blocks),),
        (block.attn.num_heads,),
        model.patch_embed.patch_size[0],
        block.mlp.fc1.out_features / model.embed_dim,
    )
    return SPViTDeiT(
        architecture=architecture,
        img_size=model.patch_embed.img_size,
        in_chans=model.patch_embed.proj.in_channels,
        num_classes=model.num_classes,
        drop_rate=model.head_drop.p,
        drop_path_rate=_drop_path_rate(model),
    )


def _split_swin(model: Any) -> SPViTSwin:
    blocks = [stage.blocks for stage in model.layers]
    architecture = Architecture.unpruned(
        "swin",
        model.embed_dim,
        [len(stage) for stage in blocks],
        [stage[0].attn.num_heads for stage in blocks],
        model.patch_embed.patch_size[0],
        blocks[0][0].mlp.fc1.out_features / model.embed_dim,
    )
    return SPViTSwin(
        architecture=architecture,
        img_size=model.patch_embed.img_size,
        in_chans=model.patch_embed.proj.in_channels,
        num_classes=model.num_classes,
        drop_rate=model.head.drop.p,
        drop_path_rate=_drop_path_rate(model),
    )


def _drop_path_rate(model: nn.Module) -> float:
    return max((float(module.drop_prob) for module in model.modules() if isinstance(module, DropPath)), default=0.0)


def blocks_of(network: Network) -> list[MixerBlock]:
    """The blocks of all stages in order."""
    return [module for module in network.modules() if isinstance(module, MixerBlock)]


def is_gated(network: nn.Module) -> bool:
    """Whether `network` is a super-network."""
    return any(isinstance(module, Gated) for module in network.modules())


def _gates(network: Network) -> list[tuple[Gated, GatedMlp]]:
    gates = [(block.attn, block.mlp) for block in blocks_of(network)]
    if not all(isinstance(mixer, Gated) and isinstance(mlp, GatedMlp) for mixer, mlp in gates):
        raise ValueError(f"{type(network).__name__} has no gates: expected what efficiency.spvit.convert returns")
    return cast(list[tuple[Gated, GatedMlp]], gates)


# -- cost -------------------------------------------------------------------------------------------------------------


def cost(network: Network, img_size: int | tuple[int, int], in_chans: int = 3) -> Cost:
    """Expected multiply-adds of a super-network for images of `img_size`, by the authors' formula."""
    counted = network.architecture.costs(img_size, network.num_classes, in_chans)
    mixers, units = [], []
    for (mixer, mlp), of_mixer, of_unit in zip(_gates(network), counted.mixers, counted.unit, strict=True):
        one, two, three = expected_gates(mixer.thresholds.double()).cumprod(0)
        small, large, attention = (of_mixer[name] for name in ("1x1", "3x3", "msa"))
        mixers.append(one * small + two * (large - small) + three * (attention - large))
        units.append(of_unit * expected_gates(mlp.ffn_thresholds.double()).sum())
    of_mixers, of_units = torch.stack(mixers).sum(), torch.stack(units).sum()
    return Cost(counted.fixed + of_mixers + of_units, of_mixers, of_units)


def target_loss(cost: Cost, target: float, weight: float) -> Tensor:
    """``weight * (target - cost)²`` with both in 10⁹ multiply-adds: the loss term of the search."""
    return weight * (target - cost.total / 1e9) ** 2


# -- results ----------------------------------------------------------------------------------------------------------


def found_architecture(network: Network) -> Architecture:
    """What the gates of a super-network choose in evaluation."""
    choices = [
        BlockChoice.of_mask(mixer.mixer, open_gates(mlp.ffn_thresholds.detach()).tolist())
        for mixer, mlp in _gates(network)
    ]
    return replace(network.architecture, blocks=tuple(choices))


def prune(network: Network, official_blocks: bool = False) -> Network:
    """The network that a super-network has chosen, physically smaller, with its weights and mode.

    In evaluation it computes what the super-network does, unless `official_blocks` (see `SPViTDeiT` and `SPViTSwin`).
    """
    return _pruned(network, found_architecture(network), official_blocks)


def prune_plain(network: nn.Module, architecture: Architecture, official_blocks: bool = False) -> Network:
    """The network of `architecture` with the weights of a plain DeiT or Swin Transformer (see `convert`).

    The mixture of heads and the batch norms of its convolutions are new: this is where the authors' fine-tuning starts.
    Raises ValueError where the two do not belong together or the architecture does not say which hidden units stay.
    """
    plain = split_network(network)
    for name in ("family", "embed_dim", "depths", "num_heads", "patch_size"):
        own, wanted = getattr(plain.architecture, name), getattr(architecture, name)
        if own != wanted:
            raise ValueError(f"the architecture has {name} {wanted}; expected {own} as the network has")
    return _pruned(plain, architecture, official_blocks)


def _pruned(source: Network, architecture: Architecture, official_blocks: bool) -> Network:
    target = type(source)(
        architecture=architecture,
        img_size=source.img_size,
        in_chans=cast(Any, source.patch_embed).proj.in_channels,
        num_classes=source.num_classes,
        global_pool=source.global_pool,
        drop_rate=source.drop_rate,
        drop_path_rate=_drop_path_rate(source),
        official_blocks=official_blocks,
    )
    state = source.state_dict()
    prefixes = {module: name for name, module in source.named_modules()}
    for block, choice in zip(blocks_of(source), architecture.blocks, strict=True):
        prefix, units = f"{prefixes[block]}.mlp", choice.units()
        hidden = len(state[f"{prefix}.fc1.bias"])
        if choice.kept is None or len(choice.kept) != -(-hidden // 4):
            raise ValueError(f"{prefix} has {hidden} hidden units; expected an architecture found among as many")
        for name in ("fc1.weight", "fc1.bias"):
            state[f"{prefix}.{name}"] = state[f"{prefix}.{name}"][units]
        state[f"{prefix}.fc2.weight"] = state[f"{prefix}.fc2.weight"][:, units]
    own = target.state_dict()
    weight = next(source.parameters())
    target.load_state_dict({name: state.get(name, tensor) for name, tensor in own.items()})
    return target.to(weight.device, weight.dtype).train(source.training)


# -- official files ---------------------------------------------------------------------------------------------------


def split_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a plain DeiT or official Swin Transformer with queries and keys apart from values."""
    split: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            queries_keys, values = tensor.tensor_split([len(tensor) * 2 // 3])
            split[name.replace(".qkv.", ".qk.")], split[name.replace(".qkv.", ".v.")] = queries_keys, values
        else:
            split[name] = tensor
    return split


def read_indicators(path: str | Path) -> list[list[bool]]:
    """Which hidden units stay in each block, from an official ``ffn_indicators`` file or a checkpoint of a search.

    Raises CheckpointError for a file that cannot be read and ValueError for one without such vectors.
    """
    named = {name: tensor for name, tensor in read_state_dict(path).items() if name.endswith(INDICATORS)}
    if not named:
        raise ValueError(f"{path} holds no vector named ...{INDICATORS}; expected the result of a search")
    return [tensor.ne(0).tolist() for tensor in named.values()]


def with_indicators(architecture: Architecture, indicators: Sequence[Sequence[bool]]) -> Architecture:
    """`architecture` with the hidden units of `read_indicators`; raises ValueError where the numbers differ."""
    widths = [sum(mask) for mask in indicators]
    if widths != [block.width for block in architecture.blocks]:
        raise ValueError(
            f"the indicators keep {widths} hidden units; expected {[block.width for block in architecture.blocks]}"
        )
    chosen = (
        BlockChoice.of_mask(block.mixer, mask) for block, mask in zip(architecture.blocks, indicators, strict=True)
    )
    return replace(architecture, blocks=tuple(chosen))
