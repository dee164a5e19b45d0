"""EcoFormer in a training: when it fits, what a checkpoint holds, what the report says, several processes."""

import pytest
import timm
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import efficiency
from efficiency.ecoformer import convert, fit, hashed_layers, unfitted_layers
from efficiency.ecoformer_callback import EcoFormer

TINY = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 4}


class Classifier(LightningModule):
    """Trains a small Vision Transformer; in each process on images of its own."""

    def __init__(self, folder=None, lr=1e-2):
        super().__init__()
        torch.manual_seed(0)
        self.network = timm.create_model("deit_tiny_patch16_224", **TINY)
        self.folder, self.lr = folder, lr
        self.functions = []

    def example_input(self):
        return torch.zeros(1, 3, 32, 32)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(1 + self.global_rank)
        images = torch.randn(8, 3, 32, 32, generator=generator)
        return DataLoader(TensorDataset(images, torch.arange(8) % 4), batch_size=4)

    def val_dataloader(self):
        return self.train_dataloader()

    def training_step(self, batch, batch_idx):
        loss = cross_entropy(self.network(batch[0]), batch[1])
        self.functions.append(functions(self.network))
        if self.folder is not None:
            torch.save(functions(self.network), self.folder / f"{self.global_step}-{self.global_rank}.pt")
        return loss

    def validation_step(self, batch, batch_idx):
        self.network(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.network.parameters(), lr=self.lr)


