"""SPViT in a training: its loss term, what a search writes, how it goes on, what the report says, several processes."""

import json

import pytest
import timm
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import backbones
import efficiency
from backbones.spvit_architecture import Architecture
from efficiency import spvit
from efficiency.spvit_callback import SPViT
from tasks.core.module import TaskModule
from tasks.core.optim import OptimConfig

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 4}
PLAIN = Architecture.unpruned("deit", 24, [3], [3], 8).macs(32, 4)
GATES = {"*.kernel_thresholds": 10.0, "*.ffn_thresholds": 10.0}


class Classifier(TaskModule):
    """Trains a small DeiT; in each process on images of its own."""

    task, monitor = "test", "val/none"

    def __init__(self, folder=None, multipliers=GATES, schedule="constant"):
        super().__init__(OptimConfig(lr=1e-2, lr_multipliers=dict(multipliers), schedule=schedule))
        torch.manual_seed(0)
        self.network = timm.create_model("deit_tiny_patch16_224", **TINY)
        self.folder, self.losses = folder, []

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(1 + self.global_rank)
        images = torch.randn(16, 3, 32, 32, generator=generator)
        return DataLoader(TensorDataset(images, torch.arange(16) % 4), batch_size=4)

    def training_step(self, batch, batch_idx):
        loss = cross_entropy(self.network(batch[0]), batch[1])
        total = self.with_loss_terms(loss)
        self.losses.append((loss.item(), total.item()))
        if self.folder is not None:
            torch.save(self.network.state_dict(), self.folder / f"{self.global_step}-{self.global_rank}.pt")
        return total


def trainer(tmp_path, *callbacks, epochs=1, **options):
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    options = {**quiet, "accelerator": "cpu", **options}
    return Trainer(max_epochs=epochs, default_root_dir=tmp_path, callbacks=list(callbacks), **options)


def search(share=0.6, weight=3e7):
    return SPViT(target=share * PLAIN / 1e9, weight=weight)


