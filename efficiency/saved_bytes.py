"""Counts what a forward pass keeps for the backward pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

COUNTING: list[SavedBytes] = []  # tallies that count at the moment; Mesa's hooks hide tensors from those around them


class SavedBytes:
    """Bytes by the kind of layer that keeps them, parameters and buffers of `network` left out.

    Memory that several tensors share counts once, as a whole, for the first layer that keeps any. `plain` is what the
    saved tensors take as they are, `kept` what is really kept: the same without Mesa, its codes and ranges and the
    tensors it leaves alone with it.
    """

    def __init__(self, network: nn.Module) -> None:
        self.plain: dict[str, int] = defaultdict(int)
        self.kept: dict[str, int] = defaultdict(int)
        self.permanent = {id_of_storage(tensor) for tensor in (*network.parameters(), *network.buffers())}
        # References that do not keep the memory, but keep others from getting its number.
        self._seen: dict[int, tuple[StorageWeakRef, str]] = {}
        self._exact: set[int] = set()

    def see(self, tensor: Tensor, kind: str) -> str:
        """Count a saved tensor in `plain`, unless its memory is known; returns the kind under which it is."""
        number = id_of_storage(tensor)
        if number not in self.permanent and number not in self._seen:
            self._seen[number] = StorageWeakRef(tensor.untyped_storage()), kind
            self.plain[kind] += tensor.untyped_storage().nbytes()
        return self._seen[number][1] if number in self._seen else kind

    def keep(self, tensor: Tensor, kind: str) -> None:
        """Count a saved tensor in both, as one kept as it is."""
        number, kind = id_of_storage(tensor), self.see(tensor, kind)
        if number not in self.permanent and number not in self._exact:
            self._exact.add(number)
            self.kept[kind] += tensor.untyped_storage().nbytes()

    def holds(self, tensor: Tensor) -> bool:
        """Whether the memory of a tensor is kept as it is, for another one."""
        return id_of_storage(tensor) in self._exact

    def close(self) -> None:
        """Stop counting: numbers of storages mean nothing later."""
        self._seen.clear()

    @property
    def total(self) -> int:
        """All bytes kept."""
        return sum(self.kept.values())

    @property
    def plain_total(self) -> int:
        """All bytes that the saved tensors take as they are."""
        return sum(self.plain.values())


def id_of_storage(tensor: Tensor) -> int:
    """A number that no two storages have at the same time."""
    return int(tensor.untyped_storage()._cdata)


class Exact(NamedTuple):
    """A tensor kept as it is, without its graph: an output that knew its own would never be freed."""

    tensor: Tensor
    version: int

    def restore(self) -> Tensor:
        """The tensor. Raises RuntimeError when it was changed in place since, as PyTorch does without hooks."""
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a {self.tensor.dtype} tensor of shape {tuple(self.tensor.shape)} that is needed for the gradient was "
                "changed in place after the forward pass"
            )
        return self.tensor


def keep_exact(tensor: Tensor) -> Exact:
    """Keep a tensor as it is."""
    return Exact(tensor.detach(), tensor._version)


@contextmanager
def count_saved_bytes(network: nn.Module) -> Iterator[SavedBytes]:
    """Count, while the context lasts, what operations keep for backward; Mesa and checkpointing may be at work in it.

    The unique storages that a saved-tensor hook sees, without parameters and buffers of `network`, and in place of
    those that Mesa takes its codes and ranges. Memory that a checkpointed block needs while it is computed again is
    not in it.
    """
    tally = SavedBytes(network)

    def pack(tensor: Tensor) -> Exact:
        tally.keep(tensor, "all")
        return keep_exact(tensor)

    COUNTING.append(tally)
    try:
        with saved_tensors_hooks(pack, Exact.restore):
            yield tally
    finally:
        COUNTING.remove(tally)
        tally.close()


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Mixed precision in `dtype`, none for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def megabytes(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 1e6:.1f} MB"
