"""Running statistics of several processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import Dataset

from tasks.core.data import TaskDataModule
from tasks.core.module import TaskModule


class Numbers(Dataset[float]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> float:
        return float(index)


class NumbersData(TaskDataModule):
    train_collate = eval_collate = staticmethod(torch.tensor)

    def train_dataset(self) -> Numbers:
        return Numbers()

    def val_dataset(self) -> Numbers:
        return Numbers()


class RunningMean(TaskModule):
    """Each process trains on other numbers, so each has other running statistics; it writes down those in use."""

    monitor = "val/mean"

    def __init__(self, folder: Path, ema_decay: float | None) -> None:
        super().__init__({"schedule": "constant"}, ema_decay)
        self.network = torch.nn.BatchNorm1d(1)
        self.folder = folder

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.network(batch[:, None] + 100 * self.global_rank).square().sum()

    def evaluation_step(self, batch: torch.Tensor, stage: str) -> None:
        name = f"{self.global_step}-{self.global_rank}"
        (self.folder / name).write_text(str(self.network.running_mean.tolist()))

    def evaluation_results(self, stage: str) -> dict[str, float | torch.Tensor]:
        return {}


@pytest.mark.forks
@pytest.mark.slow
@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_processes_evaluate_with_the_same_running_statistics(tmp_path, ema_decay):
    options: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_fork",
        use_distributed_sampler=False,
        max_steps=4,
        val_check_interval=1,
        default_root_dir=tmp_path,
        **options,
    )
    (tmp_path / "seen").mkdir()
    trainer.fit(RunningMean(tmp_path / "seen", ema_decay), datamodule=NumbersData("", batch_size=2, num_workers=0))
    seen = {path.name: path.read_text() for path in (tmp_path / "seen").iterdir()}
    for step in range(1, 3):
        assert seen[f"{step}-0"] == seen[f"{step}-1"]
    assert len({seen["0-0"], seen["1-0"], seen["2-0"]}) == 3
