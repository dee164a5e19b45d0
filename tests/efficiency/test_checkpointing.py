import copy

import pytest
import timm
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

import backbones
import efficiency
from efficiency.checkpointing import CheckpointedBlock, convert, switch
from efficiency.saved_bytes import count_saved_bytes


class Block(nn.Module):
    def __init__(self, dim=32):
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.drop = nn.Dropout(0.5)

    def forward(self, x, *, scale=1.0):
        return x + scale * self.drop(self.mlp(x))


class Stages(nn.Module):
    """Two stages of blocks in lists."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(8, 32), nn.ReLU())
        self.stages = nn.ModuleList([nn.ModuleList([Block(), Block()]), nn.Sequential(Block())])
        self.norm = nn.BatchNorm1d(32)

    def forward(self, x):
        x = self.stem(x)
        for block in self.stages[0]:
            x = block(x, scale=0.5)
        return self.norm(self.stages[1](x))


def step(network, x):
    network.zero_grad()
    torch.manual_seed(1)
    with count_saved_bytes(network) as saved:
        output = network(x)
    output.square().sum().backward()
    return output.detach(), {name: p.grad.clone() for name, p in network.named_parameters()}, saved.total


def test_blocks_of_any_network_are_wrapped():
    torch.manual_seed(0)
    plain, x = Stages(), torch.randn(16, 8)
    network = convert(copy.deepcopy(plain))
    wrapped = [name for name, module in network.named_modules() if isinstance(module, CheckpointedBlock)]
    assert wrapped == ["stages.0.0", "stages.0.1", "stages.1.0"]
    assert network.state_dict().keys() == plain.state_dict().keys()
    assert isinstance(copy.deepcopy(network).stages[1][0], Block)
    expected, exact, before = step(plain, x)
    output, gradients, after = step(network, x)
    assert torch.equal(output, expected)  # dropout draws the same numbers again
    assert all(torch.equal(gradients[name], exact[name]) for name in exact)
    assert after < 0.4 * before
    assert torch.equal(network.eval()(x), plain.eval()(x))
    assert switch(network, False)
    assert step(network.train(), x)[2] == before


@pytest.mark.parametrize("name", ["test_vit2", "litv2_s", "test_resnet"])
def test_networks_that_can_are_told_to(name):
    options = {"embed_dim": 32, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]} if name == "litv2_s" else {}
    torch.manual_seed(0)
    plain = backbones.create(name, num_classes=3, **options).train()
    network, x = nn.Sequential(convert(copy.deepcopy(plain))), torch.randn(2, 3, 64, 64)
    assert not any(isinstance(module, CheckpointedBlock) for module in network.modules())
    expected, exact, before = step(plain, x)
    output, gradients, after = step(network, x)
    assert torch.equal(output, expected)
    for gradient, name in zip(gradients.values(), exact, strict=True):
        torch.testing.assert_close(gradient, exact[name], rtol=1e-3, atol=1e-5)
    assert after < 0.8 * before


class NormBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16, momentum=None), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x):
        return x + self.mlp(x)


@pytest.mark.parametrize("name", ["test_resnet", "wrapped blocks"])
def test_batch_norms_count_a_batch_once(name):
    torch.manual_seed(0)
    if name == "test_resnet":
        plain, x = backbones.create(name, num_classes=3).train(), torch.randn(2, 3, 64, 64)
    else:
        plain, x = nn.Sequential(NormBlock(), NormBlock()), torch.randn(16, 8)
    network = copy.deepcopy(convert(copy.deepcopy(plain)))
    for _ in range(2):
        _, exact, _ = step(plain, x)
        _, gradients, _ = step(network, x)
    for gradient, expected in zip(gradients.values(), exact.values(), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)
    for buffer, expected in zip(network.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected)
    momenta = [
        [m.momentum for m in n.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)] for n in (network, plain)
    ]
    assert momenta[0] == momenta[1]


def test_a_network_without_blocks_is_refused():
    with pytest.raises(ValueError, match="Sequential has no blocks to checkpoint"):
        convert(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = Stages()
        self.states = []

    def training_step(self, batch, batch_idx):
        torch.manual_seed(batch_idx)
        return self.network(batch).sum()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.states.append(copy.deepcopy(self.network.state_dict()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(tmp_path, callbacks, batches):
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, callbacks=callbacks, **quiet)
    module = Module()
    data = torch.randn(16 * batches, 8, generator=torch.Generator().manual_seed(3))
    trainer.fit(module, DataLoader(data, batch_size=16))
    return module


def test_counting_does_not_change_the_training(tmp_path):
    callback = efficiency.GradientCheckpointing()
    assert callback.report_rows() == []
    states = [fit(tmp_path, callbacks, 3).states for callbacks in ([callback], [])]
    for ours, plain in zip(*states, strict=True):
        assert all(torch.equal(ours[name], plain[name]) for name in plain)  # also the averages of the batch norm
    ((what, change),) = callback.report_rows()
    assert what == "kept for backward"
    plain = Stages()
    assert change.startswith(f"{step(plain, torch.randn(16, 8))[2] / 1e6:.1f} MB → ")


def test_what_does_not_fit_without_is_said_so(tmp_path, monkeypatch):
    from efficiency import checkpointing_callback

    measure = checkpointing_callback.saved_bytes

    def limited(network, *arguments):
        if not network.stages[1][0].checkpointing:
            raise torch.OutOfMemoryError
        return measure(network, *arguments)

    monkeypatch.setattr(checkpointing_callback, "saved_bytes", limited)
    callback = efficiency.GradientCheckpointing()
    module = fit(tmp_path, [callback], 2)
    assert "without, it does not fit" in callback.report_rows()[0][1]
    assert module.network.stages[1][0].checkpointing


def test_timm_networks_alone_are_not_wrapped():
    network = convert(timm.create_model("test_vit2"))
    assert network.grad_checkpointing
    assert switch(network, False)
    assert not network.grad_checkpointing
