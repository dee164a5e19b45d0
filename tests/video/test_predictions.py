"""Files of detections: ActivityNet's json, tables and subtitles."""

import json

import numpy as np
import pytest
import torch

from tasks.core.errors import UserError
from tasks.video.evaluation_files import predictions_table
from tasks.video.predictions import action_csv, action_srt, activitynet_json, merge_windows, window_key

NAMES = ["jump", "run"]


def found(*rows):
    """Rows (start, end, score, label)."""
    rows = np.array(rows, dtype=np.float64).reshape(-1, 4)
    return {"segments": rows[:, :2], "scores": rows[:, 2], "labels": rows[:, 3].astype(np.int64)}


def test_windows_are_joined_by_time():
    records = {
        window_key("a@b", 128): found((3, 4, 0.5, 1)),
        window_key("a@b", 0): {name: torch.from_numpy(value) for name, value in found((0, 1, 0.25, 0)).items()},
        window_key("c", 0): found(),
    }
    videos = merge_windows(records)
    assert list(videos) == ["a@b", "c"]
    assert videos["a@b"]["segments"].tolist() == [[0, 1], [3, 4]]
    assert videos["a@b"]["labels"].tolist() == [0, 1]
    assert videos["c"]["segments"].shape == (0, 2)
    merged = merge_windows(records, lambda id, joined: {name: values[:1] for name, values in joined.items()})
    assert merged["a@b"]["scores"].tolist() == [0.25]
    with pytest.raises(UserError, match=r"segments of shape \(1, 3\)"):
        merge_windows({window_key("a", 0): found() | {"segments": np.zeros((1, 3))}})


def test_json_can_be_read_back():
    videos = {"v": found((0, 1, 0.25, 0), (2, 3.5, 0.75, 1)), "w": found()}
    name, content = activitynet_json(videos, NAMES)
    data = json.loads(content)
    assert name == "predictions.json"
    assert data.keys() == {"version", "results", "external_data"}
    assert data["results"] == {
        "v": [
            {"label": "run", "score": 0.75, "segment": [2.0, 3.5]},
            {"label": "jump", "score": 0.25, "segment": [0.0, 1.0]},
        ],
        "w": [],
    }
    table = predictions_table(data)
    assert (table.videos, len(table)) == (("v", "w"), 2)


def test_table_of_actions():
    name, content = action_csv("clips/v", found((2, 3.5, 0.75, 1), (0, 1.004, 0.25, 0), (3, 2, 0.9, 0)), NAMES)
    assert name == "clips/v.csv"
    assert content.decode() == "start,end,action,score\n0.00,1.00,jump,0.2500\n2.00,3.50,run,0.7500\n"


def test_subtitles():
    name, content = action_srt("v", found((3723.4567, 3725, 0.755, 1), (0, 1, 0.31, 0), (5, 6, 0.2, 0)), NAMES)
    assert name == "v.srt"
    assert content.decode() == (
        "1\n00:00:00,000 --> 00:00:01,000\njump (31%)\n\n2\n01:02:03,457 --> 01:02:05,000\nrun (76%)\n"
    )
