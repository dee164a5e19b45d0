import json

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.ecoformer import OURS, PEER, _fit_line, peak_bytes


def test_numbers_and_table(capsys, tmp_path):
    """Small enough for a test, large enough to tell linear from quadratic; the margin is the acceptance's."""
    output = tmp_path / "numbers.json"
    options = ["--tokens", "784", "3136", "--heads", "1", "2", "--rounds", "3", "--output", str(output)]
    assert main(["ecoformer", *options]) == 0
    printed = capsys.readouterr().out
    results = json.loads(output.read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["numbers.json"]
    for heads in ("1", "2"):
        small, large = results["heads"][heads]["rows"]
        assert large["ratio"] == pytest.approx(large["ms"][PEER] / large["ms"][OURS])
        assert large["ratio"] >= 2
        assert large["bytes"][OURS] == pytest.approx(4 * small["bytes"][OURS], rel=0.02)
        assert results["heads"][heads]["growth"]["ms"][OURS]["exponent"] < 1.4
        assert f"| {heads} | 3136 | {large['ms'][PEER]:.2f} | {large['ms'][OURS]:.2f} |" in printed


def test_peak_bytes_counts_what_is_alive_at_once():
    x = torch.ones(1000)

    def run():
        a = x + 1
        b = a.view(10, 100)[:5] * 2  # half of it
        del a
        return (b + 1).sum()

    assert peak_bytes(run) == 4000 + 2000
    assert peak_bytes(lambda: x.view(10, 100)) == 0


def test_fit_line():
    assert _fit_line([1, 2, 3], [5, 7, 9]) == (2, 1)
    slope, r_squared = _fit_line([0, 1, 2, 3], [0, 1, 4, 9])
    assert slope == 3
    assert r_squared == pytest.approx(15**2 / (5 * 49))  # of the sums of squares 5 and 49


def test_bad_options_are_one_line(capsys):
    assert main(["ecoformer", "--rounds", "0"]) == 2
    assert capsys.readouterr().err == "error: --rounds 0: expected at least 1\n"
    assert main(["ecoformer", "--tokens", "784"]) == 2
    assert capsys.readouterr().err == "error: --tokens 784: expected two or more positive numbers\n"
