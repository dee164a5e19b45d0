"""Gradient checkpointing as a Lightning callback."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from efficiency import checkpointing
from efficiency.callback import EfficiencyCallback
from efficiency.saved_bytes import count_saved_bytes, megabytes


class GradientCheckpointing(EfficiencyCallback):
    """Computes blocks again in the backward pass instead of keeping their activations.

    The second batch of a training (in the first, other methods may still be at work on the network) passes through it
    two more times, to count for the report what is kept with it and without.
    """

    last = True  # blocks are those that are there in the end

    def __init__(self) -> None:
        super().__init__()
        self._kept: int | None = None
        self._plain: int | None = None
        self._steps = 0
        self._hook: torch.utils.hooks.RemovableHandle | None = None

    def convert(self, module: LightningModule) -> None:
        """Checkpoint the blocks of the network."""
        checkpointing.convert(module.network)  # type: ignore[arg-type]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count at the second batch."""
        if self._steps == 1:
            self._hook = pl_module.network.register_forward_pre_hook(self._count, with_kwargs=True)  # type: ignore[union-attr]
        self._steps += 1

    def _count(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (network.training and torch.is_grad_enabled()):
            return
        assert self._hook is not None
        self._hook.remove()
        self._kept = saved_bytes(network, args, kwargs)
        checkpointing.switch(network, False)
        try:
            self._plain = saved_bytes(network, args, kwargs)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
        finally:
            checkpointing.switch(network, True)

    def report_rows(self) -> list[tuple[str, str | int | float]]:
        """Bytes kept for the backward pass, plain and checkpointed."""
        if self._kept is None:
            return []
        if self._plain is None:
            return [("kept for backward", f"{megabytes(self._kept)}; without, it does not fit")]
        change = f"{megabytes(self._plain)} → {megabytes(self._kept)} ({self._kept / self._plain:.0%})"
        return [("kept for backward", change)]


def saved_bytes(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Bytes that a forward pass keeps; random numbers and buffers are as before afterwards."""
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with torch.random.fork_rng(), count_saved_bytes(network) as saved:
        network(*args, **kwargs)
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            buffer.copy_(buffers[name])
    return saved.total
