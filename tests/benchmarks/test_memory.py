import json

import pytest

from benchmarks.__main__ import main
from benchmarks.memory import bisect

SMALL = ["memory", "--backbone", "test_vit2", "--size", "64"]


def test_bytes_and_times_of_a_small_network(tmp_path, capsys):
    output = tmp_path / "memory.json"
    assert main([*SMALL, "--batch", "2", "--rounds", "1", "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["rows"]
    plain = rows["plain, float32"]["bytes"]
    assert rows["Mesa, float32"]["bytes"] < 0.5 * plain
    assert rows["checkpointing, float32"]["bytes"] < 0.5 * plain
    printed = capsys.readouterr().out
    for name, row in rows.items():
        assert f"| {name} | {row['bytes'] / 1e6:.1f} |" in printed
        assert row["seconds"] > 0


def test_largest_batch(tmp_path, capsys):
    output = tmp_path / "batches.json"
    assert main([*SMALL, "--largest-batch", "--limit-gb", "0.05", "--output", str(output)]) == 0
    results = json.loads(output.read_text())
    batches = results["batches"]
    assert 0 < batches["plain, float32"] < batches["Mesa, float32"] < batches["checkpointing, float32"]
    assert "not tried" in results["how"]
    assert "not tried" in capsys.readouterr().out


@pytest.mark.parametrize("largest", [0, 1, 2, 3, 7, 8, 100])
def test_bisect(largest):
    tried = []
    assert bisect(lambda batch: tried.append(batch) or batch <= largest, at_most=100) == largest
    assert len(tried) < 16
    assert len(set(tried)) == len(tried)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "0"], "--batch 0"),
        (["--largest-batch", "--device", "cpu"], "--limit-gb None"),
        (["--largest-batch", "--limit-gb", "-1"], "--limit-gb -1.0"),
    ],
)
def test_wrong_options_are_named(options, message, capsys):
    assert main([*SMALL, *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
