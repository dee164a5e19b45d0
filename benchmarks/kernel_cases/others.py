"""Sampling, pooling and quantisation: `ms_deform_attn`, `boundary_max_pool` and `quantize`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.kernel_cases.base import (
    FORWARD,
    OURS,
    Candidate,
    Case,
    Draw,
    Inputs,
    as_tuple,
    reference_and_compiled,
)
from kernels import quantize as codes_8bit
from kernels import quantized_layers as layers_8bit
from kernels.boundary_max_pool import boundary_max_pool, boundary_max_pool_reference
from kernels.ms_deform_attn import ms_deform_attn, ms_deform_attn_reference

COPY = "copy of as many bytes"
LEVELS = 256


@dataclass(frozen=True, kw_only=True)
class DeformableCase(Case):
    """Every position of all `maps` reads `points` points of each of them; `dim` per head."""

    op: ClassVar[str] = "ms_deform_attn"
    maps: tuple[tuple[int, int], ...]
    heads: int
    dim: int
    points: int

    def inputs(self, draw: Draw) -> Inputs:
        """value (B, S, heads, d), locations around each position (B, S, heads, levels, points, 2), weights."""
        positions = torch.cat([_centres(*size, draw.device) for size in self.maps])  # (S, 2)
        layout = (self.batch, len(positions), self.heads, len(self.maps), self.points)
        offsets = draw.normal(*layout, 2, grad=False).float() * 0.05
        locations = (positions[:, None, None, None] + offsets).requires_grad_()  # half precision would miss pixels
        weights = draw.normal(*layout, grad=False).flatten(3).softmax(-1).view(layout).requires_grad_()
        value = draw.normal(self.batch, len(positions), self.heads, self.dim)
        return {"value": value, "locations": locations, "weights": weights}

    def reference(self, inputs: Inputs) -> Tensor:
        """One `grid_sample` per level."""
        return self._sample(ms_deform_attn_reference, inputs)

    def candidates(self) -> dict[str, Candidate]:
        """The `grid_sample` form as it is and compiled."""
        return {
            OURS: Candidate(lambda inputs: self._sample(ms_deform_attn, inputs)),
            **reference_and_compiled(self.reference),
        }

    def _sample(self, sample: Callable[..., Tensor], inputs: Inputs) -> Tensor:
        return sample(inputs["value"], self.maps, inputs["locations"], inputs["weights"])


def _centres(height: int, width: int, device: torch.device) -> Tensor:
    """Centres (x, y) of the pixels of a map in [0, 1], (H * W, 2)."""
    y = (torch.arange(height, device=device) + 0.5) / height
    x = (torch.arange(width, device=device) + 0.5) / width
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1).flatten(0, 1)


@dataclass(frozen=True, kw_only=True)
class BoundaryCase(Case):
    """A feature of `channels` over `length` time steps, and `proposals` windows around its proposals' boundaries."""

    op: ClassVar[str] = "boundary_max_pool"
    channels: int
    length: int
    proposals: int

    def inputs(self, draw: Draw) -> Inputs:
        """feature (B, C, T) and windows (B, S, 4), a tenth of a proposal wide on either side of its boundaries."""
        boundaries = draw.uniform(self.batch, self.proposals, 2, grad=False).float().sort(-1).values * self.length
        reach = (boundaries[..., 1:] - boundaries[..., :1]).clamp(min=10) / 10
        windows = torch.stack([boundaries - reach, boundaries + reach], dim=-1).flatten(2)
        return {"feature": draw.normal(self.batch, self.channels, self.length), "windows": windows}

    def reference(self, inputs: Inputs) -> Tensor:
        """A maximum over a mask."""
        return boundary_max_pool_reference(inputs["feature"], inputs["windows"])

    def candidates(self) -> dict[str, Candidate]:
        """The masked maximum as it is and compiled."""
        return {
            OURS: Candidate(lambda inputs: boundary_max_pool(inputs["feature"], inputs["windows"])),
            **reference_and_compiled(self.reference),
        }


