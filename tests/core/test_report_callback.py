"""The callback that writes the report at the end of fit, validate and test."""

import json
import warnings

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from efficiency.callback import EfficiencyCallback
from tasks.core.report import ReportCallback, ReportParts, Table
from tasks.core.report.callback import command_line


class Tiny(LightningModule):
    task = "regression"
    monitor = "val/error"

    def __init__(self):
        super().__init__()
        self.network = nn.Linear(2, 1)

    def example_input(self):
        return torch.zeros(1, 2)

    def report_parts(self, datamodule):
        return ReportParts(tables=[Table("Per class", ["class", "error"], [("only", 0.5)])])

    def training_step(self, batch, batch_idx):
        loss = self.network(batch[0]).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/error", self.network(batch[0]).abs().mean(), sync_dist=True)

    def test_step(self, batch, batch_idx):
        self.log("test/error", self.network(batch[0]).abs().mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def loader():
    return DataLoader(TensorDataset(torch.ones(26, 2)), batch_size=2)


def make_trainer(root, logger=True, **options):
    callback = ReportCallback("sample/tiny")
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, log_every_n_steps=1, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, logger=CSVLogger(root, name="tiny") if logger else False, default_root_dir=root,
        callbacks=[callback], **options,
    )  # fmt: skip
    return trainer, callback


def read(callback):
    return json.loads(callback.path.with_name("report.json").read_text())


def test_fit_then_validate(tmp_path):
    trainer, callback = make_trainer(tmp_path)
    module = Tiny()
    trainer.fit(module, loader(), loader())
    run = tmp_path / "tiny" / "version_0"
    assert callback.path == run / "report.html"
    report = read(callback)
    assert report["title"] == "Tiny · sample/tiny: training"
    assert (report["task"], report["config"], report["monitor"]) == ("regression", "sample/tiny", "val/error")
    assert {"train/loss", "val/error"} <= report["metrics"].keys()
    assert len(report["curves"]["train/loss"]) == 26
    assert len(report["curves"]["val/error"]) == 2
    assert report["cost"]["params"] == 3
    assert report["cost"]["macs"] == 2
    assert report["cost"]["step_time_ms"] > 0
    assert report["cost"]["step_time_kind"].startswith("training step")
    assert report["tables"][0]["title"] == "Per class"
    assert report["environment"]["torch"] == torch.__version__

    trainer.validate(module, loader(), verbose=False)
    report = read(callback)
    assert report["title"].endswith("validation")
    assert report["metrics"].keys() == {"val/error"}
    assert len(report["curves"]["train/loss"]) == 26, "the curves of the fit stay"
    assert len(report["curves"]["val/error"]) == 2, "the validation adds no point to them"
    assert report["cost"]["step_time_kind"].startswith("training step")


class Halving(EfficiencyCallback):
    converted = 0

    def convert(self, module):
        self.converted += 1
        module.network.weight.data /= 2

    def report_rows(self):
        return [("conversions", self.converted), ("kind", "halves")]


def test_efficiency_methods_convert_once_and_are_in_the_report(tmp_path):
    trainer, callback = make_trainer(tmp_path, logger=False)
    method, silent = Halving(), EfficiencyCallback()
    silent.convert = lambda module: None
    trainer.callbacks += [method, silent]
    module = Tiny()
    before = module.network.weight.detach().clone()
    trainer.validate(module, loader(), verbose=False)
    trainer.test(module, loader(), verbose=False)
    assert torch.equal(module.network.weight, before / 2)
    tables = {table["title"]: table["rows"] for table in read(callback)["tables"]}
    assert tables == {"Per class": [["only", 0.5]], "Halving": [["conversions", 1], ["kind", "halves"]]}


def test_validate_and_test_without_logger(tmp_path):
    trainer, callback = make_trainer(tmp_path, logger=False)
    trainer.validate(Tiny(), loader(), verbose=False)
    assert callback.path == tmp_path / "report.html"
    assert read(callback)["cost"]["step_time_kind"].startswith("forward pass")
    trainer.test(Tiny(), loader(), verbose=False)
    assert read(callback)["metrics"].keys() == {"test/error"}
    assert read(callback)["curves"] == {}


def test_weights_of_a_checkpoint_are_named(tmp_path):
    trainer, callback = make_trainer(tmp_path, logger=False)
    trainer.fit(Tiny(), loader())
    assert "last weights" in read(callback)["notes"][0]
    trainer.save_checkpoint(tmp_path / "best.ckpt")
    trainer.validate(Tiny(), loader(), ckpt_path=str(tmp_path / "best.ckpt"), verbose=False)
    assert read(callback)["notes"] == ["Weights: best.ckpt."]


def test_failing_parts_do_not_cost_the_metrics(tmp_path):
    class Broken(Tiny):
        def example_input(self):
            raise RuntimeError("no example")

        def report_parts(self, datamodule):
            raise KeyError("palette")

    trainer, callback = make_trainer(tmp_path, logger=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.validate(Broken(), loader(), verbose=False)
    messages = [str(warning.message) for warning in caught]
    assert sum("report without tables and pictures" in message for message in messages) == 1
    assert sum("report without cost" in message for message in messages) == 1
    report = read(callback)
    assert "val/error" in report["metrics"]
    assert report["cost"]["params"] is None
    assert "KeyError: 'palette'" in report["notes"][0]
    assert "RuntimeError: no example" in report["notes"][1]


def test_fast_dev_run_writes_nothing(tmp_path):
    trainer, callback = make_trainer(tmp_path, fast_dev_run=True)
    trainer.fit(Tiny(), loader(), loader())
    assert callback.path is None
    assert not list(tmp_path.rglob("report*"))


class RankTold(Tiny):
    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def report_parts(self, datamodule):
        (self.folder / f"asked_{self.global_rank}").touch()
        return ReportParts()


@pytest.mark.slow
def test_only_rank_zero_writes(tmp_path):
    trainer, _ = make_trainer(tmp_path, strategy="ddp_spawn", devices=2)
    trainer.fit(RankTold(tmp_path), loader(), loader())
    assert [path.name for path in tmp_path.glob("asked_*")] == ["asked_0"]
    assert len(list(tmp_path.rglob("report.json"))) == 1


def test_command_line_hides_the_interpreter(monkeypatch):
    monkeypatch.setattr("sys.orig_argv", ["/home/me/bin/python3", "-m", "tasks.segmentation", "fit", "-c", "a b.yaml"])
    assert command_line() == "python -m tasks.segmentation fit -c 'a b.yaml'"
    monkeypatch.setattr("sys.orig_argv", ["/home/me/bin/python3", "/home/me/bin/pytest", "-q"])
    assert command_line() == "python pytest -q"
