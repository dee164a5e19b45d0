"""What every task's LightningModule shares: optimizer, schedule, clipping, EMA, weights and evaluation under DDP."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from efficiency.callback import EfficiencyCallback
from tasks.core.errors import UserError, expect
from tasks.core.optim import OptimConfig, build_optimizer, build_scheduler, for_training
from tasks.core.report import ReportParts


class TaskModule(LightningModule):
    """Base of all tasks. A task adds its network, `training_step`, `evaluation_step`, metrics and predictions.

    Subclasses set `task`, `monitor` (the headline metric, e.g. ``val/mIoU``) and `mode` and call
    `remember_hyperparameters(locals())` so that ``Class.load_from_checkpoint(path)`` needs nothing else.
    `predict_step` returns records ``{id: value}`` and `prediction_files` makes files of them, per sample or, unless
    `one_file_per_sample`, of those of the whole data set.
    `from_data` names the options that the command line takes from the data, by attribute of the datamodule.
    Every parameter takes part in the loss of every step, if only with a zero gradient (no targets, no windows): DDP
    then needs no `find_unused_parameters`, which would walk the graph in each step.

    Args:
        optim: Optimizer, schedule and gradient clipping.
        ema_decay: Decay of the exponential moving average of the weights per step; evaluation and checkpoints then
            use the average. None trains without.
    """

    task: ClassVar[str]
    monitor: ClassVar[str]
    mode: ClassVar[Literal["min", "max"]] = "max"
    one_file_per_sample: ClassVar[bool] = False
    from_data: ClassVar[Mapping[str, str]] = {"num_classes": "num_classes"}
    network: nn.Module

    def __init__(self, optim: OptimConfig | Mapping[str, Any] | None = None, ema_decay: float | None = None) -> None:
        super().__init__()
        if not isinstance(optim, OptimConfig):  # a checkpoint holds plain values
            optim = OptimConfig(**(optim or {}))
        if ema_decay is not None:
            expect("model.ema_decay", ema_decay, 0 < ema_decay < 1, "a decay between 0 and 1, or null")
        self.optim = optim
        self.ema_decay = ema_decay

    def remember_hyperparameters(self, arguments: Mapping[str, Any]) -> None:
        """Save the constructor's `locals()` as plain values; `weights` is left out, the checkpoint replaces it."""
        skipped = {"self", "weights", "pretrained", "__class__"}
        plain = {
            k: dataclasses.asdict(v) if dataclasses.is_dataclass(v) and not isinstance(v, type) else v
            for k, v in arguments.items()
            if k not in skipped
        }
        self.save_hyperparameters(plain)

    # -- optimisation ---------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """Optimizer and per-update schedule over the whole training, both made by timm."""
        total_steps = self.trainer.estimated_stepping_batches
        if total_steps == math.inf:
            raise UserError("trainer.max_steps and trainer.max_epochs are -1: the schedule needs an end; give one")
        config = self._optim_of_this_training()
        optimizer = build_optimizer(self.network, config)
        scheduler = build_scheduler(optimizer, config, int(total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _optim_of_this_training(self) -> OptimConfig:
        """`optim` for the global batch and the length of an epoch at hand; says what the learning rate became."""
        trainer, global_batch, updates_per_epoch = self.trainer, 1, 0
        if self.optim.reference_batch_size:
            batch_size = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
            if batch_size is None:
                raise UserError("optim.reference_batch_size: needs a datamodule with batch_size; got loaders alone")
            global_batch = batch_size * trainer.world_size * trainer.accumulate_grad_batches
        if self.optim.warmup_epochs:
            trainer.fit_loop.setup_data()
            updates_per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        config = for_training(self.optim, global_batch, updates_per_epoch)
        if self.optim.reference_batch_size:
            rank_zero_info(f"learning rate {config.lr:.1e} for a global batch of {global_batch}")
        return config

    def on_train_start(self) -> None:
        """Say where a resumed training continues."""
        if self.trainer.ckpt_path:
            total = int(self.trainer.estimated_stepping_batches)
            rank_zero_info(
                f"resuming {self.trainer.ckpt_path}: epoch {self.current_epoch}, step {self.global_step} of {total}"
            )

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """timm's schedulers count updates themselves."""
        scheduler.step_update(num_updates=self.global_step)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip the global L2 norm to `optim.clip_grad` unless the Trainer was given its own clipping."""
        value = self.optim.clip_grad if gradient_clip_val is None else gradient_clip_val
        self.clip_gradients(
            optimizer, gradient_clip_val=value, gradient_clip_algorithm=gradient_clip_algorithm or "norm"
        )

    def configure_callbacks(self) -> list[Callback]:
        """The moving average of the weights, when asked for."""
        return [EMAWeightAveraging(decay=self.ema_decay)] if self.ema_decay else []

    def on_fit_start(self) -> None:
        """Keep what the process was seeded with."""
        self._seed = torch.initial_seed()

    def with_loss_terms(self, loss: Tensor) -> Tensor:
        """The loss of a step plus the terms of efficiency methods, which are logged; for `training_step`.

        They are part of the step's graph, so that automatic mixed precision, DDP and accumulation treat them alike.
        """
        for callback in getattr(self._trainer, "callbacks", ()):
            if isinstance(callback, EfficiencyCallback):
                for name, term in callback.loss_terms(self).items():
                    self.log(f"train/loss_{name}", term)
                    loss = loss + term
        return loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Draw what is random in a step (points, dropout, mixup) from (seed, process, epoch, batch) alone.

        A resumed training then takes the steps of an uninterrupted one, and no two processes draw the same numbers.
        """
        sequence = np.random.SeedSequence((self._seed, self.global_rank, self.current_epoch, batch_idx))
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
        np.random.seed(sequence.generate_state(4))  # noqa: NPY002 (timm's mixup draws from the global generator)

    # -- evaluation -----------------------------------------------------------------------------------------------

    def evaluation_step(self, batch: Any, stage: str) -> None:
        """Update the metrics of `stage` ("val" or "test") with one batch."""
        raise NotImplementedError

    def evaluation_results(self, stage: str) -> dict[str, float | Tensor]:
        """The epoch's metrics over all processes, by name without the stage; resets them."""
        raise NotImplementedError

    def report_parts(self, datamodule: LightningDataModule) -> ReportParts:
        """Tables and pictures of the last evaluation for the report."""
        return ReportParts()

    def example_input(self) -> Tensor:
        """One input of the network, for the cost table."""
        raise NotImplementedError

    def prediction_files(self, records: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
        """Name below the output folder (``/`` between folders) and content of each file made of `records` by id."""
        raise NotImplementedError

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """One batch of the validation split."""
        self.evaluation_step(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """One batch of the test split."""
        self.evaluation_step(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self._log_results("val")

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self._log_results("test")

    def _log_results(self, stage: str) -> None:
        results = self.evaluation_results(stage)
        headline = self.monitor.split("/", 1)[1]
        for name, value in results.items():
            # every process computed the same value from the same synchronised states
            self.log(
                f"{stage}/{name}",
                torch.as_tensor(value, dtype=torch.float64, device="cpu").to(self.device, self._log_dtype),
                prog_bar=name == headline,
            )

    @property
    def _log_dtype(self) -> torch.dtype:
        return torch.float32 if self.device.type == "mps" else torch.float64

    def on_validation_epoch_start(self) -> None:
        """Give every process rank 0's buffers, then stop DDP from broadcasting them in each forward.

        Processes evaluate different numbers of samples, and a broadcast in the forward would wait for the others.
        The moving average, whose buffers also differ between processes, is in place by now.
        """
        wrapper = self.trainer.model
        if isinstance(wrapper, DistributedDataParallel):
            for buffer in self.buffers():
                dist.broadcast(buffer, src=0)
            wrapper.require_forward_param_sync = False

    def on_validation_end(self) -> None:
        """Let DDP synchronise again."""
        wrapper = self.trainer.model
        if isinstance(wrapper, DistributedDataParallel):
            wrapper.require_forward_param_sync = True
