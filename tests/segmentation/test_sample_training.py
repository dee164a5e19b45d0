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
    # the whole FASeg run, and enough of Mask2Former to tell a model that learns from one that does not
    [("faseg", 800, 0.60), ("mask2former", 400, 0.30)],
)
def test_sample_reaches_its_score_on_unseen_digits(config, steps, least, tmp_path):
    command = [sys.executable, "-m", "tasks.segmentation", "fit", "-c", str(ROOT / f"configs/sample/{config}.yaml")]
    command += ["--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps)]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1700
    )
    assert done.returncode == 0, done.stderr[-3000:]
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("report: ")
    report = json.loads((tmp_path / last.removeprefix("report: ")).with_name("report.json").read_text())
    assert report["metrics"]["val/mIoU"] >= least
