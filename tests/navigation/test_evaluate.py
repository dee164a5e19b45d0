import csv
import json
import runpy
import sys

import pytest

from tasks.navigation import benchmark
from tasks.navigation.evaluate import main
from tasks.navigation.submission import submission


@pytest.fixture(scope="module")
def shortest(house_data, tmp_path_factory):
    """The submission of an agent that walks the shortest paths in the unseen house."""
    environment = house_data.environment()
    seen = environment.reset(house_data.samples("val_unseen"))
    while not seen.ended.all():
        seen = environment.step(seen.teacher)
    records = {episode.id: {"trajectory": environment.trajectory(i)} for i, episode in enumerate(environment.episodes)}
    name, content = submission("r2r", "val_unseen", records)
    path = tmp_path_factory.mktemp("submission") / name
    path.write_bytes(content)
    return path


def run(capsys, *arguments, root):
    try:
        main([*map(str, arguments), "--data.root", str(root)])
        code = 0
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_submission_is_scored(houses, shortest, capsys, tmp_path):
    for ending in ("csv", "json"):
        output = tmp_path / f"figures.{ending}"
        arguments = ("--dataset", "r2r", "--predictions", shortest, "--output", output)
        code, out, err = run(capsys, *arguments, root=houses)
        assert (code, err) == (0, "")
        assert "72 instructions in 1 scans" in out
        assert "100.00 %" in out
    rows = list(csv.DictReader((tmp_path / "figures.csv").open()))
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert len(rows) == len(figures["instructions"]) == 72
    assert figures["summary"]["SR"] == figures["summary"]["SPL"] == figures["summary"]["nDTW"] == 1.0
    assert {float(row["SR"]) for row in rows} == {1.0}
    assert float(rows[0]["TL"]) == figures["instructions"][0]["TL"] > 0


def test_wrong_input_is_one_line(houses, shortest, capsys, tmp_path):
    half = tmp_path / "half.json"
    half.write_text(json.dumps(json.loads(shortest.read_text())[:10]))
    usual = ("--dataset", "r2r", "--predictions", shortest)
    for arguments, message in [
        (("--dataset", "r2r", "--predictions", half), "no trajectory for 62 of 72 instructions"),
        (("--dataset", "r2r", "--predictions", tmp_path / "nowhere.json"), "nowhere.json: cannot be read as JSON"),
        ((*usual, "--split", "val_seen"), "none of its 72 ids is in the split"),
        ((*usual, "--output", "figures.txt"), "expected a name that ends with .csv or .json"),
        (("--dataset", "rxr", "--predictions", shortest), "argument --dataset: invalid choice: 'rxr'"),
    ]:
        code, out, err = run(capsys, *arguments, root=houses)
        assert (code, out) == (2, "")
        assert message in err
        assert err.startswith("error: ")
        assert len(err.splitlines()) == 1
    code, _, err = run(capsys, *usual, "--split", "test", root=houses)
    assert code == 2
    assert "R2R_test.json: file not found.\nExpected layout:" in err


def test_both_commands_are_found(houses, shortest, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "REPEATS", 1)
    for arguments, words in [
        (["evaluate", "--dataset", "r2r", "--predictions", str(shortest)], "success weighted by path length"),
        (["benchmark"], "steps/s"),
    ]:
        monkeypatch.setattr(sys, "argv", ["navigation", *arguments, "--data.root", str(houses)])
        runpy.run_module("tasks.navigation", run_name="__main__")
        assert words in capsys.readouterr().out
