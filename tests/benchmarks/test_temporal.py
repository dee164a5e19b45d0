"""The benchmark of the evaluator runs and says what it measured."""

import json

import pytest

from benchmarks.__main__ import main


def test_small_run(tmp_path, capsys):
    sizes = ["--videos", "4", "--detections", "30", "--classes", "3", "--instances", "5", "--rounds", "1"]
    assert main(["temporal", *sizes, "--output", str(tmp_path / "out.json")]) == 0
    assert "times faster; AP differ by" in capsys.readouterr().out
    measured = json.loads((tmp_path / "out.json").read_text())
    assert measured["largest_difference_of_ap"] <= 1e-12
    assert measured["times_faster"] == pytest.approx(measured["loop_seconds"] / measured["seconds"])


def test_bad_option(capsys):
    assert main(["temporal", "--videos", "0"]) == 2
    assert capsys.readouterr().err == "error: --videos 0: expected at least 1\n"
