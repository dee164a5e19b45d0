"""Mesa (arXiv 2111.11124): exact forward pass, activations kept for the backward pass in 8 bits.

Nothing in the network changes: while it trains, a hook of autograd sees every tensor that an operation saves, wherever
in the code it runs, and keeps codes with a running range per group in its place (`kernels/quantize.py`). A ReLU keeps
one bit per number.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from backbones.machine import time_now
from efficiency.mesa_layers import Groups, Layer, describe, groups_of, of_parameters
from efficiency.mesa_policy import Policy
from efficiency.saved_bytes import COUNTING, Exact, SavedBytes, id_of_storage, keep_exact
from kernels.quantize import RunningRange, dequantize, quantize, update_range

MIN_SIZE = 1024  # numbers; smaller tensors are not worth their ranges
SEEDS = 64  # drawn at a time
TINY = 1e-12  # keeps the deviation of a constant row from zero
COORDINATES = 3  # so few numbers in a row are a place or a statistic, and no features
LONG_ROW = 256  # neighbours of one group from which on rows, not columns, are the faster layout


def convert(
    network: nn.Module,
    policy: Policy | str | Path | None = None,
    *,
    num_groups: int | None = None,
    group_size: int = 32,
    upstream: bool = False,
) -> nn.Module:
    """Let `network` keep its activations in 8 bits while it trains; returns it, weights, names and outputs unchanged.

    In evaluation and without gradients it runs as before. What is kept depends on the kind of the module that runs, see
    `Policy`. Parameters, tensors without gradient (statistics, masks) and small ones stay as they are; of checkpointed
    blocks only the inputs are kept, in 8 bits. Double backward works, with restored numbers. Rounding is random, from
    the state of torch's generator, which it does not advance. What `torch.compile` has compiled keeps its own tensors,
    exactly.

    Args:
        network: Any module. It is the one whose forward pass counts: what is computed outside of it is not touched.
        policy: Settings by kind of layer, or an official policy file; None compresses all kinds.
        num_groups: Groups in every layer; None has the number of heads of the nearest attention.
        group_size: Channels per group where that does not divide the channels.
        upstream: Compute as the official code does without its noise: values above the range wrap around.

    Raises ValueError when it is converted already or the policy file is wrong.
    """
    if find(network) is not None:
        raise ValueError("the network keeps its activations in 8 bits already, convert it once")
    if group_size < 1 or (num_groups is not None and num_groups < 1):
        raise ValueError(f"num_groups is {num_groups} and group_size {group_size}, expected at least 1")
    Compressor(describe(network, policy), num_groups, group_size, upstream).attach(network)
    return network


def find(network: nn.Module) -> Compressor | None:
    """What `convert` attached to the network, or to a part of it."""
    for module in network.modules():
        for hook in module._forward_pre_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, Compressor):
                return owner
    return None


class Codes:
    """A compressed tensor: codes (rows, columns) in the order of its memory, and their range, which is a copy.

    `rows` are mean and deviation of every row where codes stand for normalised rows.
    """

    __slots__ = ("__weakref__", "data", "levels", "rows", "shift", "span", "upstream")

    def __init__(
        self, codes: Tensor, span: Tensor, shift: Tensor, levels: int, upstream: bool, rows: Sequence[Tensor]
    ) -> None:
        self.data, self.span, self.shift, self.levels, self.upstream = codes, span, shift, levels, upstream
        self.rows = rows

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return sum(tensor.nbytes for tensor in (self.data, self.span, self.shift, *self.rows))

    def restore(self, dtype: torch.dtype) -> Tensor:
        """The numbers, in the shape of the codes."""
        inner = torch.promote_types(dtype, torch.float32) if self.rows else dtype
        numbers = dequantize(self.data, self.span, self.shift, levels=self.levels, dtype=inner, upstream=self.upstream)
        if self.rows:
            mean, deviation = self.rows
            numbers = torch.addcmul(mean, numbers, deviation).to(dtype)
        return numbers


class Signs:
    """The output of a ReLU: one bit per number, whether it is positive."""

    __slots__ = ("__weakref__", "data", "size")

    def __init__(self, output: Tensor) -> None:
        self.data, self.size = pack_bits(output <= 0), output.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return self.data.nbytes

    def restore(self, dtype: torch.dtype) -> Tensor:
        """1 where it was positive, else 0."""
        return (~unpack_bits(self.data, self.size)).to(dtype)


def pack_bits(mask: Tensor) -> Tensor:
    """Eight neighbours along dimension 1 of a bool tensor to a byte, the first one in the highest bit.

    (B, C, ...) to uint8 (B, ceil(C / 8), ...), filled with zeros.
    """
    bits = mask.movedim(1, -1)
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 8)).unflatten(-1, (-1, 8))
    weights = 2 ** torch.arange(7, -1, -1, device=mask.device, dtype=torch.uint8)
    return (bits * weights).sum(-1, dtype=torch.uint8).movedim(-1, 1)


def unpack_bits(packed: Tensor, size: int) -> Tensor:
    """Undo `pack_bits` for `size` neighbours; returns bool."""
    places = torch.arange(7, -1, -1, device=packed.device, dtype=torch.uint8)
    bits = (packed.movedim(1, -1)[..., None] >> places) & 1
    return bits.flatten(-2)[..., :size].bool().movedim(-1, 1)


class Kept(NamedTuple):
    """What stands for a saved tensor until backward; several may share their codes."""

    packed: Codes | Signs
    dtype: torch.dtype
    shape: torch.Size  # in the order of memory
    order: list[int]  # where each dimension is in it


class Compressor:
    """The hooks of one network, the running ranges of what its layers save, and what they saved last.

    A range belongs to a module and to the number of the tensor among those that the module saves in one forward pass,
    so that the calls of a shared layer have one each. Processes of one training do not share them.
    """

    def __init__(self, layers: Mapping[str, Layer], num_groups: int | None, group_size: int, upstream: bool) -> None:
        self.layers, self.num_groups, self.group_size, self.upstream = layers, num_groups, group_size, upstream
        self.ranges: dict[str, RunningRange] = {}
        self.passes = 0
        self.saved: SavedBytes | None = None  # of the last forward pass
        self.timed = False  # count `seconds`; on a GPU this waits for it
        self.seconds = 0.0
        self._contexts: list[saved_tensors_hooks | None] = []
        self._reset()

    def _reset(self) -> None:
        self._running: list[str] = []
        self._slots: dict[str, int] = defaultdict(int)
        self._inputs: set[int] = set()
        self._shared: dict[tuple[Any, ...], weakref.ref[Codes | Signs]] = {}
        self._seeds: dict[torch.device, list[Tensor]] = defaultdict(list)
        self._generator: torch.Generator | None = None

    def attach(self, network: nn.Module) -> None:
        """Register the hooks."""
        network.register_forward_pre_hook(self.enter, with_kwargs=True, prepend=True)
        for name, module in network.named_modules():
            module.register_forward_pre_hook(partial(self._begin, name))
            module.register_forward_hook(self._end)
        network.register_forward_hook(self.leave, always_call=True)

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Running ranges, and what the rounding depends on beside torch's generator."""
        ranges = {name: [tensor.clone() for tensor in running] for name, running in self.ranges.items()}
        return {"ranges": ranges, "passes": self.passes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.ranges = {
            name: RunningRange(*(tensor.clone() for tensor in running)) for name, running in state["ranges"].items()
        }
        self.passes = state["passes"]

    # -- hooks of modules -----------------------------------------------------------------------------------------

    def enter(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Start to compress, in the forward pass of a training step."""
        if self._contexts or not (network.training and torch.is_grad_enabled()):
            self._contexts.append(None)
            return
        self._reset()
        self.passes += 1
        self.saved = SavedBytes(network)
        # Whoever calls keeps the inputs alive.
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        self._inputs = {id_of_storage(tensor) for tensor in tensors if not tensor.requires_grad}
        context = saved_tensors_hooks(self._pack, self._unpack)
        context.__enter__()
        self._contexts.append(context)

    def leave(self, *_: Any) -> None:
        """Stop, after an error too."""
        context = self._contexts.pop()
        if context is not None:
            context.__exit__(None, None, None)
            assert self.saved is not None
            self.saved.close()
            self._reset()

    def _begin(self, name: str, *_: Any) -> None:
        if self._contexts:
            self._running.append(name)

    def _end(self, *_: Any) -> None:
        if self._contexts:
            self._running.pop()

    # -- hooks of autograd ----------------------------------------------------------------------------------------

    def _pack(self, tensor: Tensor) -> Kept | Exact:
        begin = self._time(tensor)
        assert self.saved is not None
        layer = self.layers[self._running[-1]]
        tallies = (self.saved, *COUNTING)
        if id_of_storage(tensor) in self.saved.permanent or of_parameters(tensor):
            kept, tag = None, "copies of weights"
        else:
            kept, tag = self._compress(tensor, layer, tallies), layer.tag
        if kept is None:
            for tally in tallies:
                tally.keep(tensor, tag)
            return keep_exact(tensor)
        self.seconds += self._time(tensor) - begin
        return kept

    def _unpack(self, kept: Kept | Exact) -> Tensor:
        if isinstance(kept, Exact):
            return kept.restore()
        begin = self._time(kept.packed.data)
        restored = kept.packed.restore(kept.dtype).view(kept.shape).permute(kept.order)
        self.seconds += self._time(restored) - begin
        return restored

    def _time(self, tensor: Tensor) -> float:
        return time_now(tensor.device) if self.timed else 0.0

    def _compress(self, tensor: Tensor, layer: Layer, tallies: Sequence[SavedBytes]) -> Kept | None:
        """Codes of a saved tensor, once per memory; None for what is to stay as it is."""
        if not self._is_activation(tensor, layer):
            return None
        groups = groups_of(tensor.shape, layer, self.num_groups, self.group_size)
        if groups.width <= COORDINATES and layer.tag != "relu" and not self.upstream:
            return None
        # A transposed or reshaped view of the same memory finds the codes of the first one.
        strides = tensor.stride()
        by_stride = sorted(range(tensor.ndim), key=lambda dim: -strides[dim])
        memory = tensor.detach().permute(by_stride)
        extent = (memory.numel(),) if memory.is_contiguous() else (*memory.shape, *memory.stride())
        place = id_of_storage(tensor), tensor.storage_offset(), tensor.dtype, tensor._version
        key = (layer.tag == "relu", *place, *extent)
        known = self._shared.get(key)
        packed = known() if known is not None else None
        if packed is None:
            if layer.tag == "relu":
                packed = Signs(memory)
            else:
                packed = self._encode(memory, by_stride.index(groups.dim), groups, layer)
            self._shared[key] = weakref.ref(packed)
            for tally in tallies:
                tally.kept[tally.see(tensor, layer.tag)] += packed.nbytes
        return Kept(packed, tensor.dtype, memory.shape, [by_stride.index(dim) for dim in range(tensor.ndim)])

    def _is_activation(self, tensor: Tensor, layer: Layer) -> bool:
        if not layer.setting.enable or not tensor.is_floating_point() or tensor.ndim < 2:
            return False
        if tensor.numel() < (1 if self.upstream else MIN_SIZE) or 0 in tensor.stride():
            return False
        assert self.saved is not None
        if id_of_storage(tensor) in self._inputs or self.saved.holds(tensor):
            return False
        # A layer with weights needs its input, whether or not something before it is trained.
        return tensor.requires_grad or layer.tag in ("fc", "conv")

    def _encode(self, memory: Tensor, dim: int, groups: Groups, layer: Layer) -> Codes:
        """Codes of a tensor whose dimension `dim` has the groups; moves the running range of its place first."""
        inner = memory.shape[dim + 1 :].numel()
        x = memory.reshape(-1, groups.size, inner, 1) if inner >= LONG_ROW else memory.reshape(-1, groups.size * inner)
        rows: Sequence[Tensor] = ()
        if layer.tag == "layernorm" and inner == 1 and not self.upstream:
            # The layer looks at every row in its own scale, which can be far below that of the others.
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
            rows = mean, (variance + TINY).sqrt_()
            x = (x - rows[0]) / rows[1]
        place = f"{layer.name}:{self._slots[layer.name]}"
        self._slots[layer.name] += 1
        running = self._range(place, groups.groups, x)
        update_range(x, running, decay=layer.setting.decay)
        span, shift = running.span.clone(), running.shift.clone()
        seed = None if self.upstream else self._seed(x.device)
        codes = quantize(x, span, shift, levels=layer.setting.levels, seed=seed, upstream=self.upstream)
        return Codes(codes, span, shift, layer.setting.levels, self.upstream, rows)

    def _range(self, place: str, count: int, x: Tensor) -> RunningRange:
        running = self.ranges.get(place)
        if running is None or running.span.numel() != count:
            dtype = x.dtype if self.upstream else torch.promote_types(x.dtype, torch.float32)
            zeros = torch.zeros(count, dtype=dtype, device=x.device)
            running = RunningRange(zeros, zeros.clone(), torch.zeros(1, device=x.device))
        elif running.span.device != x.device:
            running = RunningRange(*(tensor.to(x.device) for tensor in running))
        self.ranges[place] = running
        return running

    def _seed(self, device: torch.device) -> Tensor:
        """The next seed of this forward pass."""
        if not self._seeds[device]:
            if self._generator is None:
                self._generator = torch.Generator()
                self._generator.set_state(torch.get_rng_state())
                # Nothing may have drawn from the generator since the last pass.
                start = int(torch.randint(2**62, (1,), generator=self._generator)) + self.passes
                self._generator.manual_seed(start)
            drawn = torch.randint(2**31, (SEEDS,), generator=self._generator).to(device)
            self._seeds[device] = list(drawn.split(1))
        return self._seeds[device].pop()
