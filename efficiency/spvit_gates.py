"""Gates of SPViT's search (arXiv 2111.11802, sections 3.2 and 3.3): layers that hold every choice at once.

A gate is open with probability p = sigmoid(threshold). In training it is drawn (binary concrete distribution at
temperature 1, straight-through gradient), in evaluation it is open where p > 0.5. State-dict keys are official.
"""

from typing import Any

import torch
from torch import Tensor, nn

from backbones.spvit import Grid, TokenAttention
from backbones.spvit_architecture import MIXERS, TAPS, Mixer
from backbones.spvit_layers import FeedForward, SplitAttention, bottleneck, merged_kernel
from backbones.spvit_swin import WindowAttention, Windows

THRESHOLD = 1.5  # initial value, p = 0.82


def open_gates(thresholds: Tensor) -> Tensor:
    """Whether p > 0.5, as bool."""
    return thresholds.sigmoid() > 0.5


def drawn_gates(thresholds: Tensor, training: bool) -> Tensor:
    """Gates, 0 or 1, of thresholds: drawn in training, with the gradient of their relaxation, else p > 0.5."""
    if not training:
        return open_gates(thresholds).to(thresholds.dtype)
    smallest = torch.finfo(thresholds.dtype).eps
    uniform = torch.rand_like(thresholds).clamp(smallest, 1 - smallest)
    logits = uniform.logit() + thresholds.sigmoid().logit(smallest)
    return _straight_through(logits > 0, logits.sigmoid())


def expected_gates(thresholds: Tensor) -> Tensor:
    """Gates as the cost counts them: 1 where p > 0.5, with the gradient of sigmoid(p - 0.5)."""
    return _straight_through(open_gates(thresholds), (thresholds.sigmoid() - 0.5).sigmoid())


def _straight_through(gates: Tensor, relaxed: Tensor) -> Tensor:
    return gates.to(relaxed.dtype) + (relaxed - relaxed.detach())


class GatedMlp(FeedForward):
    """A feed-forward network with a gate on each hidden unit, behind the activation.

    The buffer ``assigned_indicator_index`` says in a state dict which units are open. It is not read.
    """

    assigned_indicator_index: Tensor

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__(dim, hidden)
        self.ffn_thresholds = nn.Parameter(torch.full((hidden,), THRESHOLD))
        self.register_buffer("assigned_indicator_index", torch.ones(hidden))
        self.register_state_dict_pre_hook(_write_indicators)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) or (B, H, W, C) to the same shape."""
        return self.fc2(self.act(self.fc1(x)) * drawn_gates(self.ffn_thresholds, self.training))


def _write_indicators(layer: Any, prefix: str, keep_vars: bool) -> None:
    layer.assigned_indicator_index.copy_(open_gates(layer.ffn_thresholds.detach()))


class Gated(SplitAttention):
    """Self-attention, 3 x 3 and 1 x 1 bottleneck convolution of the same weights, of which gates choose one or none.

    With nested gates g1, g1 g2, g1 g2 g3 the choices are 000 none, 100 the 1 x 1, 110 the 3 x 3 convolution and 111
    self-attention. All three are computed in every forward, so that the statistics of each batch norm are up to date.
    """

    alpha: float
    taps: tuple[int, ...]
    head_probs: nn.Parameter

    def add_gates(self, dim: int, alpha: float, taps: tuple[int, ...]) -> None:
        """Add what the choice needs to a self-attention with `dim` channels."""
        self.alpha, self.taps = alpha, taps
        self.head_probs = nn.Parameter(torch.ones(self.num_heads, 9))
        self.bn_1x1, self.bn_3x3 = (nn.BatchNorm2d(dim // self.num_heads) for _ in range(2))

    @property
    def thresholds(self) -> nn.Parameter:
        """Of the three gates."""
        raise NotImplementedError

    @property
    def mixer(self) -> Mixer:
        """The choice of the gates in evaluation."""
        return MIXERS[int(open_gates(self.thresholds.detach()).cumprod(0).sum())]

    def choose(self, small: Tensor, large: Tensor, attention: Tensor) -> Tensor:
        """Of the results of the 1 x 1 and 3 x 3 convolution and of self-attention the one that the gates choose.

        The official code also cuts the gradient of a gate where later ones are open. It is zero there already: what a
        gate of the nested product multiplies is then multiplied by zero.
        """
        one, two, three = drawn_gates(self.thresholds, self.training).cumprod(0)
        return three * attention + two * (1 - three) * large + one * (1 - two) * (1 - three) * small

    def convolutions(self, x: Tensor, neighbourhoods: Tensor) -> tuple[Tensor, Tensor]:
        """The 1 x 1 convolution of maps (B, H, W, C), the 3 x 3 one of other maps."""
        small = bottleneck(x, merged_kernel(self, 1), self.bn_1x1, self.proj.bias)
        return small, bottleneck(neighbourhoods, merged_kernel(self, 3), self.bn_3x3, self.proj.bias)


class GatedAttention(Gated, TokenAttention):
    """The choice of a DeiT's block; convolutions pass the class token by."""

    def __init__(self, dim: int, num_heads: int, alpha: float) -> None:
        super().__init__(dim, num_heads)
        self.add_gates(dim, alpha, TAPS["deit"])
        self.kernel_thresholds = nn.Parameter(torch.full((3,), THRESHOLD))

    @property
    def thresholds(self) -> nn.Parameter:
        """Of the three gates."""
        return self.kernel_thresholds

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, 1 + L, C) to the same shape, L being the product of `grid`."""
        patches = x[:, 1:].unflatten(1, grid)
        small, large = (
            torch.cat([x[:, :1], convolved.flatten(1, 2)], dim=1) for convolved in self.convolutions(patches, patches)
        )
        return self.choose(small, large, self.attend(x))


class GatedWindowAttention(Gated, WindowAttention):
    """The choice of a Swin Transformer's block; the 3 x 3 convolution stays inside its windows."""

    def __init__(self, dim: int, num_heads: int, side: int, alpha: float) -> None:
        super().__init__(dim, num_heads, side)
        self.add_gates(dim, alpha, TAPS["swin"])
        self.kernel_thresholds_full = nn.Parameter(torch.full((3,), THRESHOLD))

    @property
    def thresholds(self) -> nn.Parameter:
        """Of the three gates."""
        return self.kernel_thresholds_full

    def forward(self, x: Tensor, where: Windows) -> Tensor:
        """(B, H, W, C) to the same shape."""
        windows = where.split(x)
        small, large = self.convolutions(x, windows)
        mixed = self.attend(windows.flatten(1, 2), self.bias(windows.shape[0], where.mask)).view(windows.shape)
        return self.choose(small, where.join(large), where.join(mixed))
