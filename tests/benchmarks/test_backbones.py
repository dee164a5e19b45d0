import json

import pytest
import torch

from backbones.litv2 import LITv2
from benchmarks import backbones
from benchmarks.__main__ import main
from benchmarks.plain import make_plain
from benchmarks.timing import Clock, spread, time_in_turns


def test_plain_composition_computes_the_same():
    torch.manual_seed(0)
    network = LITv2(embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), alpha=0.5, num_classes=3).double()
    for name, parameter in network.named_parameters():
        if "conv_offset" in name:
            torch.nn.init.normal_(parameter)
    images = torch.randn(3, 3, 64, 96, dtype=torch.float64)
    for training in (False, True):
        network.train(training)
        ours = network(images)
        gradient = torch.autograd.grad(ours.sum(), [*network.parameters()])
        plain = make_plain(LITv2(embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), alpha=0.5, num_classes=3))
        plain = plain.double().train(training)
        plain.load_state_dict(network.state_dict())
        assert not any(type(module).__name__ in ("HiLo", "ConvFFN", "Stage") for module in plain.modules())
        theirs = plain(images)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        for a, b in zip(gradient, torch.autograd.grad(theirs.sum(), [*plain.parameters()]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_candidates_take_turns():
    calls = []
    candidates = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = time_in_turns(candidates, rounds=3, clock=Clock(torch.device("cpu")), warm_up=1)
    assert calls == ["a", "b"] * 4
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}
    assert spread([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)


def test_table_and_numbers(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(backbones, "PEERS", ("pvt_v2_b2", "deit_small_patch16_224"))
    output = tmp_path / "numbers.json"
    options = ["--batch", "1", "--size", "64", "--rounds", "1", "--device", "cpu", "--output", str(output)]
    assert main(["backbones", *options]) == 0
    printed = capsys.readouterr().out
    results = json.loads(output.read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["numbers.json"]
    for what in backbones.PASSES:
        rows = results[what]
        assert set(rows) == {"litv2_s", "litv2_s, plain composition", "pvt_v2_b2", "deit_small_patch16_224"}
        assert rows["pvt_v2_b2"]["ratio"] == 1
        ratio = rows["litv2_s"]["images_per_second"] / rows["pvt_v2_b2"]["images_per_second"]
        assert rows["litv2_s"]["ratio"] == pytest.approx(ratio)
        assert f"{rows['litv2_s']['images_per_second']:.2f}" in printed


def test_bad_options_are_one_line(capsys):
    assert main(["backbones", "--rounds", "0"]) == 2
    assert capsys.readouterr().err == "error: --rounds 0: expected at least 1\n"
