"""The sample configurations train to their score, from the command line a user types."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("config", "steps", "least"),
    # most of Mask R-CNN's run, and enough of RetinaNet's, which learns more slowly, to tell that it learns
    [
        ("mask_rcnn_litv2", 400, {"val/box_AP50": 0.75, "val/mask_AP50": 0.75}),
        ("retinanet_litv2", 250, {"val/box_AP50": 0.12}),
    ],
)
def test_sample_reaches_its_score_on_unseen_digits(config, steps, least, tmp_path):
    command = [sys.executable, "-m", "tasks.detection", "fit", "-c", str(ROOT / f"configs/sample/{config}.yaml")]
    command += ["--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps)]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1700
    )
    assert done.returncode == 0, done.stderr[-3000:]
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("report: ")
    report = json.loads((tmp_path / last.removeprefix("report: ")).with_name("report.json").read_text())
    for name, value in least.items():
        assert report["metrics"][name] >= value, name