# What of 8-bit activations runs, and its reference; each gets the inputs by name.
QUANTIZED: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "group_range": (codes_8bit.group_range, codes_8bit.group_range_reference),
    "quantize": (codes_8bit.quantize, codes_8bit.quantize_reference),
    "dequantize": (codes_8bit.dequantize, codes_8bit.dequantize_reference),
    "gelu backward": (layers_8bit.gelu_backward_8bit, layers_8bit.gelu_backward_reference),
    "softmax backward": (layers_8bit.softmax_backward_8bit, layers_8bit.softmax_backward_reference),
    "layer norm backward": (layers_8bit.layer_norm_backward_8bit, layers_8bit.layer_norm_backward_reference),
}


@dataclass(frozen=True, kw_only=True)
class QuantizeCase(Case):
    """One step of Mesa on activations of `shape` per image, in `groups` groups: (N, C), or (heads, N, N)."""

    op: ClassVar[str] = "quantize"
    passes: ClassVar[tuple[str, ...]] = (FORWARD,)
    yardstick_inputs: ClassVar[tuple[str, ...]] = ("source", "destination")
    step: str
    shape: tuple[int, ...]
    groups: int

    def inputs(self, draw: Draw) -> Inputs:
        """What the step reads, and two buffers for a copy that moves as many bytes as the step must."""
        shape = (self.batch, *self.shape)
        numbers = draw.normal(*shape, grad=False)
        if self.step == "softmax backward":
            numbers = numbers.softmax(-1)
        if self.step == "group_range":
            inputs = {"x": numbers}
        else:
            low, high = codes_8bit.group_range_reference(numbers, self.groups)
            inputs = {"span": (high - low).float(), "shift": low.float()}
            if self.step == "quantize":
                inputs |= {"x": numbers}
            else:
                inputs["codes"] = codes_8bit.quantize_reference(numbers, inputs["span"], inputs["shift"])
        if self.step.endswith("backward"):
            inputs["grad"] = draw.normal(*shape, grad=False)
        if self.step.startswith("layer norm"):
            mean, rstd = numbers.float().mean(-1), numbers.float().var(-1, correction=0).rsqrt()
            inputs |= {"mean": mean.flatten(), "rstd": rstd.flatten(), "weight": draw.normal(shape[-1], grad=False)}
        if self.step == "dequantize":
            inputs["like"] = numbers.new_empty(0)  # its dtype is asked for
        outputs = as_tuple(self.reference(inputs))
        moved = sum(tensor.nbytes for tensor in (*inputs.values(), *outputs))
        source = torch.randint(256, (moved // 2,), dtype=torch.uint8, device=draw.device, generator=draw.generator)
        return inputs | {"source": source, "destination": torch.empty_like(source)}

    def reference(self, inputs: Inputs) -> Tensor | tuple[Tensor, ...]:
        """The definition."""
        return self._run(QUANTIZED[self.step][1], inputs)

    def candidates(self) -> dict[str, Candidate]:
        """A copy of as many bytes as the yardstick, and the definition as it is and compiled."""
        return {
            OURS: Candidate(lambda inputs: self._run(QUANTIZED[self.step][0], inputs)),
            COPY: Candidate(lambda inputs: inputs["destination"].copy_(inputs["source"]), comparable=False),
            **reference_and_compiled(self.reference),
        }

    def _run(self, function: Callable[..., Any], inputs: Inputs) -> Tensor | tuple[Tensor, ...]:
        read: dict[str, Any] = {name: tensor for name, tensor in inputs.items() if name not in self.yardstick_inputs}
        if "like" in read:
            read["dtype"] = read.pop("like").dtype
        outputs: Tensor | tuple[Tensor, ...] = function(
            **read, **({"groups": self.groups} if self.step == "group_range" else {"levels": LEVELS})
        )
        return outputs
