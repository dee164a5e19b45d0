"""Every two ways to train together: both do their part, or the pair is refused with one sentence."""

import itertools
import json

import pytest
import timm
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import efficiency
from efficiency import mesa
from efficiency.callback import EfficiencyCallback
from efficiency.ecoformer import hashed_layers, unfitted_layers
from efficiency.spvit import is_gated

METHODS = {
    "Mesa": lambda: efficiency.Mesa(),
    "EcoFormer": lambda: efficiency.EcoFormer(num_bits=4, num_anchors=8),
    "SPViT": lambda: efficiency.SPViT(target=0.001, weight=1e5),
    "GradientCheckpointing": lambda: efficiency.GradientCheckpointing(),
    "EMA": lambda: EMAWeightAveraging(decay=0.5),
    "DDP": lambda: None,  # two processes
}
# In the order of the list of callbacks; a moving average comes after the methods that exchange modules.
REFUSED = {
    ("EcoFormer", "SPViT"): "EcoFormer and SPViT both exchange the attention of a network: use one of them",
    ("SPViT", "EcoFormer"): "EcoFormer and SPViT both exchange the attention of a network: use one of them",
    ("EMA", "EcoFormer"): "EcoFormer exchanges parts of the network: list it before the moving average",
    ("EMA", "SPViT"): "SPViT exchanges parts of the network: list it before the moving average",
}


class Classifier(LightningModule):
    """A small Vision Transformer; each process has images of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = timm.create_model(
            "deit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=4
        )
        self.losses = []

    def example_input(self):
        return torch.zeros(1, 3, 32, 32)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(1 + self.global_rank)
        images = torch.randn(12, 3, 32, 32, generator=generator)
        return DataLoader(TensorDataset(images, torch.arange(12) % 4), batch_size=4)

    def training_step(self, batch, batch_idx):
        loss = cross_entropy(self.network(batch[0]), batch[1])
        for callback in self.trainer.callbacks:
            if isinstance(callback, EfficiencyCallback):
                loss = loss + sum(callback.loss_terms(self).values())
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.network.parameters(), lr=1e-3)


def evidence(name, trainer, module):
    """What shows that a method did its part."""
    callback = next((c for c in trainer.callbacks if type(c).__name__ in (name, f"{name}WeightAveraging")), None)
    match name:
        case "Mesa":
            saved = mesa.find(module.network).saved
            return len(mesa.find(module.network).ranges) > 0 and saved.total < saved.plain_total
        case "EcoFormer":
            return len(hashed_layers(module.network)) == 2 and not unfitted_layers(module.network)
        case "SPViT":
            return is_gated(module.network) and dict(callback.report_rows())["target, 10⁶ multiply-adds"] == 1.0
        case "GradientCheckpointing":
            return callback._kept < 0.7 * callback._plain
        case "EMA":
            return int(callback._average_model.n_averaged) > 0
        case "DDP":
            return trainer.world_size == 2


class Witness(Callback):
    """Writes what a process has seen at the end of its training."""

    def __init__(self, folder, names):
        self.folder, self.names = folder, names

    def on_train_end(self, trainer, pl_module):
        seen = {name: bool(evidence(name, trainer, pl_module)) for name in self.names}
        seen["losses"] = pl_module.losses
        seen["weights"] = [p.double().sum().item() for p in pl_module.network.parameters()]
        (self.folder / f"seen-{trainer.global_rank}.json").write_text(json.dumps(seen))


def train(folder, names):
    """Train with the methods and return what each process saw."""
    module = Classifier()
    before = [p.double().sum().item() for p in module.network.parameters()]
    callbacks = [callback for name in names if (callback := METHODS[name]()) is not None]
    # last in the list, and before the average takes the place of the weights
    callbacks.insert(0, Witness(folder, names))
    two = {"devices": 2, "strategy": "ddp_fork"} if "DDP" in names else {"devices": 1}
    quiet = dict.fromkeys(
        ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing", "use_distributed_sampler"),
        False,
    )
    Trainer(max_epochs=1, accelerator="cpu", default_root_dir=folder, callbacks=callbacks, **two, **quiet).fit(module)
    seen = [json.loads(path.read_text()) for path in sorted(folder.glob("seen-*.json"))]
    assert len(seen) == two["devices"]
    return before, seen


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(pair, id="-".join(pair), marks=pytest.mark.forks if pair[0] == "DDP" else ())
        for pair in itertools.permutations(METHODS, 2)
        if pair[1] != "DDP"
    ],
)
def test_pair(names, tmp_path):
    if message := REFUSED.get(names):
        with pytest.raises(ValueError, match=message):
            train(tmp_path, names)
        return
    before, seen = train(tmp_path, names)
    for process in seen:
        assert all(process[name] for name in names)
        assert all(loss == loss and abs(loss) < 1e4 for loss in process["losses"])
        assert process["weights"] == seen[0]["weights"] != before


def test_every_method_has_its_row():
    assert set(efficiency.CALLBACKS) | {"EMA", "DDP"} == set(METHODS)
