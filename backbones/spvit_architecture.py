"""What SPViT searches for (He et al. 2021, "Pruning Self-attentions into Convolutional Layers in Single Path",
arXiv 2111.11802): for each block a spatial mixer and the hidden units of the feed-forward network that stay.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any, Literal, get_args

from timm.layers import to_2tuple

Mixer = Literal["skip", "1x1", "3x3", "msa"]
Family = Literal["deit", "swin"]
MIXERS: tuple[Mixer, ...] = get_args(Mixer)  # in the order of their gates: 000, 100, 110, 111
WINDOW = 7

# Temperature of the softmax over heads, and the tap (column of `head_probs`) of each kernel position, row by row. Taps
# run down the columns of the kernel; Swin numbers the centre first.
ALPHA: Mapping[Family, float] = {"deit": 0.01, "swin": 100.0}
TAPS: Mapping[Family, tuple[int, ...]] = {"deit": (0, 3, 6, 1, 4, 7, 2, 5, 8), "swin": (1, 4, 6, 2, 0, 7, 3, 5, 8)}
CENTRE = 4


@dataclass(frozen=True)
class BlockChoice:
    """The mixer of one block and the number of hidden units of its feed-forward network.

    `kept` says which of the units of the unpruned network these are, as hexadecimal digits with the first unit in the
    highest bit; None where it is not known, which is enough for a network whose weights are pruned already.
    """

    mixer: Mixer
    width: int
    kept: str | None = None

    def __post_init__(self) -> None:
        if self.mixer not in MIXERS:
            raise ValueError(f"mixer {self.mixer!r}: expected one of {', '.join(MIXERS)}")
        if self.width < 0:
            raise ValueError(f"width {self.width}: expected the number of hidden units that stay")
        if self.kept is not None and len(self.units()) != self.width:
            raise ValueError(
                f"kept {self.kept!r} names {len(self.units())} units; expected as many as width {self.width}"
            )

    @classmethod
    def of_mask(cls, mixer: Mixer, mask: Sequence[bool]) -> "BlockChoice":
        """The choice of `mixer` and of the units where `mask` is true."""
        digits = "".join(str(int(bit)) for bit in mask)
        digits += "0" * (-len(digits) % 4)
        return cls(
            mixer, sum(map(bool, mask)), "".join(f"{int(digits[i : i + 4], 2):x}" for i in range(0, len(digits), 4))
        )

    def units(self) -> list[int]:
        """Numbers of the units that `kept` names, rising; raises ValueError where they are not known."""
        if self.kept is None:
            raise ValueError("the architecture does not say which hidden units stay; expected 'kept' for every block")
        bits = "".join(f"{int(digit, 16):04b}" for digit in self.kept)
        return [i for i, bit in enumerate(bits) if bit == "1"]


@dataclass(frozen=True)
class Costs:
    """Multiply-adds of a network by its official formula: what no gate changes, then per block.

    `mixers` is what each mixer costs, `unit` what one hidden unit does.
    """

    fixed: int
    mixers: tuple[Mapping[Mixer, int], ...]
    unit: tuple[int, ...]


@dataclass(frozen=True)
class Architecture:
    """A DeiT or Swin whose blocks differ: what a search finds and what makes a pruned network.

    `depths` and `num_heads` have one entry per stage; a DeiT is one stage. `blocks` are those of all stages in order.
    `alpha` is the temperature of the softmax over heads in convolutions, `mlp_ratio` belongs to the unpruned network.
    """

    family: Family
    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    patch_size: int
    mlp_ratio: float
    alpha: float
    blocks: tuple[BlockChoice, ...]

    def __post_init__(self) -> None:
        if self.family not in ALPHA:
            raise ValueError(f"family {self.family!r}: expected 'deit' or 'swin'")
        if len(self.num_heads) != len(self.depths) or (self.family == "deit" and len(self.depths) != 1):
            expected = "one stage" if self.family == "deit" else "one number per stage"
            raise ValueError(f"depths {self.depths} and num_heads {self.num_heads}: expected {expected}")
        if len(self.blocks) != sum(self.depths):
            raise ValueError(f"{len(self.blocks)} blocks; expected the {sum(self.depths)} of depths {self.depths}")
        for dim, heads in zip(self.dims, self.num_heads, strict=True):
            if dim % heads:
                raise ValueError(f"num_heads {heads} does not divide the {dim} channels of its stage")

    @classmethod
    def unpruned(
        cls,
        family: Family,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        patch_size: int,
        mlp_ratio: float = 4.0,
        alpha: float | None = None,
    ) -> "Architecture":
        """Self-attention and all hidden units in every block; `alpha` is the family's own where None."""
        blocks = [
            BlockChoice.of_mask("msa", [True] * int(embed_dim * 2**stage * mlp_ratio))
            for stage, depth in enumerate(depths)
            for _ in range(depth)
        ]
        alpha = ALPHA[family] if alpha is None else alpha
        return cls(
            family, embed_dim, tuple(depths), tuple(num_heads), patch_size, float(mlp_ratio), alpha, tuple(blocks)
        )

    @property
    def dims(self) -> list[int]:
        """Channels per stage."""
        return [self.embed_dim * 2**stage for stage in range(len(self.depths))]

    @property
    def stages(self) -> list[int]:
        """The stage of each block."""
        return [stage for stage, depth in enumerate(self.depths) for _ in range(depth)]

    def with_blocks(self, mixers: Sequence[Mixer], widths: Sequence[int]) -> "Architecture":
        """The same network with other blocks, of whose hidden units only the number is known."""
        return replace(self, blocks=tuple(BlockChoice(m, w) for m, w in zip(mixers, widths, strict=True)))

    def costs(self, img_size: int | tuple[int, int] = 224, num_classes: int = 1000, in_chans: int = 3) -> Costs:
        """Multiply-adds for one image by the authors' formula.

        It counts projections, attention, convolutions and two operations per normalised element, leaves the class token
        out of feed-forward networks, and gives Swin's last norm 2^stages instead of 4^(stages - 1) times fewer tokens
        than the first stage has.
        """
        sides = to_2tuple(img_size)
        grids = [
            tuple(ceil(side / (self.patch_size * 2**stage)) for side in sides) for stage in range(len(self.depths))
        ]
        if self.family == "deit":
            grids = [tuple(side // self.patch_size for side in sides)]
        tokens = [height * width for height, width in grids]
        dims, extra = self.dims, int(self.family == "deit")
        fixed = tokens[0] * dims[0] * in_chans * self.patch_size**2 + dims[-1] * num_classes
        if self.family == "swin":
            fixed += tokens[0] * dims[0] + dims[-1] * (tokens[0] // 2 ** len(dims))
            merged = zip(tokens, tokens[1:], dims, strict=False)
            fixed += sum(before * dim + after * 8 * dim**2 for before, after, dim in merged)
        mixers: list[Mapping[Mixer, int]] = []
        unit = []
        for stage in self.stages:
            dim, count = dims[stage], tokens[stage]
            head_dim = dim // self.num_heads[stage]
            fixed += 2 * dim * (count + extra)
            area, windows = count + 1, 1
            if self.family == "swin":
                side = min(WINDOW, *grids[stage])
                area, windows = side**2, ceil(grids[stage][0] / side) * ceil(grids[stage][1] / side)
            msa = (4 * area * dim**2 + 2 * area**2 * dim) * windows
            conv = {size: (size**2 + 1) * dim * head_dim * count for size in (1, 3)}
            mixers.append({"skip": 0, "1x1": conv[1], "3x3": conv[3], "msa": msa})
            unit.append(2 * count * dim)
        return Costs(fixed, tuple(mixers), tuple(unit))

    def macs(self, img_size: int | tuple[int, int] = 224, num_classes: int = 1000, in_chans: int = 3) -> int:
        """Multiply-adds of the pruned network by the formula of `costs`."""
        costs = self.costs(img_size, num_classes, in_chans)
        return costs.fixed + sum(
            mixers[block.mixer] + unit * block.width
            for block, mixers, unit in zip(self.blocks, costs.mixers, costs.unit, strict=True)
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON and YAML hold them."""
        plain = asdict(self)
        plain["blocks"] = [{k: v for k, v in block.items() if v is not None} for block in plain["blocks"]]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}

    def to_json(self) -> str:
        """One line per block."""
        plain = self.to_dict()
        blocks = ",\n".join("    " + json.dumps(block) for block in plain.pop("blocks"))
        head = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in plain.items())
        return f'{{\n{head},\n  "blocks": [\n{blocks}\n  ]\n}}\n'

    @classmethod
    def read(cls, source: "Architecture | Mapping[str, Any] | str | Path") -> "Architecture":
        """An architecture from what `to_dict` gives, from a JSON file, or by published name.

        Raises ValueError for a file that is missing or holds something else.
        """
        if isinstance(source, Architecture):
            return source
        if isinstance(source, Mapping):
            return cls._from_plain(source)
        if str(source) in PUBLISHED_ARCHITECTURES:
            return PUBLISHED_ARCHITECTURES[str(source)]
        try:
            return cls._from_plain(json.loads(Path(source).read_text()))
        except OSError as error:
            names = ", ".join(PUBLISHED_ARCHITECTURES)
            raise ValueError(
                f"{source}: no such architecture ({error.strerror}); expected a file or one of {names}"
            ) from None
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{source}: not the JSON of an architecture: {error}") from None

    @classmethod
    def _from_plain(cls, plain: Mapping[str, Any]) -> "Architecture":
        lists = {name: tuple(plain[name]) for name in ("depths", "num_heads")}
        blocks = tuple(BlockChoice(**block) for block in plain["blocks"])
        return cls(**{**plain, **lists, "blocks": blocks})


def _deit(embed_dim: int, num_heads: int) -> Architecture:
    return Architecture.unpruned("deit", embed_dim, (12,), (num_heads,), 16)


def _swin(embed_dim: int, depth: int, num_heads: Sequence[int]) -> Architecture:
    return Architecture.unpruned("swin", embed_dim, (2, 2, depth, 2), num_heads, 4)


DEIT_T, DEIT_S, DEIT_B = _deit(192, 3), _deit(384, 6), _deit(768, 12)
SWIN_T, SWIN_S, SWIN_B = _swin(96, 6, (3, 6, 12, 24)), _swin(96, 18, (3, 6, 12, 24)), _swin(128, 18, (4, 8, 16, 32))


def _of(network: Architecture, mixers: str, widths: str) -> Architecture:
    """Blocks in words: the mixers, each with a number of repetitions where there are several, and the widths."""
    expanded: list[Any] = []
    for word in mixers.split():
        name, _, times = word.partition("*")
        expanded += [name] * int(times or 1)
    return network.with_blocks(expanded, [int(width) for width in widths.split()])


# The architectures of the published configurations, by the names of their release files.
PUBLISHED_ARCHITECTURES: Mapping[str, Architecture] = {
    "spvit_deit_ti_l200_t10": _of(
        DEIT_T, "1x1*2 msa*10", "744 758 764 767 766 764 756 659 633 473 179 145"
    ),
    "spvit_deit_sm_l30_t32": _of(
        DEIT_S, "1x1 msa*11", "1304 1399 1344 1214 1251 1183 1140 925 742 391 104 103"
    ),
    "spvit_deit_bs_l008_t60": _of(
        DEIT_B, "1x1*3 3x3*2 msa*7", "1118 489 1050 1345 1336 1326 1431 1564 1606 1702 1290 190"
    ),
    "spvit_deit_bs_l006_t100": _of(
        DEIT_B, "1x1*3 3x3 msa*8", "1253 610 1343 1912 2354 2306 2483 2753 2869 2860 2443 934"
    ),
    "spvit_swin_t_l28_t32": _of(
        SWIN_T, "1x1 skip 1x1 skip msa*8", "186 152 646 504 1350 1319 1289 1249 1234 1082 3041 2994"
    ),
    "spvit_swin_sm_l04_t55": _of(
        SWIN_S,
        "1x1 skip msa*2 msa*12 skip 1x1 msa*2 skip*2 msa*2",
        "188 209 748 680 1159 1260 1127 1036 919 916 868 918 903 937 961 1037 1063 996 888 866 741 509 3064 3051",
    ),
    "spvit_swin_bs_l01_t100": _of(
        SWIN_B,
        "msa skip msa*2 msa*7 skip msa*6 skip 1x1 msa skip msa*2",
        "311 303 1011 980 1763 1673 1636 1523 1410 1377 1332 1345 1440 1426 1400 1315 1371 1321 1324 1265 1127 734 "
        "3572 2931",
    ),
}  # fmt: skip
