"""What the Lightning callbacks of all efficiency methods share."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class EfficiencyCallback(Callback):
    """A method that changes a network before anything is made of it: its optimizer, moving average or DDP wrapper.

    Subclasses define `convert` and, for a table of their name in the report, `report_rows`. `loss_terms` are for what
    the task's loss does not know of. A network is converted once, whatever number of stages a run has. A checkpoint of
    a converted network is restored into the converted network. Those that attach to modules, and are `last`, come after
    those that exchange them, whatever their order.
    """

    last: ClassVar[bool] = False
    exchanges_attention: ClassVar[bool] = False

    def __init__(self) -> None:
        self._converted: LightningModule | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Convert the network of the module. Raises ValueError where callbacks exclude each other."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        others = [other for other in callbacks if isinstance(other, EfficiencyCallback) and other is not self]
        for other in others:
            if self.last and not other.last:
                other.setup(trainer, pl_module, stage)
            elif self.exchanges_attention and other.exchanges_attention:
                names = sorted(type(callback).__name__ for callback in (self, other))
                raise ValueError(f"{' and '.join(names)} both exchange the attention of a network: use one of them")
        before = itertools.takewhile(lambda callback: callback is not self, callbacks)
        if not self.last and any(isinstance(callback, WeightAveraging) for callback in before):
            raise ValueError(
                f"{type(self).__name__} exchanges parts of the network: list it before the moving average of weights"
            )
        if self._converted is not pl_module:
            self.convert(pl_module)
            self._converted = pl_module

    def convert(self, module: LightningModule) -> None:
        """Change `module.network` in place. Raises ValueError for a network that the method does not fit."""
        raise NotImplementedError

    def loss_terms(self, module: LightningModule) -> Mapping[str, Tensor]:
        """Scalars that `module.training_step` adds to its loss, by name."""
        return {}

    def report_rows(self) -> Sequence[tuple[str, str | int | float]]:
        """What the run's report says of the method: (what, value)."""
        return ()
