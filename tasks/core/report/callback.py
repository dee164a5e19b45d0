"""Writes the evaluation report at the end of fit, validate and test."""

from __future__ import annotations

import shlex
import statistics
import sys
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn

from efficiency.callback import EfficiencyCallback
from tasks.core.report.cost import environment, measure_cost
from tasks.core.report.curves import read_metrics_csv
from tasks.core.report.document import Cost, Curve, Report, ReportParts, Table
from tasks.core.report.writer import write_report

if TYPE_CHECKING:
    from tasks.core.module import TaskModule

SKIPPED_STEPS = 5  # warm-up of workers, caches and kernels
KEPT_STEPS = 1000
STAGES: dict[TrainerFn | None, str] = {
    TrainerFn.FITTING: "training",
    TrainerFn.VALIDATING: "validation",
    TrainerFn.TESTING: "test",
}
T = TypeVar("T")


class ReportCallback(Callback):
    """Collects what a run shows and writes it to the run folder; `path` is the written ``report.html``.

    The module gives `task`, `monitor`, `network`, `example_input()` and `report_parts(datamodule)`. The last is
    called on rank 0 alone and must not communicate; what it shows is gathered in the epoch-end hooks.
    A ``fast_dev_run`` writes no report.

    Args:
        config: Name of the configuration, for the headings.
    """

    def __init__(self, config: str = "") -> None:
        self.config = config
        self.path: Path | None = None
        self._step_ms: deque[float] = deque(maxlen=KEPT_STEPS)
        self._steps = 0
        self._last_end: float | None = None
        self._fit_curves: dict[str, Curve] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count memory and time from here."""
        self._step_ms.clear()
        self._steps = 0
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The time between two epochs is not a step."""
        self._last_end = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nor is a validation between two steps."""
        self._last_end = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Time from the end of one step to the end of the next, data loading included."""
        now = time.perf_counter()
        self._steps += 1
        if self._last_end is not None and self._steps > SKIPPED_STEPS:
            self._step_ms.append((now - self._last_end) * 1e3)
        self._last_end = now

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the fit while the network is still on its device."""
        self._fit_curves = _read_curves(trainer)
        self._write(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report a validation of its own; those inside fit are in the report of the fit."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._write(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the test."""
        self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if getattr(trainer, "fast_dev_run", False):
            return
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # asks all processes
        if not trainer.is_global_zero:
            return
        module = cast("TaskModule", pl_module)
        stage = trainer.state.fn
        notes: list[str] = []
        if trainer.ckpt_path:
            notes.append(f"Weights: {Path(trainer.ckpt_path).name}.")
        elif stage == TrainerFn.FITTING:
            notes.append("Metrics are those of the last weights, after the last step of the training.")
        datamodule: Any = getattr(trainer, "datamodule", None)
        parts = _attempt("tables and pictures", notes, lambda: module.report_parts(datamodule), ReportParts())
        cost = _attempt("cost", notes, lambda: self._cost(trainer, module), Cost())
        name = " · ".join(part for part in (type(module).__name__, self.config) if part)
        report = Report(
            task=module.task,
            config=self.config,
            title=f"{name}: {STAGES[stage]}",
            metrics={name: float(value) for name, value in trainer.callback_metrics.items()},
            cost=cost,
            tables=[*parts.tables, *_efficiency_tables(trainer)],
            curves=_read_curves(trainer) if self._fit_curves is None else self._fit_curves,
            pictures=parts.pictures,
            command=command_line(),
            environment=environment(module.device),
            notes=notes,
            monitor=module.monitor,
        )
        self.path = write_report(report, folder)

    def _cost(self, trainer: Trainer, module: TaskModule) -> Cost:
        step_ms = statistics.median(self._step_ms) if self._step_ms else None
        example = trainer.precision_plugin.convert_input(module.example_input().to(module.device))
        with trainer.precision_plugin.forward_context():
            return measure_cost(module.network, example, step_ms)


def _efficiency_tables(trainer: Trainer) -> list[Table]:
    """One table per efficiency method that has something to say of this run."""
    methods = [callback for callback in trainer.callbacks if isinstance(callback, EfficiencyCallback)]  # type: ignore[attr-defined]
    tables = [Table(type(method).__name__, ["what", "value"], list(method.report_rows())) for method in methods]
    return [table for table in tables if table.rows]


def command_line() -> str:
    """The command of this process as it was typed; paths of the interpreter and of a start script are left out."""
    _, *words = sys.orig_argv
    if words and Path(words[0]).is_absolute():
        words[0] = Path(words[0]).name
    return shlex.join(["python", *words])


def _attempt(what: str, notes: list[str], make: Callable[[], T], default: T) -> T:
    """`make()`; if it fails, a warning and a note: the metrics of a long training are to be written anyway."""
    try:
        return make()
    except Exception as error:
        notes.append(f"Without {what}: {type(error).__name__}: {error}")
        warnings.warn(f"report without {what}\n{traceback.format_exc()}", stacklevel=2)
        return default


def _read_curves(trainer: Trainer) -> dict[str, Curve]:
    """The curves of this run's CSVLogger."""
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger):
            logger.save()  # what is still in its buffer
            path = Path(logger.log_dir) / "metrics.csv"
            return read_metrics_csv(path) if path.exists() else {}
    return {}
