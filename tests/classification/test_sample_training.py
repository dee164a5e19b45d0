"""A sample configuration trains to its score, from the command line a user types."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_sample_reaches_its_score_on_unseen_digits(tmp_path):
    command = [sys.executable, "-m", "tasks.classification", "fit", "-c", str(ROOT / "configs/sample/litv2.yaml")]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1100
    )
    assert done.returncode == 0, done.stderr[-3000:]
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("report: ")
    report = json.loads((tmp_path / last.removeprefix("report: ")).with_name("report.json").read_text())
    assert report["metrics"]["val/top1"] >= 0.97
