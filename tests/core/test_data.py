"""The base of all datamodules: loaders, resuming, errors of workers, several processes."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import Dataset

from tasks.core.data import (
    DataError,
    TaskDataModule,
    missing_data_message,
)
from tasks.core.errors import UserError


class Virtual(Dataset[int]):
    """Returns the virtual index it was asked for."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


class Numbers(TaskDataModule):
    def __init__(self, length: int = 22, **kwargs: Any) -> None:
        super().__init__(root="", **{"batch_size": 4, "num_workers": 0, "seed": 3} | kwargs)
        self.length = length

    def train_dataset(self) -> Virtual:
        return Virtual(self.length)

    def val_dataset(self) -> Virtual:
        return Virtual(3)


class Recorder(LightningModule):
    """Remembers the virtual indices it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, tuple[int, ...]]] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.seen.append((self.trainer.current_epoch, tuple(batch.tolist())))
        return self.weight * 0

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(
    folder: Path,
    workers: int,
    ckpt: Path | None = None,
    callbacks: list | None = None,
    repeats: int = 1,
    **kwargs: Any,
) -> list:
    model = Recorder()
    trainer = Trainer(
        **{"max_epochs": 4} | kwargs,
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        callbacks=callbacks or [],
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    data = Numbers(num_workers=workers, repeats=repeats)
    trainer.fit(model, datamodule=data, ckpt_path=ckpt, weights_only=True)
    return model.seen


RESUME_CASES = {
    "in the middle of an epoch": {"checkpoint": {"every_n_train_steps": 7}, "trainer": {}},
    "after the last batch of an epoch": {"checkpoint": {"every_n_train_steps": 10}, "trainer": {}},
    "at the end of an epoch": {
        "checkpoint": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
        "trainer": {},
    },
    "after validation in the middle of an epoch": {
        "checkpoint": {"save_on_train_epoch_end": False},
        "trainer": {"val_check_interval": 2},
    },
    "after validation at the end of an epoch": {"checkpoint": {"save_on_train_epoch_end": False}, "trainer": {}},
    "with max_steps": {
        "checkpoint": {"every_n_train_steps": 7},
        "trainer": {"max_epochs": None, "max_steps": 18},
    },
    "with max_steps at the end of an epoch": {
        "checkpoint": {"every_n_train_steps": 5},
        "trainer": {"max_epochs": None, "max_steps": 18},
    },
    "with max_steps and validation by steps": {
        "checkpoint": {"save_on_train_epoch_end": False},
        "trainer": {"max_epochs": None, "max_steps": 18, "val_check_interval": 3, "check_val_every_n_epoch": None},
    },
    "with accumulated gradients": {
        "checkpoint": {"every_n_train_steps": 4},
        "trainer": {"accumulate_grad_batches": 2},
    },
    "with repeated augmentation": {"checkpoint": {"every_n_train_steps": 7}, "trainer": {"repeats": 3}},
    "with fewer batches per epoch": {"checkpoint": {"every_n_train_steps": 4}, "trainer": {"limit_train_batches": 3}},
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("case", RESUME_CASES)
def test_resumed_run_sees_what_an_uninterrupted_run_sees(tmp_path, case, workers):
    options = RESUME_CASES[case]
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}-{step}", save_top_k=-1, **options["checkpoint"])
    expected = train(tmp_path, 0, callbacks=[checkpoint], **options["trainer"])
    saved = sorted(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    assert len(saved) > 1
    for path in saved if workers == 0 else saved[:2]:
        resumed = train(tmp_path, workers, path, **options["trainer"])
        batches = torch.load(path, weights_only=True)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
        assert [batch for _, batch in resumed] == [batch for _, batch in expected[batches["processed"] :]], path


def test_a_run_can_be_resumed_twice_and_without_warning(tmp_path):
    def checkpoint(folder: str) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / folder, filename="{step}", save_top_k=-1, every_n_train_steps=3)

    expected = train(tmp_path, 0, callbacks=[checkpoint("first")])
    second = tmp_path / "second"
    with warnings.catch_warnings(record=True) as caught:
        train(tmp_path, 0, tmp_path / "first" / "step=3.ckpt", callbacks=[checkpoint("second")], max_epochs=3)
    assert not [warning for warning in caught if "not resumable" in str(warning.message)]
    assert sorted(path.stem for path in second.iterdir()) == ["step=12", "step=15", "step=6", "step=9"]
    for path in second.iterdir():
        resumed = train(tmp_path, 0, path)
        assert resumed == expected[int(path.stem.removeprefix("step=")) :], path


class Failing(Virtual):
    def __getitem__(self, index: int) -> int:
        raise DataError("a/b.png: first line\nsecond line")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_worker_is_only_its_message(workers):
    module = Numbers(num_workers=workers)
    module.val_dataset = lambda: Failing(2)
    with pytest.raises(UserError) as error:
        next(iter(module.val_dataloader()))
    assert str(error.value) == "a/b.png: first line\nsecond line"


def test_missing_data_message_says_everything():
    message = missing_data_message("x: not found.", "\nroot/a\nroot/b", "https://example.org", "python -m tasks")
    assert message.splitlines() == [
        "x: not found.",
        "Expected layout:",
        "  root/a",
        "  root/b",
        "Where to get it: https://example.org",
        "To try the task without it: python -m tasks",
    ]


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"eval_batch_size": 0}, {"num_workers": -1}, {"seed": -1}, {"repeats": 0}]
)
def test_impossible_options_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        Numbers(**options)


class Shard(LightningModule):
    """Writes down which samples each process saw; all of them come to the end, also one without samples."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        for index in batch.tolist():
            (self.folder / f"{self.global_rank}-{batch_idx}-{index}").touch()

    def on_validation_epoch_end(self) -> None:
        self.trainer.strategy.barrier()


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 13])
def test_two_processes_evaluate_each_sample_once(tmp_path, length):
    module = Numbers()
    module.val_dataset = lambda: Virtual(length)
    module.eval_collate = torch.tensor
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_fork",
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    trainer.validate(Shard(tmp_path), datamodule=module)
    assert sorted(int(path.name.split("-")[2]) for path in tmp_path.iterdir()) == list(range(length))
