"""SPViT on the digits, from the command lines a user types: a dense network, the search, the fine-tuning."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from backbones.spvit_architecture import Architecture

ROOT = Path(__file__).parents[2]


def fit(folder, name, *options):
    """Train a sample; its run folder and report."""
    command = [sys.executable, "-m", "tasks.classification", "fit", "-c", str(ROOT / f"configs/sample/{name}.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *options], cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = folder / done.stdout.strip().splitlines()[-1].removeprefix("report: ")
    return report.parent, json.loads(report.with_name("report.json").read_text())["metrics"]["val/top1"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_pruned_network_is_as_good_as_the_dense_one(tmp_path):
    dense, dense_top1 = fit(tmp_path, "deit")
    searched, _ = fit(tmp_path, "spvit_search", "--model.weights", str(dense / "checkpoints/best.ckpt"))
    for name in ("architecture.json", "pruned.safetensors"):
        (tmp_path / name).write_bytes((searched / name).read_bytes())
    _, top1 = fit(tmp_path, "spvit_finetune")
    found = Architecture.read(tmp_path / "architecture.json")
    plain = Architecture.unpruned("deit", 64, [4], [4], 8)
    assert found.macs(32, 10) == pytest.approx(2.2e6, rel=0.02)
    assert found.macs(32, 10) <= 0.7 * plain.macs(32, 10)
    assert dense_top1 >= 0.94
    assert top1 >= dense_top1 - 0.02
