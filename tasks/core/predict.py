"""Predictions as files: one per sample, written while they come, or files about the whole data set, written at the end.

A task's `predict_step` returns records, `{id: value}`, and its `prediction_files` turns records into files. The number
of processes changes neither the files nor their content.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from tasks.core.errors import UserError
from tasks.core.evaluation import all_gather, gather_by_id
from tasks.core.files import write_atomically

if TYPE_CHECKING:
    from tasks.core.module import TaskModule


class PredictionWriter(Callback):
    """Writes what the module's `prediction_files` makes of the records that `predict_step` returns.

    With `one_file_per_sample` every process turns the records of each batch into files at once. Otherwise the records
    of all processes are merged, and rank 0 writes the files in the end. Either way each sample has to occur once.

    Args:
        folder: Where to write; None is ``predictions`` in the run folder.
    """

    def __init__(self, folder: Path | str | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._names: list[str] = []
        self._records: dict[str, Any] = {}

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
        self._names, self._records = [], {}

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the predictions of one batch, or keep its records."""
        module = cast("TaskModule", pl_module)
        if module.one_file_per_sample:
            self._names += self._write(module.prediction_files(outputs))
        else:
            if repeated := outputs.keys() & self._records.keys():
                raise UserError(f"sample id {min(repeated)!r} occurs twice in the prediction data; expected unique ids")
            self._records.update(outputs)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files about all samples, or count those of all processes.

        Raises:
            UserError: There is not one file or record per sample to predict.
        """
        module = cast("TaskModule", pl_module)
        if module.one_file_per_sample:
            counts = Counter(name for names in all_gather(self._names) for name in names)
            self._expect_all(trainer, len(counts), "prediction files", counts)
        else:
            records = gather_by_id(self._records)
            self._expect_all(trainer, len(records), "predicted samples", Counter())
            counts = Counter(self._write(module.prediction_files(records)) if trainer.is_global_zero else ())
        if trainer.is_global_zero:
            plural = "file" if len(counts) == 1 else "files"
            print(f"predictions: {len(counts)} {plural} in {self.folder}", flush=True)

    def _write(self, files: Iterable[tuple[str, bytes]]) -> list[str]:
        """Write files (name below the folder, content); returns their normalised names."""
        assert self.folder is not None  # on_predict_start set it
        names = []
        for name, content in files:
            names.append(checked_name(self.folder, name))
            write_atomically(self.folder / names[-1], content)
        return names

    def _expect_all(self, trainer: Trainer, found: int, what: str, counts: Counter[str]) -> None:
        expected = _expected_samples(trainer)
        if expected is None or found == expected:
            return
        repeated = [name for name, count in sorted(counts.items()) if count > 1][:3]
        reason = f"; written more than once: {', '.join(repeated)}" if repeated else ""
        raise UserError(f"{self.folder}: {found} {what}; expected {expected}, one per sample{reason}")


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


def _expected_samples(trainer: Trainer) -> int | None:
    """Number of samples of the prediction data sets; None when the Trainer was told to predict only some batches."""
    if trainer.limit_predict_batches != 1.0:  # fast_dev_run sets it too
        return None
    loaders: Any = trainer.predict_dataloaders
    return sum(len(loader.dataset) for loader in (loaders if isinstance(loaders, list | tuple) else [loaders]))
