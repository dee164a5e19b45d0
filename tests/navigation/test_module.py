"""The LightningModule: training steps, evaluation by split, predictions and checkpoints, in one process."""

import json

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from tasks.core.errors import UserError
from tasks.navigation.data import SampleHouses
from tasks.navigation.module import ORIST
from tasks.navigation.orist.optim import BertAdamW

TINY = {
    "hidden_dim": 16,
    "num_layers": 2,
    "num_heads": 2,
    "feedforward_dim": 24,
    "max_positions": 40,
    "max_actions": 4,
    "optim": {"lr": 1e-3, "schedule": "poly", "power": 1.0, "warmup_steps": 1, "clip_grad": 2.0},
}


def make_module(data, **options):
    torch.manual_seed(0)
    return ORIST(data.vocab_size, data.feature_dim, data.num_rooms, data.dataset, **TINY | options)


def make_trainer(folder, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        use_distributed_sampler=False,
        **quiet | {"enable_checkpointing": False} | options,
    )


@pytest.fixture
def data(houses):
    return SampleHouses(str(houses), batch_size=4, eval_batch_size=32)


@pytest.fixture(scope="module")
def trained(houses, tmp_path_factory):
    """A module after three updates, its trainer and its datamodule."""
    data = SampleHouses(str(houses), batch_size=4, eval_batch_size=32)
    module = make_module(data)
    folder = tmp_path_factory.mktemp("trained")
    trainer = make_trainer(folder, max_steps=3, limit_val_batches=2, num_sanity_val_steps=1)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(folder / "last.ckpt")
    return module, trainer, data, folder


def test_training_moves_every_parameter(trained):
    module, trainer, data, _ = trained
    initial = make_module(data).network.state_dict()
    same = [name for name, tensor in module.network.state_dict().items() if torch.equal(tensor, initial[name])]
    keys = {f"uniter.encoder.layer.{i}.attention.self.key.bias" for i in range(2)}  # without influence
    assert set(same) <= {"uniter.img_embeddings.mask_embedding.weight", *keys}
    assert {
        "train/loss",
        "train/loss_imitation",
        "train/loss_a2c",
        "train/sum_action",
    } <= trainer.callback_metrics.keys()


def test_the_official_optimizer_is_used(trained):
    _, trainer, _, _ = trained
    assert isinstance(trainer.optimizers[0], BertAdamW)
    assert {group["weight_decay"] for group in trainer.optimizers[0].param_groups} == {0.05, 0.0}
    assert set(trainer.lr_scheduler_configs[0].scheduler.get_last_lr()) == {0.0}  # after all three updates


@pytest.mark.parametrize("reinforced", [0.0, 1.0])
def test_every_parameter_has_a_gradient_in_each_half(trained, reinforced, data):
    module = make_module(data, reinforced=reinforced)
    trainer = make_trainer(None, max_steps=1, limit_val_batches=0, num_sanity_val_steps=0)
    without = []
    module.on_before_optimizer_step = lambda optimizer: without.extend(
        name for name, p in module.network.named_parameters() if p.requires_grad and p.grad is None
    )
    trainer.fit(module, datamodule=data)
    assert without == []


def test_evaluation_is_by_split_and_deterministic(trained, data):
    module, _, _, folder = trained
    trainer = make_trainer(folder)
    first, second = (trainer.validate(module, datamodule=data, verbose=False)[0] for _ in range(2))
    assert first == second
    assert {name.partition("/")[0] for name in first} == {"val_seen", "val_unseen"}
    assert {"val_unseen/SR", "val_unseen/SPL", "val_unseen/nDTW", "val_seen/NE"} <= first.keys()
    module.eval()
    evaluator = data.evaluator("val_unseen")
    walks = {}
    for batch in data.val_dataloader():  # the last bits of scores depend on the batch, and of ties the walk
        walks |= module.walk(batch)
    records = {e.id: walks[e.key] for e in data.samples("val_unseen")}
    assert first["val_unseen/SR"] == evaluator.evaluate(records).summary["SR"]
    parts = module.report_parts(data)
    assert parts.tables
    assert parts.pictures