def test_a_search_comes_near_its_target_and_writes_what_it_found(tmp_path):
    module, callback = Classifier(multipliers=dict.fromkeys(GATES, 5.0), schedule="cosine"), search()
    trainer(tmp_path, callback, epochs=25).fit(module)
    found = Architecture.read(tmp_path / "architecture.json")
    assert found == spvit.found_architecture(module.network)
    assert found.macs(32, 4) / PLAIN == pytest.approx(0.6, rel=0.1)  # the sample's test demands more
    options = {"architecture": str(tmp_path / "architecture.json"), "img_size": 32, "num_classes": 4}
    pruned = backbones.create("spvit_deit", **options)
    pruned.load_state_dict(load_file(tmp_path / "pruned.safetensors"))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(pruned.eval()(images), module.network.eval()(images), rtol=1e-5, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["architecture.json", "pruned.safetensors"]


def test_the_loss_has_the_term_of_the_cost(tmp_path):
    module = Classifier()
    trainer(tmp_path, search(0.5, weight=3e8), limit_train_batches=1).fit(module)
    loss, total = module.losses[0]
    assert total - loss == pytest.approx(3e8 * (0.5 * PLAIN / 1e9) ** 2, rel=1e-4)
    plain = Classifier(multipliers={})
    trainer(tmp_path, limit_train_batches=1).fit(plain)
    assert plain.losses[0][0] == plain.losses[0][1]


def test_gates_have_their_own_rate_and_no_decay(tmp_path):
    module, run = Classifier(), trainer(tmp_path, search(), limit_train_batches=1)
    run.fit(module)
    settings = {
        id(p): (group["lr"], group["weight_decay"]) for group in run.optimizers[0].param_groups for p in group["params"]
    }
    for name, parameter in module.network.named_parameters():
        gate, small = name.endswith("thresholds"), parameter.ndim <= 1 or name in ("cls_token", "pos_embed")
        assert settings[id(parameter)] == (0.1 if gate else 0.01, 0.0 if small else 0.05), name


def test_a_search_resumes(tmp_path):
    whole = Classifier()
    trainer(tmp_path, search(), epochs=2).fit(whole)
    run = trainer(tmp_path, search(), epochs=1)
    run.fit(Classifier())
    run.save_checkpoint(tmp_path / "one.ckpt")
    second = Classifier()
    trainer(tmp_path, search(), epochs=2).fit(second, ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, second.network.state_dict()[name]), name


def test_moving_average_and_checkpointing_go_with_a_search(tmp_path):
    module = Classifier()
    callbacks = [search(), efficiency.GradientCheckpointing(), EMAWeightAveraging(decay=0.5)]
    module.example_input = lambda: torch.zeros(1, 3, 32, 32)
    trainer(tmp_path, *callbacks, epochs=2).fit(module)
    written = Architecture.read(tmp_path / "architecture.json")
    assert written == spvit.found_architecture(module.network)  # of the average, which the module holds in the end


def test_fine_tuning_prunes_the_plain_network_before_the_training(tmp_path):
    trainer(tmp_path, search(), epochs=6).fit(Classifier())
    file = str(tmp_path / "architecture.json")
    module, callback = Classifier(multipliers={}), SPViT(architecture=file)
    before = module.network.blocks[0].mlp.fc1.weight.detach().clone()
    callback.convert(module)
    units = Architecture.read(file).blocks[0].units()
    assert torch.equal(module.network.blocks[0].mlp.fc1.weight, before[units])
    module = Classifier(multipliers={})
    trainer(tmp_path, SPViT(architecture=file)).fit(module)
    assert module.network.architecture == Architecture.read(file)
    assert all(loss == total for loss, total in module.losses)


def test_report_rows(tmp_path):
    callback, module = search(), Classifier()
    assert callback.report_rows() == []
    trainer(tmp_path, callback, epochs=6).fit(module)
    rows, found = dict(callback.report_rows()), Architecture.read(tmp_path / "architecture.json")
    assert rows["target, 10⁶ multiply-adds"] == pytest.approx(0.6 * PLAIN / 1e6, rel=1e-3)
    assert rows["10⁶ multiply-adds"] == pytest.approx(found.macs(32, 4) / 1e6, rel=1e-3)
    assert rows["mixers by block"].split() == [block.mixer for block in found.blocks]
    assert [int(width) for width in rows["hidden units by block"].split()] == [block.width for block in found.blocks]
    with torch.no_grad():  # another checkpoint is evaluated: the search's result is still that of its end
        module.network.blocks[0].mlp.ffn_thresholds.fill_(1.0)
    assert dict(callback.report_rows()) == rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected either target"),
        ({"target": 1.0, "weight": 1.0, "architecture": "a.json"}, "expected either target"),
        ({"target": 1.0}, "target 1.0 and weight None: expected two positive numbers"),
        ({"target": -1.0, "weight": 1.0}, "target -1.0 and weight 1.0: expected two"),
        ({"architecture": "a.json", "weight": 1.0}, "weight has no meaning beside architecture"),
        ({"target": 1.0, "weight": 1.0, "indicators": "a.pth"}, "indicators has no meaning beside target"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match=f"SPViT: {message}"):
        SPViT(**options)


def test_other_networks_are_refused_in_one_sentence(tmp_path):
    module = Classifier()
    module.network = timm.create_model("test_resnet")
    with pytest.raises(ValueError, match=r"^SPViT prunes DeiT and Swin Transformers of timm; got a ResNet$"):
        trainer(tmp_path, search()).fit(module)
    with pytest.raises(ValueError, match="EcoFormer and SPViT both exchange the attention of a network"):
        trainer(tmp_path, efficiency.EcoFormer(num_bits=4, num_anchors=6), search()).fit(Classifier())


@pytest.mark.forks
@pytest.mark.slow
def test_two_processes_search_alike(tmp_path):
    options = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False, "accumulate_grad_batches": 2}
    trainer(tmp_path, search(), epochs=2, **options).fit(Classifier(tmp_path))
    states = {path.stem: torch.load(path) for path in tmp_path.glob("*.pt")}
    assert len(states) == 2 * 4
    last = max(int(name.partition("-")[0]) for name in states)
    for name, tensor in states[f"{last}-0"].items():
        if ".bn_" not in name or "running" not in name:  # each process has seen its own images
            assert torch.equal(tensor, states[f"{last}-1"][name]), name
    assert json.loads((tmp_path / "architecture.json").read_text())["family"] == "deit"
