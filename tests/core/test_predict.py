"""Predictions become exactly one file per sample, whatever the number of processes."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, Dataset

from tasks.core.errors import UserError
from tasks.core.predict import Prediction, PredictionWriter, checked_name


class Numbers(Dataset):
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return torch.tensor([index])


class Namer(LightningModule):
    def __init__(self, name="frankfurt/{:03d}.txt"):
        super().__init__()
        self.name = name
        self.layer = torch.nn.Linear(1, 1)

    def predict_step(self, batch, batch_idx):
        return [Prediction(self.name.format(int(index)), f"sample {int(index)}".encode()) for index in batch]


def predict(folder, root, count=13, module=None, **trainer):
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=root, callbacks=[PredictionWriter(folder)], **trainer,
    )  # fmt: skip
    trainer.predict(module or Namer(), DataLoader(Numbers(count), batch_size=2), return_predictions=False)


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


EXPECTED = {f"frankfurt/{index:03d}.txt": f"sample {index}" for index in range(13)}


def test_one_process(tmp_path, capfd):
    predict(tmp_path / "out", tmp_path)
    assert content(tmp_path / "out") == EXPECTED
    assert f"predictions: 13 files in {tmp_path / 'out'}" in capfd.readouterr().out


@pytest.mark.slow
def test_two_processes_write_every_file_once(tmp_path, capfd):
    predict(tmp_path / "out", tmp_path, strategy="ddp_spawn", devices=2)
    assert content(tmp_path / "out") == EXPECTED
    assert capfd.readouterr().out.count("predictions: 13 files") == 1


def test_default_folder_is_in_the_run_folder(tmp_path):
    predict(None, tmp_path, count=1)
    assert list(content(tmp_path / "predictions")) == ["frankfurt/000.txt"]


def test_samples_that_share_a_name_are_an_error(tmp_path):
    with pytest.raises(UserError, match=r"1 prediction files; expected 13.*written more than once: same\.txt"):
        predict(tmp_path / "out", tmp_path, module=Namer("same.txt"))


def test_a_part_of_the_batches_is_no_error(tmp_path):
    predict(tmp_path / "out", tmp_path, limit_predict_batches=2)
    assert len(content(tmp_path / "out")) == 4


def test_folder_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        predict(tmp_path / "out", tmp_path)


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "a/../../b.png", "", ".", "c:\\a.png", "a\\..\\b", "a\0b"])
def test_names_stay_inside_the_folder(tmp_path, name):
    with pytest.raises(UserError, match="inside"):
        checked_name(tmp_path, name)


def test_links_do_not_lead_out(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match="inside"):
        checked_name(tmp_path / "out", "link/a.png")


def test_names_are_normalised(tmp_path):
    assert checked_name(tmp_path, "./a//b.png") == "a/b.png"
