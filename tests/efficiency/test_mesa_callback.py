"""Mesa in a training: resuming, the report, both tasks, official checkpoints."""

import pytest
import timm
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import backbones
import efficiency
from backbones.checkpoint import ranges_of_mesa
from efficiency import mesa
from efficiency.mesa_policy import Policy, Setting

TINY = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 4}


class Classifier(LightningModule):
    """A small Vision Transformer; what is random in a step depends on the step alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = timm.create_model("deit_tiny_patch16_224", **TINY)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(30, 3, 32, 32, generator=generator)
        return DataLoader(TensorDataset(images, torch.arange(30) % 4), batch_size=4)

    def on_train_batch_start(self, batch, batch_idx):
        torch.manual_seed(self.global_step)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.network.parameters(), lr=1e-2)


def fit(folder, callback, epochs, ckpt_path=None):
    module = Classifier()
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", default_root_dir=folder, callbacks=[callback], **quiet)
    trainer.fit(module, ckpt_path=ckpt_path, weights_only=True)
    return trainer, module


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path):
    _, whole = fit(tmp_path, efficiency.Mesa(), 2)
    trainer, half = fit(tmp_path, efficiency.Mesa(), 1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    state = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert state["state_dict"].keys() == half.state_dict().keys()
    assert not any("mesa" in name.lower() for name in state["state_dict"])
    _, resumed = fit(tmp_path, efficiency.Mesa(), 2, tmp_path / "half.ckpt")
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name
    ranges = mesa.find(whole.network).ranges
    assert ranges.keys() == mesa.find(resumed.network).ranges.keys()
    assert all(running.updates == 16 for running in ranges.values())


def test_report_rows(tmp_path):
    callback = efficiency.Mesa()
    assert callback.report_rows() == []
    fit(tmp_path, callback, 2)
    rows = dict(callback.report_rows())
    plain, kept = (float(part.split(" MB")[0]) for part in rows["all, kept for backward"].split(" → "))
    assert 0 < kept < 0.45 * plain
    for kind in ("linear layers", "layer norm", "GELU", "attention (products, softmax)"):
        assert " → " in rows[f"{kind}, kept for backward"]
    step, own = (
        float(rows[name].removesuffix(" ms"))
        for name in ("training step, median of 13", "of it compressing and restoring")
    )
    assert 0 < own < step
    # the largest batch of the epoch counts, not the two images at its end
    largest = mesa.convert(Classifier().network)
    largest(torch.randn(4, 3, 32, 32))
    assert rows["all, kept for backward"].startswith(f"{mesa.find(largest).saved.plain_total / 1e6:.1f} MB →")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_any_task_takes_it_in_three_lines(task, run_cli, request, tmp_path):
    policy = tmp_path / "policy.txt"
    policy.write_text("on fc:\n  by_index: all\n  enable: True\n")
    changes = {"trainer.default_root_dir": str(tmp_path / "runs")}
    if task == "classification":
        write, data = request.getfixturevalue("tiny_classifier_config"), request.getfixturevalue("tiny_digits")
        changes["trainer.callbacks"] = [
            {"class_path": "efficiency.Mesa", "init_args": {"policy": str(policy)}},
            {"class_path": "efficiency.GradientCheckpointing"},
        ]
    else:
        write, data = request.getfixturevalue("tiny_config"), request.getfixturevalue("tiny_ade20k")
        changes["trainer.callbacks"] = [{"class_path": "efficiency.Mesa"}]
    config = write(data, changes=changes)
    outcome = run_cli("fit", "-c", config)
    assert outcome.code == 0, outcome.err
    report = next((tmp_path / "runs").rglob("report.md")).read_text()
    table = report.partition("## Mesa")[2].partition("##")[0]
    assert "all, kept for backward" in table
    if task == "classification":
        assert "## GradientCheckpointing" in report
    else:
        assert "convolutions, kept for backward" in table
    best = next((tmp_path / "runs").rglob("best.ckpt"))
    outcome = run_cli("validate", "-c", config, "--ckpt_path", best)
    assert outcome.code == 0, outcome.err


def test_policies_in_a_configuration(run_cli, tiny_classifier_config, tiny_digits, tmp_path):
    callback = {"class_path": "efficiency.Mesa", "init_args": {"policy": {"fc": {"levels": 16}}, "group_size": 8}}
    config = tiny_classifier_config(tiny_digits, changes={"trainer.callbacks": [callback]})
    outcome = run_cli("fit", "-c", config, "--print_config")
    assert outcome.code == 0, outcome.err
    read = yaml.safe_load(outcome.out)["trainer"]["callbacks"][0]["init_args"]
    assert Policy(**{tag: Setting(**setting) for tag, setting in read["policy"].items()}).fc == Setting(levels=16)
    callback["init_args"] = {"policy": "/nowhere/policy.txt"}
    config = tiny_classifier_config(tiny_digits, name="wrong", changes={"trainer.callbacks": [callback]})
    outcome = run_cli("fit", "-c", config)
    assert outcome.code == 2
    assert "policy /nowhere/policy.txt: cannot be read" in outcome.err
    assert "Traceback" not in outcome.err


@pytest.fixture
def task():
    return "classification"


def test_official_checkpoints_load_into_plain_networks(tmp_path):
    plain = timm.create_model("deit_tiny_patch16_224", **TINY)
    official = dict(plain.state_dict())
    for layer in ("norm", "blocks.0.mlp.fc1", "blocks.0.attn.mm1.quant1", "blocks.0.attn.mm1.quant2"):
        official |= {f"{layer}.{name}": torch.ones(3) for name in ("iteration", "clip_val", "shift")}
    torch.save({"model": official}, tmp_path / "mesa.pth")
    network = timm.create_model("deit_tiny_patch16_224", **TINY)
    report = backbones.load_checkpoint(network, tmp_path / "mesa.pth")
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in network.state_dict().items())
    assert len(report.ignored) == 12
    assert not report.unexpected
    assert "ignored" in str(report)
    # a layer may have a shift of its own
    assert ranges_of_mesa(["a.shift", "b.shift", "b.clip_val", "b.iteration", "b.weight"]) == [
        "b.shift", "b.clip_val", "b.iteration",
    ]  # fmt: skip
