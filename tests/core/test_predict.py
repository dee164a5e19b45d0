"""Predictions become the same files, per sample or of the whole data set, whatever the number of processes."""

import json

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, Dataset

from tasks.core.errors import UserError
from tasks.core.module import TaskModule
from tasks.core.predict import PredictionWriter, checked_name


class Numbers(Dataset):
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return torch.tensor([index])


class Bare(TaskModule):
    task, monitor = "bare", "val/x"

    def __init__(self):
        super().__init__()
        self.network = torch.nn.Linear(1, 1)


class Namer(Bare):
    one_file_per_sample = True

    def __init__(self, name="frankfurt/{:03d}.txt"):
        super().__init__()
        self.name = name

    def predict_step(self, batch, batch_idx):
        return {f"{int(index):03d}": int(index) for index in batch}

    def prediction_files(self, records):
        for index in records.values():
            yield self.name.format(index), f"sample {index}".encode()


class Lister(Bare):
    def __init__(self, id="{:03d}"):
        super().__init__()
        self.id = id

    def predict_step(self, batch, batch_idx):
        return {self.id.format(int(index)): int(index) for index in batch}

    def prediction_files(self, records):
        yield "all.json", json.dumps(records).encode()
        yield "count.txt", str(len(records)).encode()


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


LISTED = {"all.json": json.dumps({f"{index:03d}": index for index in range(13)}), "count.txt": "13"}


def test_files_of_the_whole_data_set(tmp_path, capfd):
    predict(tmp_path / "out", tmp_path, module=Lister())
    assert content(tmp_path / "out") == LISTED
    assert f"predictions: 2 files in {tmp_path / 'out'}" in capfd.readouterr().out


@pytest.mark.slow
def test_two_processes_merge_their_records_by_id(tmp_path, capfd):
    predict(tmp_path / "out", tmp_path, module=Lister(), strategy="ddp_spawn", devices=2)
    assert content(tmp_path / "out") == LISTED
    assert capfd.readouterr().out.count("predictions: 2 files") == 1


def test_records_that_share_an_id_are_an_error(tmp_path):
    with pytest.raises(UserError, match="sample id 'same' occurs twice"):
        predict(tmp_path / "out", tmp_path, module=Lister("same"))
    with pytest.raises(UserError, match="12 predicted samples; expected 13, one per sample"):
        predict(tmp_path / "out", tmp_path, module=LosesTheFirst())
    assert content(tmp_path / "out") == {}


class LosesTheFirst(Lister):
    def predict_step(self, batch, batch_idx):
        return {id: index for id, index in super().predict_step(batch, batch_idx).items() if index}


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
