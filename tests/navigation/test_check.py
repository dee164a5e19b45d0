import json
import shutil

import numpy as np
import pytest

from tasks.navigation.check import check_dataset
from tasks.navigation.data import R2R, SampleHouses


@pytest.fixture
def copy(houses, tmp_path):
    """A copy of the houses that may be changed."""
    shutil.copytree(houses, tmp_path / "copy")
    return tmp_path / "copy"


def change(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_the_sample_has_no_problems(house_data, capsys):
    result = check_dataset(house_data)
    assert (result.problems, result.notes) == ([], [])
    assert [summary.instructions for summary in result.splits.values()] == [120, 24, 72]
    assert [len(summary.scans) for summary in result.splits.values()] == [2, 2, 1]
    assert all(summary.cut == summary.unknown == 0 for summary in result.splits.values())
    assert house_data.check() is True
    assert "val_unseen" in capsys.readouterr().out


def test_every_problem_is_listed(copy, capsys):
    train = json.loads((copy / "R2R_train.json").read_text())
    first, second, third, fourth = (entry["path_id"] for entry in train[:4])
    scan = train[0]["scan"]

    def break_paths(entries):
        entries[0]["path"] = [entries[0]["path"][0], entries[0]["path"][2]]
        entries[1]["path"][1] = "0" * 32
        entries[2]["scan"] = "nowhere"
        entries[3]["instructions"][0] = "walk past the zebra " + "and the sofa " * 20

    change(copy / "R2R_train.json", break_paths)
    view = next(iter(json.loads((copy / "objects/index.json").read_text())))

    def forget_a_viewpoint(index):
        for key in [key for key in index if key.rsplit("_", 1)[0] == view.rsplit("_", 1)[0]]:
            del index[key]

    change(copy / "objects/index.json", forget_a_viewpoint)
    change(copy / "house_panos_gt.json", lambda rooms: rooms.pop(scan))
    change(copy / "R2R_val_unseen.json", lambda entries: entries[0].update(scan=scan, path=train[5]["path"]))

    data = SampleHouses(str(copy))
    result = check_dataset(data)
    for k in range(3):  # every instruction of a path
        assert f"train/{first}_{k}: path is not connected: viewpoints {train[0]['path'][0]} and" in "\n".join(
            result.problems
        )
        assert f"train/{second}_{k}: viewpoint '{'0' * 32}' is not in the graph of scan {scan}" in result.problems
        assert f"train/{third}_{k}: its scan nowhere has no graph" in result.problems
    assert sum(problem.startswith("scan 'nowhere': no file") for problem in result.problems) == 1
    assert sum(f"{view.split('_')[0]}: no object features of" in problem for problem in result.problems) == 1
    assert f"val_unseen: scan {scan} is in train too; expected unseen ones" in result.problems
    assert len(result.problems) == 12
    assert [f"the first is {scan};" in note for note in result.notes] == [True]
    assert (result.splits["train"].cut, result.splits["train"].unknown) == (1, 1)
    assert fourth
    assert data.check() is False
    assert f"problem: train/{third}_0: its scan nowhere has no graph" in capsys.readouterr().out


def test_what_is_missing_altogether_is_one_problem_each(copy):
    np.save(copy / "objects/features.npy", np.zeros(3))
    result = check_dataset(R2R(str(copy)))
    assert [problem for problem in result.problems if "features.npy" in problem] == result.problems
    assert result.splits["train"].instructions == 120  # the rest is checked all the same
    (copy / "vocab.txt").unlink()
    change(copy / "R2R_train.json", lambda entries: entries[0].update(path=entries[0]["path"][::2]))
    result = check_dataset(R2R(str(copy)))
    assert sum("vocab.txt: file not found." in problem for problem in result.problems) == 1
    assert sum("path is not connected" in problem for problem in result.problems) == 3
    shutil.rmtree(copy / "connectivity")
    result = check_dataset(R2R(str(copy)))
    assert [problem.splitlines()[0].rsplit("/", 1)[1] for problem in result.problems] == [
        "vocab.txt: file not found.",
        "features.npy: float64 of shape (3,); expected an array of numbers with 2 dimensions",
        "connectivity: folder not found.",
    ]
