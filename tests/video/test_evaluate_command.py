"""``python -m tasks.video evaluate``: numbers, warnings, errors in one line, a start without torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.video.evaluate import main

ROOT = Path(__file__).parents[2]
TRUTH = {
    "v": {
        "subset": "test",
        "annotations": [{"segment": ["0", "10"], "label": "a"}, {"segment": [20, 30], "label": "b"}],
    },
    "w": {"subset": "test", "annotations": []},
    "x": {"subset": "validation", "annotations": [{"segment": [0, 1], "label": "a"}]},
}
FOUND = {
    "v": [{"label": "a", "score": 0.9, "segment": [0, 10]}, {"label": "b", "score": 0.5, "segment": [20, 26]}],
    "w": [{"label": "a", "score": 1, "segment": [0, 10]}],
}


@pytest.fixture
def files(tmp_path):
    for name, content in (("gt", {"database": TRUTH}), ("pred", {"results": FOUND}), ("blocked", ["w"])):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return [
        "--ground-truth", str(tmp_path / "gt.json"), "--predictions", str(tmp_path / "pred.json"),
    ]  # fmt: skip


def test_output(files, tmp_path, capsys):
    assert main([*files, "--output", str(tmp_path / "out.json")]) == 0
    out, err = capsys.readouterr()
    assert err == "warning: 1 predictions in 1 video (w) without instances do not count\n"
    assert out.splitlines()[0] == "afsd, subset test: 2 instances of 2 classes in 1 videos, 2 predictions"
    assert "mAP      100.00  100.00  100.00  100.00   50.00   90.00" in out
    assert "AR@1 " in out
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["metrics"]["mAP"] == pytest.approx(0.9)
    assert data["classes"] == {"a": [1] * 5, "b": [1, 1, 1, 1, 0]}
    assert len(data["false_positives"]["best_g_to_10_g"]) == 10


def test_rules_and_options(files, tmp_path, capsys):
    for options, expected in (
        (["--evaluator", "opentad", "--tious", "0.5"], "mAP       75.00   75.00"),
        (["--evaluator", "opentad", "--tious", "0.5", "--blocked", str(tmp_path / "blocked.json")], "mAP      100.00"),
        (["--evaluator", "activitynet"], "activitynet, subset validation: 1 instances"),
        (["--evaluator", "activitynet", "--subset", "test"], "AP %       0.50    0.55"),
    ):
        assert main([*files, *options]) == 0
        assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pred": "{"}, "pred.json: not valid JSON"),
        ({"pred": "[]"}, "pred.json: no 'results'; expected 'results', a dict"),
        ({"pred": '{"results": {"v": 3}}'}, "pred.json: video 'v': holds int; expected a list"),
        ({"pred": '{"results": {"v": [{"label": "a", "segment": [0, 1]}]}}'}, "'v': score is None; expected a number"),
        ({"pred": '{"results": {"v": [{"label": "a", "score": 1}]}}'}, "no 'segment'; expected 'segment', a list"),
        ({"pred": '{"results": {"v": [{"label": "a", "score": NaN, "segment": [0, 1]}]}}'}, "expected finite numbers"),
        ({"gt": '{"database": {"v": {"annotations": []}}}'}, "gt.json: video 'v': no 'subset'"),
        ({"gt": '{"database": {}}'}, "no video of subset 'test'"),
        ({"gt": '{"database": {"v": {"subset": "val", "annotations": []}}}'}, "subset 'test'; expected one of val"),
        ({"gt": '{"database": {"v": {"subset": "test", "annotations": []}}}'}, "the ground truth holds no instance"),
    ],
)  # fmt: skip
def test_bad_files_are_one_line(files, tmp_path, capsys, change, message):
    for name, text in change.items():
        (tmp_path / f"{name}.json").write_text(text)
    assert main([*files, "--output", str(tmp_path / "out.json")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "out.json").exists()


def test_bad_options_are_one_line(files, tmp_path, capsys):
    for options, message in (
        (["--evaluator", "voc"], "argument --evaluator: invalid choice: 'voc'"),
        (["--tious", "2"], "tious: [2.0] was given"),
        (["--blocked", files[1]], "expected a list of the names of videos"),
        (["--predictions", "nowhere.json"], "nowhere.json: file not found"),
    ):
        try:
            code = main([*files, *options])
        except SystemExit as end:
            code = end.code
        err = capsys.readouterr().err
        assert code == 2
        assert err.startswith("error: ")
        assert message in err
        assert err.count("\n") == 1


def test_starts_without_torch(files):
    code = (
        "import runpy, sys; sys.argv[0] = 'tasks.video'\n"
        "try: runpy.run_module('tasks.video', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "heavy = {'torch', 'lightning', 'timm', 'cv2'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code, "evaluate", *files], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "mAP" in result.stdout