def functions(network):
    layers = hashed_layers(network).items()
    return {f"{name}.{key}": value.clone() for name, layer in layers for key, value in layer.hashing.named_buffers()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def trainer(tmp_path, *callbacks, epochs=1, **options):
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    options = {**quiet, "accelerator": "cpu", "enable_checkpointing": False, **options}
    return Trainer(max_epochs=epochs, default_root_dir=tmp_path, callbacks=list(callbacks), **options)


def test_functions_are_fitted_to_the_first_batch_and_once(tmp_path):
    module = Classifier()
    trainer(tmp_path, EcoFormer(num_bits=4), epochs=2).fit(module)
    assert len(module.functions) == 4
    assert all(equal(module.functions[0], later) for later in module.functions)
    assert unfitted_layers(module.network) == []
    assert all(module.functions[0][key].isfinite().all() for key in module.functions[0])


def test_fitted_functions_are_not_fitted_again_unless_asked(tmp_path):
    module = Classifier()
    fit(convert(module.network), torch.randn(2, 3, 32, 32))
    before = functions(module.network)
    trainer(tmp_path, EcoFormer(num_bits=4), epochs=2).fit(module)
    assert all(equal(before, later) for later in module.functions)
    module.functions.clear()
    trainer(tmp_path, EcoFormer(num_bits=4, refit_every=2), epochs=4).fit(module)
    fitted = module.functions[0::2]  # at the first of two batches of every epoch
    assert [equal(before, state) for state in fitted] == [True, True, False, False]
    assert equal(fitted[2], fitted[3])


def test_a_checkpoint_holds_the_functions_and_a_training_resumes_with_them(tmp_path):
    whole = Classifier()
    trainer(tmp_path, EcoFormer(num_bits=4), epochs=2).fit(whole)
    first = Classifier()
    run = trainer(tmp_path, EcoFormer(num_bits=4), epochs=1)
    run.fit(first)
    run.save_checkpoint(tmp_path / "one.ckpt")
    second = Classifier()
    trainer(tmp_path, EcoFormer(num_bits=4), epochs=2).fit(second, ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    assert equal(functions(first.network), functions(second.network))
    assert equal(first.functions[0], second.functions[0])


def test_evaluation_without_fitted_functions_warns(tmp_path):
    module = Classifier()
    with pytest.warns(UserWarning, match=r"hash functions of 2 layers are random \(blocks\.0\.attn"):
        trainer(tmp_path, EcoFormer(num_bits=4)).validate(module, verbose=False)


def test_moving_average(tmp_path):
    module = Classifier()
    trainer(tmp_path, EcoFormer(num_bits=4), EMAWeightAveraging(decay=0.5), epochs=2).fit(module)
    averaged = functions(module.network)  # now those of the average
    assert all(torch.allclose(averaged[key], module.functions[0][key], rtol=1e-6, atol=1e-7) for key in averaged)
    with pytest.raises(
        ValueError, match="EcoFormer: refit_every and a moving average of the weights exclude each other"
    ):
        trainer(tmp_path, EcoFormer(num_bits=4, refit_every=1), EMAWeightAveraging(decay=0.5)).fit(Classifier())


def test_options():
    with pytest.raises(ValueError, match="EcoFormer: refit_every=0: expected at least 1 epoch, or null"):
        EcoFormer(refit_every=0)
    assert efficiency.EcoFormer is EcoFormer


def test_report_rows(tmp_path):
    callback, module = EcoFormer(num_bits=8, num_anchors=6), Classifier()
    assert callback.report_rows() == []
    trainer(tmp_path, callback).fit(module)
    rows = dict(callback.report_rows())
    assert rows["layers with binary attention"] == 2
    assert rows["image, channels x height x width"] == "3 x 32 x 32"
    assert 0 < rows["energy, 10⁹ pJ (45 nm, 32 bit)"] < rows["energy before the conversion, 10⁹ pJ"]
    module.network.forward = lambda x: x * float(x.sum())  # cannot run without values
    assert callback.report_rows()[-1][0] == "operations"
    assert "not counted" in callback.report_rows()[-1][1]


@pytest.mark.forks
@pytest.mark.slow
def test_two_processes_have_the_functions_of_the_first(tmp_path):
    module = Classifier(tmp_path)
    trainer(
        tmp_path,
        EcoFormer(num_bits=4, refit_every=1),
        epochs=2,
        devices=2,
        strategy="ddp_fork",
        use_distributed_sampler=False,
    ).fit(module)
    seen = {path.stem: torch.load(path) for path in tmp_path.glob("*.pt")}
    assert sorted(seen) == [f"{step}-{rank}" for step in range(4) for rank in range(2)]
    for step in range(4):
        assert equal(seen[f"{step}-0"], seen[f"{step}-1"])
    assert not equal(seen["1-0"], seen["2-0"])


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_any_task_takes_it_in_three_lines(task, run_cli, request, tmp_path):
    callback = {"class_path": "efficiency.EcoFormer", "init_args": {"num_anchors": 8}}
    changes = {"trainer.callbacks": [callback], "trainer.default_root_dir": str(tmp_path / "runs")}
    if task == "classification":
        write, data = request.getfixturevalue("tiny_classifier_config"), request.getfixturevalue("tiny_digits")
        changes["model.init_args.backbone_options"] = {"patch_size": 4}
    else:
        write, data = request.getfixturevalue("tiny_config"), request.getfixturevalue("tiny_ade20k")
        changes["model.init_args.backbone"] = "pvt_v2_b0"
    config = write(data, changes=changes)
    outcome = run_cli("fit", "-c", config)
    assert outcome.code == 0, outcome.err
    assert "fitting the hash functions of" in outcome.err
    report = next((tmp_path / "runs").rglob("report.md")).read_text()
    assert "## EcoFormer" in report
    assert "energy before the conversion" in report
    best = next((tmp_path / "runs").rglob("best.ckpt"))
    outcome = run_cli("validate", "-c", config, "--ckpt_path", best)
    assert outcome.code == 0, outcome.err
    assert "are random" not in outcome.err


@pytest.mark.parametrize("task", ["classification"])
def test_what_cannot_be_converted_is_one_line(task, run_cli, tiny_classifier_config, tiny_digits):
    changes = {"trainer.callbacks": [{"class_path": "efficiency.EcoFormer"}], "model.init_args.backbone": "test_resnet"}
    outcome = run_cli("fit", "-c", tiny_classifier_config(tiny_digits, changes=changes))
    assert outcome.code == 2
    assert "error: trainer.callbacks: ResNet has no plain self-attention to exchange" in outcome.err