def test_a_limited_evaluation_scores_what_it_walked(trained, data):
    module, _, _, folder = trained
    results = make_trainer(folder, limit_val_batches=1).validate(module, datamodule=data, verbose=False)[0]
    assert 0 <= results["val_seen/SR"] <= 1


def test_the_checkpoint_alone_makes_the_module(trained):
    module, _, _, folder = trained
    loaded = ORIST.load_from_checkpoint(folder / "last.ckpt")
    assert loaded.monitor == "val_unseen/SR"
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in module.state_dict().items())


def test_a_test_leaves_a_submission_that_scores_alike(trained, data, tmp_path):
    module, _, _, _ = trained
    results = make_trainer(tmp_path).test(module, datamodule=data, verbose=False)[0]
    (path,) = tmp_path.rglob("submit_*.json")
    assert path.name == "submit_r2r_val_unseen.json"
    records = {e["instr_id"]: {"trajectory": e["trajectory"]} for e in json.loads(path.read_text())}
    summary = data.evaluator("val_unseen").evaluate(records).summary
    assert {f"val_unseen/{name}": value for name, value in summary.items()} == pytest.approx(results, abs=1e-12)


def test_predictions_are_a_submission(trained, data):
    module, _, _, folder = trained
    data.predict_split = "val_unseen"
    trainer = make_trainer(folder)
    records = {}
    for batch in trainer.predict(module, datamodule=data):
        records |= batch
    ((name, content),) = module.prediction_files(records)
    entries = json.loads(content)
    assert name.endswith(".json")
    assert [entry["instr_id"] for entry in entries] == sorted(e.id for e in data.samples("val_unseen"))
    starts = {e.id: e.start for e in data.samples("val_unseen")}
    assert all(entry["trajectory"][0][0] == starts[entry["instr_id"]] for entry in entries)


def test_one_example_is_counted_for_the_cost(trained):
    from backbones.macs import count_macs

    module, trainer, _, _ = trained
    module.trainer = trainer
    example = module.example_input()
    assert example.shape == (1, 32)
    d, f, length = 16, 24, 34  # words, an object, the orientation
    least = length * (4 * d * d + 2 * d * f)
    assert least < count_macs(module.network, example) < 4 * least


def test_the_headline_of_ndh_is_goal_progress(data):
    assert make_module(data).monitor == "val_unseen/SR"
    module = ORIST(data.vocab_size, data.feature_dim, data.num_rooms, "ndh", **TINY)
    assert module.monitor == "val_unseen/GP"


def test_an_object_of_the_first_option_to_stop_is_drawn_in_training_alone(trained, data):
    module, trainer, _, _ = trained
    module.trainer = trainer
    drawn = [module._training_environment(2)._stop_feature for _ in range(2)]
    assert not np.array_equal(*drawn)
    assert not np.array_equal(*drawn[0])
    fixed = [data.environment()._stop_feature for _ in range(2)]
    assert np.array_equal(*fixed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_actions": 0}, "model.max_actions"),
        ({"beam_width": 0}, "model.beam_width"),
        ({"reinforced": 1.5}, "model.reinforced"),
        ({"num_heads": 3}, "model.num_heads"),
        ({"optim": {"schedule": "cosine"}}, "optim.schedule.*bert_optimizer"),
    ],
)
def test_wrong_options_are_named(data, options, message):
    with pytest.raises(UserError, match=message):
        make_module(data, **options)


def test_unknown_dataset(data):
    with pytest.raises(UserError, match=r"model\.dataset.*r2r, reverie, ndh"):
        ORIST(data.vocab_size, data.feature_dim, data.num_rooms, "r4r", **TINY)
