"""Gradient checkpointing of any network: blocks keep their input and are computed again in the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def convert(network: nn.Module) -> nn.Module:
    """Checkpoint the blocks of `network` in training; returns it, weights, names and outputs unchanged.

    Networks that can do it themselves (timm's and ours, also as parts of others) are told to. In others the members of
    the innermost lists of blocks are wrapped; a block is a module made of others. Batch norms count a batch once.
    Raises ValueError when there is nothing to checkpoint.
    """
    if not switch(network, True):
        blocks = list(_blocks(network))
        if not blocks:
            raise ValueError(f"{type(network).__name__} has no blocks to checkpoint: no list of modules made of others")
        for block in blocks:
            cls: Any = type(block)
            block.__class__ = _checkpointed(cls)
    for module in network.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            _Statistics().attach(module)
    return network


def switch(network: nn.Module, enable: bool) -> bool:
    """Turn the checkpointing of `network` on or off; returns whether there is any."""
    if isinstance(network, CheckpointedBlock):
        network.checkpointing = enable
        return True
    try:
        network.set_grad_checkpointing(enable)  # type: ignore[operator]
        return True
    except (AttributeError, AssertionError, NotImplementedError):  # how timm says that it has none
        switched = [switch(child, enable) for child in network.children()]
        return any(switched)


class _Statistics:
    """Leaves the running statistics of a batch norm as they are where its block is computed again."""

    def __init__(self) -> None:
        self.before: tuple[float | None, Tensor | None] | None = None

    def attach(self, norm: _BatchNorm) -> None:
        """Register the hooks."""
        norm.register_forward_pre_hook(self.pause)
        norm.register_forward_hook(self.resume, always_call=True)  # the second pass can end in the middle of a block

    def pause(self, norm: _BatchNorm, _args: Any) -> None:
        """Let the norm move nothing, in a backward pass."""
        if norm.training and torch._C._current_graph_task_id() != -1:
            self.before = norm.momentum, norm.num_batches_tracked
            norm.momentum = 0.0
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked = norm.num_batches_tracked.clone()

    def resume(self, norm: _BatchNorm, *_: Any) -> None:
        """Undo `pause`."""
        if self.before is not None:
            norm.momentum, norm.num_batches_tracked = self.before
            self.before = None


class CheckpointedBlock:
    """Goes before the class of a block among its bases."""

    checkpointing = True
    training: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the block."""
        forward = super().forward  # type: ignore[misc]
        if not (self.checkpointing and self.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)


@functools.cache
def _checkpointed(cls: Any) -> Any:
    return type(cls.__name__, (CheckpointedBlock, cls), {})


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """Members of the innermost lists of modules that are made of others."""
    lists = (nn.ModuleList, nn.Sequential)
    for module in network.modules():
        for child in module.children() if isinstance(module, lists) else ():
            whole = any(True for _ in child.children()) and not isinstance(child, lists)
            if whole and next(_blocks(child), None) is None:
                yield child
