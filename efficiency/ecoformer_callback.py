"""EcoFormer for the network of any task, as a Lightning callback."""

from __future__ import annotations

import copy
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.utils.hooks import RemovableHandle

from efficiency.callback import EfficiencyCallback
from efficiency.ecoformer import convert, fit_at_next_pass, hashed_layers, unfitted_layers
from efficiency.energy import count_operations, total


class EcoFormer(EfficiencyCallback):
    """Attention by binary codes (arXiv 2209.09004): conversion, hash functions, and energy in the report.

    A network without EcoFormer layers is converted, with the weights that it has then; one that has them, such as
    ``pvt_v2_b0_ecoformer``, stays as it is. Its hash functions are fitted to the first batch of a training, unless they
    were fitted before: a checkpoint holds them. The report shows operations and energy for one image.

    Args:
        num_bits: Bits of a code.
        num_anchors: Anchors of the kernel; a converted layer needs at least as many tokens.
        stages: Pyramid stages to convert, from 0; None is all but the last, and every block of a network without.
        refit_every: Fit again at the start of every so many epochs; None fits once. (The official training script says
            300, which is more epochs than its recipes have.)
    """

    exchanges_attention = True

    def __init__(
        self,
        num_bits: int = 16,
        num_anchors: int = 25,
        stages: list[int] | None = None,
        refit_every: int | None = None,
    ) -> None:
        super().__init__()
        if refit_every is not None and refit_every < 1:
            raise ValueError(f"EcoFormer: refit_every={refit_every}: expected at least 1 epoch, or null")
        self.num_bits, self.num_anchors, self.stages = num_bits, num_anchors, stages
        self.refit_every = refit_every
        self._waiting: list[RemovableHandle] = []
        self._module: LightningModule | None = None
        self._before: nn.Module | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Convert the network; raises ValueError for a refit under a moving average."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        averaged = getattr(pl_module, "ema_decay", None) or any(isinstance(c, WeightAveraging) for c in callbacks)
        if self.refit_every and averaged:
            raise ValueError(
                "EcoFormer: refit_every and a moving average of the weights exclude each other, since an average of "
                "old and new hash functions is neither; leave out refit_every or ema_decay"
            )
        super().setup(trainer, pl_module, stage)

    def convert(self, module: LightningModule) -> None:
        """Exchange the attention of `module.network` unless that has been done."""
        network: Any = module.network
        if not hashed_layers(network):
            self._before = copy.deepcopy(network).to("meta")
            convert(network, self.num_bits, self.num_anchors, self.stages)
        self._module = module

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Let the hash functions be fitted in this step where it is time."""
        epoch = trainer.current_epoch
        again = bool(self.refit_every) and epoch > 0 and epoch % (self.refit_every or 1) == 0 and batch_idx == 0
        first = epoch == 0 and batch_idx == 0
        if first or again:
            network: Any = pl_module.network
            self._waiting = fit_at_next_pass(network, only_unfitted=not again)
            if self._waiting:
                rank_zero_info(f"EcoFormer: fitting the hash functions of {len(self._waiting)} layers to this batch")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Forget layers that the step did not use."""
        for handle in self._waiting:
            handle.remove()
        self._waiting = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of an evaluation with random hash functions."""
        if not trainer.sanity_checking:
            _warn_of_random_codes(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of an evaluation with random hash functions."""
        _warn_of_random_codes(pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of predictions with random hash functions."""
        _warn_of_random_codes(pl_module)

    def report_rows(self) -> list[tuple[str, str | int | float]]:
        """Operations and energy of one image, and the energy before the network was converted."""
        if self._module is None:
            return []
        network: Any = self._module.network
        example: Any = self._module.example_input  # every task's module has it
        size = example().shape
        rows: list[tuple[str, str | int | float]] = [("layers with binary attention", len(hashed_layers(network)))]
        rows.append(("image, channels x height x width", " x ".join(map(str, size[1:]))))
        try:
            now = total(count_operations(network, size))
            before = total(count_operations(self._before, size)) if self._before is not None else None
        except (RuntimeError, NotImplementedError) as error:  # something in the network needs the values of tensors
            return [*rows, ("operations", f"not counted: {str(error).partition(chr(10))[0]}")]
        rows.append(("multiplications, 10⁹", round(now.multiplications / 1e9, 4)))
        rows.append(("additions, 10⁹", round(now.additions / 1e9, 4)))
        rows.append(("energy, 10⁹ pJ (45 nm, 32 bit)", round(now.energy_pj / 1e9, 4)))
        if before is not None:
            rows.append(("energy before the conversion, 10⁹ pJ", round(before.energy_pj / 1e9, 4)))
        return rows


def _warn_of_random_codes(module: LightningModule) -> None:
    network: Any = module.network
    if unfitted := unfitted_layers(network):
        rank_zero_warn(
            f"EcoFormer: the hash functions of {len(unfitted)} layers are random ({unfitted[0]}, …): train, or give a "
            "checkpoint that holds them"
        )
