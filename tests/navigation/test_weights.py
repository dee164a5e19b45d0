"""Weights of ORIST from official checkpoints, UNITER, BERT and ours."""

import pickle
import re

import pytest
import torch

from backbones.checkpoint import CheckpointError
from tasks.navigation.orist.network import ORISTNetwork
from tasks.navigation.weights import load_weights

WORDS = "uniter.embeddings.word_embeddings.weight"
HEADS = ("uniter.orien_embeddings.", "r2r_output", "critic", "lstm", "progress", "angle", "next_", "target_")


def make_network(vocab_size=30, seed=1, **options):
    torch.manual_seed(seed)
    small = {"hidden_dim": 16, "num_layers": 2, "num_heads": 2, "feedforward_dim": 24, "max_positions": 12}
    return ORISTNetwork(vocab_size, feature_dim=6, num_rooms=5, **small | options)


@pytest.fixture(scope="module")
def given():
    return make_network(seed=0).state_dict()


def is_text(name):
    return name.startswith("uniter.") and not name.startswith(("uniter.img_", "uniter.orien_"))


def test_official_checkpoint(given, tmp_path):
    content = {
        "model": {f"module.{name}": tensor for name, tensor in given.items()},
        "optimizer": {"state": {}},
        "epoch_id": 3,
        "best_val": 0.5,
        "global_step": 7,
        "logs": {"loss": [1.0]},
    }
    torch.save(content, tmp_path / "best_val_unseen")
    network = make_network()
    report = load_weights(network, tmp_path / "best_val_unseen")
    assert (report.layout, len(report.loaded), report.missing, report.unexpected) == ("ORIST", len(given), [], [])
    assert all(torch.equal(tensor, given[name]) for name, tensor in network.state_dict().items())


def test_checkpoint_of_ours(given, tmp_path):
    content = {"state_dict": {f"network.{name}": tensor for name, tensor in given.items()}, "epoch": 1}
    torch.save(content, tmp_path / "best.ckpt")
    network = make_network()
    assert load_weights(network, tmp_path / "best.ckpt").layout == "checkpoint of ours"
    assert torch.equal(network.r2r_output.weight, given["r2r_output.weight"])


def test_uniter_with_old_names_and_fewer_words(given, tmp_path):
    old = {
        re.sub(r"LayerNorm\.bias$", "LayerNorm.beta", re.sub(r"LayerNorm\.weight$", "LayerNorm.gamma", name)): tensor
        for name, tensor in given.items()
        if not name.startswith(HEADS)
    }
    old |= {"cls.predictions.bias": torch.zeros(3), "itm_output.weight": torch.zeros(2, 16)}
    torch.save(old, tmp_path / "uniter-base.pt")
    network = make_network(vocab_size=33)
    initial = network.state_dict()[WORDS].clone()
    report = load_weights(network, tmp_path / "uniter-base.pt")
    assert report.layout == "UNITER"
    assert sorted(report.ignored) == ["cls.predictions.bias", "itm_output.weight"]
    assert set(report.missing) == {name for name in given if name.startswith(HEADS)}
    assert "missing" in str(report)
    words = network.state_dict()[WORDS]
    assert torch.equal(words[:30], given[WORDS])
    assert torch.equal(words[30:], initial[30:])
    norm = "uniter.encoder.layer.1.output.LayerNorm.weight"
    assert torch.equal(network.state_dict()[norm], given[norm])


@pytest.mark.parametrize("prefix", ["bert.", ""])
def test_bert(given, prefix, tmp_path):
    bert = {name.replace("uniter.", prefix, 1): tensor for name, tensor in given.items() if is_text(name)}
    torch.save(bert, tmp_path / "bert.bin")
    network = make_network()
    report = load_weights(network, tmp_path / "bert.bin")
    assert report.layout.startswith("BERT")
    assert all(torch.equal(network.state_dict()[name], given[name]) for name in given if is_text(name))
    assert len(report.loaded) == len(bert)


def test_vocabularies_have_to_go_together(given, tmp_path):
    torch.save(given, tmp_path / "orist.pth")
    for vocab_size in (29, 33):
        network = make_network(vocab_size)
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        with pytest.raises(CheckpointError, match=rf"trained with 30 word pieces, but the data has {vocab_size}"):
            load_weights(network, tmp_path / "orist.pth")
        assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_other_networks_are_refused(given, tmp_path):
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "resnet.pth")
    with pytest.raises(CheckpointError, match="does not fit: 0 of"):
        load_weights(make_network(), tmp_path / "resnet.pth")
    torch.save(given, tmp_path / "narrow.pth")
    with pytest.raises(CheckpointError, match="as many layers and of the same width"):
        load_weights(make_network(hidden_dim=32), tmp_path / "narrow.pth")


def test_files_that_would_run_code_are_refused(tmp_path):
    class Harmful:
        def __reduce__(self):
            return print, ("run",)

    with (tmp_path / "bad.pth").open("wb") as file:
        pickle.dump({"model": Harmful()}, file)
    with pytest.raises(CheckpointError, match="refused"):
        load_weights(make_network(), tmp_path / "bad.pth")
