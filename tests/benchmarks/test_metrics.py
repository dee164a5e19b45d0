import json

import pytest

from benchmarks.__main__ import main


def test_both_evaluations_agree_and_are_timed(tmp_path, capsys):
    output = tmp_path / "numbers.json"
    options = ["--images", "30", "--detections", "20", "--classes", "5", "--output", str(output)]
    assert main(["metrics", *options]) == 0
    rows = json.loads(output.read_text())["rows"]
    ours, peer = rows["ours"], rows["torchmetrics"]
    assert ours["numbers"]["box_AP"] == pytest.approx(peer["numbers"]["map"], abs=1e-6)
    assert ours["numbers"]["box_AP"] > 0.05
    printed = capsys.readouterr().out
    for name, row in rows.items():
        assert row["total"] == pytest.approx(row["update"] + row["compute"])
        assert f"| {name} | {row['update']:.2f} | {row['compute']:.2f} | {row['total']:.2f} |" in printed


def test_wrong_options_are_named(capsys):
    assert main(["metrics", "--images", "0"]) == 2
    assert "--images 0" in capsys.readouterr().err
