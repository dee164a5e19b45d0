"""`python -m tasks` knows every task and configuration without importing any of them."""

import json
import subprocess
import sys
import time
from pathlib import Path

from tasks.__main__ import Config, Task, find_configs, find_tasks

ROOT = Path(__file__).parents[2]


def make_project(root):
    for name in ("core", "segmentation"):
        (root / "tasks" / name).mkdir(parents=True)
    (root / "tasks/segmentation/__init__.py").write_text('"""Semantic segmentation: FASeg.\n\nMore."""\n')
    (root / "tasks/segmentation/__main__.py").write_text("raise SystemExit('never run')\n")
    (root / "tasks/segmentation/module.py").write_text("class FASeg(Base):\n    pass\n")
    (root / "configs/sample").mkdir(parents=True)
    (root / "configs/faseg.yaml").write_text(
        "# FASeg, ADE20K\n# published: 48.3 mIoU (single scale)\nmodel:\n  class_path: FASeg\n# published: 1\n"
    )
    (root / "configs/sample/faseg.yaml").write_text("# A laptop size\nmodel:\n  class_path: tasks.segmentation.FASeg\n")
    (root / "configs/bare.yaml").write_text("seed_everything: 0\n")


def test_tasks_and_configs(tmp_path):
    make_project(tmp_path)
    assert find_tasks(tmp_path / "tasks") == [Task("segmentation", "Semantic segmentation: FASeg.")]
    assert find_configs(tmp_path / "configs", tmp_path / "tasks") == [
        Config("bare", "", "", ""),
        Config("faseg", "segmentation", "FASeg, ADE20K", "48.3 mIoU (single scale)"),
        Config("sample/faseg", "segmentation", "A laptop size", ""),
    ]


def test_missing_configs_folder_lists_nothing(tmp_path):
    assert find_configs(tmp_path / "configs", tmp_path) == []


def test_shipped_configs_are_listed_as_text_and_json():
    run = [sys.executable, "-m", "tasks"]
    text = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = json.loads(subprocess.run([*run, "--json"], cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    names = {path.relative_to(ROOT / "configs").with_suffix("").as_posix() for path in ROOT.glob("configs/**/*.yaml")}
    assert names
    assert {config["name"] for config in found["configs"]} == names
    assert all(config["description"] and config["description"] in text for config in found["configs"])
    assert all(task["description"] and task["name"] in text for task in found["tasks"])


def test_answers_at_once_without_heavy_imports():
    heavy = "{'torch', 'lightning', 'numpy', 'yaml', 'rich'}"
    code = f"import sys; from tasks.__main__ import main; main([]); assert not {heavy} & set(sys.modules)"
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    seconds = time.perf_counter() - start
    print(f"python -m tasks: {seconds:.2f} s")
    assert seconds < 3  # about 0.1 s on an idle machine
