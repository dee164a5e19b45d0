"""The sample configurations learn to find actions, from the command line a user types."""

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
    ("config", "epochs", "least"),
    # two of five epochs of STPT tell a model that learns from one that does not, one of the image backbone
    [("stpt", 2, 0.30), ("afsd_frames", 1, 0.15)],
)
def test_sample_finds_actions_in_unseen_videos(config, epochs, least, tmp_path):
    pytest.importorskip("av")
    command = [sys.executable, "-m", "tasks.video", "fit", "-c", str(ROOT / f"configs/sample/{config}.yaml")]
    command += ["--trainer.max_epochs", str(epochs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr[-3000:]
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("report: ")
    report = json.loads((tmp_path / last.removeprefix("report: ")).with_name("report.json").read_text())
    assert report["metrics"]["val/mAP"] >= least
