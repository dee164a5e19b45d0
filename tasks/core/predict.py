"""Predictions as files, written while they come, by every process, and counted at the end."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from tasks.core.errors import UserError
from tasks.core.evaluation import all_gather
from tasks.core.files import write_atomically


@dataclass(frozen=True)
class Prediction:
    """One output file: its name below the output folder, with ``/`` between folders, and its content."""

    name: str
    data: bytes


class PredictionWriter(Callback):
    """Writes every `Prediction` that `predict_step` returns in a list: exactly one file per sample of the data set.

    Args:
        folder: Where to write; None is ``predictions`` in the run folder.
    """

    def __init__(self, folder: Path | str | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._names: list[str] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Create the output folder."""
        if self.folder is None:
            self.folder = Path(trainer.log_dir or trainer.default_root_dir) / "predictions"
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder}: is a file; expected a folder for the predictions")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be created ({error.strerror}); name another folder") from error
        self._names = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the predictions of one batch."""
        assert self.folder is not None  # on_predict_start set it
        for prediction in outputs:
            name = checked_name(self.folder, prediction.name)
            write_atomically(self.folder / name, prediction.data)
            self._names.append(name)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the files of all processes.

        Raises:
            UserError: Their number is not that of the samples to predict.
        """
        counts = Counter(name for names in all_gather(self._names) for name in names)
        expected = _expected_files(trainer)
        if expected is not None and len(counts) != expected:
            repeated = [name for name, count in sorted(counts.items()) if count > 1][:3]
            reason = f"; written more than once: {', '.join(repeated)}" if repeated else ""
            raise UserError(
                f"{self.folder}: {len(counts)} prediction files; expected {expected}, one per sample{reason}"
            )
        if trainer.is_global_zero:
            print(f"predictions: {len(counts)} files in {self.folder}", flush=True)


def checked_name(folder: Path, name: str) -> str:
    """The normalised `name` of a file below `folder`.

    Raises:
        UserError: The name is absolute, leads out of the folder or is not portable.
    """
    path = PurePosixPath(name)
    unusual = not path.parts or path.is_absolute() or ".." in path.parts or any(c in name for c in "\\:\0")
    if unusual or not (folder / path).resolve().is_relative_to(folder.resolve()):
        raise UserError(f"prediction name {name!r}: expected a relative path inside {folder}")
    return str(path)


def _expected_files(trainer: Trainer) -> int | None:
    """Number of samples of the prediction data sets; None when the Trainer was told to predict only some batches."""
    if trainer.limit_predict_batches != 1.0:  # fast_dev_run sets it too
        return None
    loaders: Any = trainer.predict_dataloaders
    return sum(len(loader.dataset) for loader in (loaders if isinstance(loaders, list | tuple) else [loaders]))
