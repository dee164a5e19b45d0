"""Imports point one way: tasks -> efficiency -> backbones -> kernels. The last two, and benchmarks, need only timm."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("benchmarks", "tasks", "efficiency", "backbones", "kernels")  # an import leads from left to right
LIGHT_PACKAGES = ("benchmarks", "backbones", "kernels")
# timm itself needs torchvision, numpy and safetensors.
LIGHT = {"torch", "timm", "torchvision", "numpy", "safetensors", *LIGHT_PACKAGES, *sys.stdlib_module_names}
NOT_NEEDED = (
    "lightning", "torchmetrics", "jsonargparse", "albumentations", "cv2", "pycocotools", "scipy", "sklearn",
    "jinja2", "matplotlib", "rich", "tensorboard", "triton",
)  # fmt: skip
SOURCES = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imports_of(path, source):
    """Absolute dotted names that a module imports, each with whether the module cannot be imported without it."""
    tree = ast.parse(source)
    unconditional = {node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node in unconditional) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = path.parent.parts[: len(path.parent.parts) - node.level + 1] if node.level else ()
            base = ".".join([*package, *([node.module] if node.module else [])])
            found += [(f"{base}.{alias.name}", node in unconditional) for alias in node.names]
    return found


def violations(path, source):
    """What the imports of `source`, a module at the relative `path`, break."""
    package, inner = path.parts[0], path.parts[1]
    broken = []
    for name, needed in imports_of(path, source):
        root, _, rest = name.partition(".")
        leftward = root in PACKAGES and PACKAGES.index(root) < PACKAGES.index(package)
        if leftward:
            broken.append(f"{path} imports {name}, which is to its left in {' -> '.join(PACKAGES)}")
        task = rest.partition(".")[0]
        if (root, package) == ("tasks", "tasks") and (ROOT / "tasks" / task).is_dir() and task not in (inner, "core"):
            broken.append(f"{path} imports the task {task}")
        if needed and rest.partition(".")[0].endswith("_triton") and not path.stem.endswith("_triton"):
            broken.append(f"{path} imports {name}, which needs triton")
        # Callbacks alone need Lightning; benchmarks use the plain functions. The evaluator needs NumPy alone.
        light = (
            root in LIGHT
            or leftward
            or (root, package) == ("efficiency", "benchmarks")
            or (name.startswith("tasks.video.") and package == "benchmarks" and not needed)
            or (root == "triton" and (not needed or path.stem.endswith("_triton")))
        )
        if package in LIGHT_PACKAGES and not light:
            broken.append(f"{path} imports {root}; torch, timm and (lazily) triton are enough here")
    return broken


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_point_one_way(path):
    assert violations(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("backbones/lit.py", "from tasks.core.errors import UserError", "imports tasks.core.errors.UserError"),
        ("kernels/op.py", "def f():\n    import backbones.swin", "imports backbones.swin, which is to its left"),
        ("efficiency/mesa.py", "from tasks import segmentation", "imports tasks.segmentation"),
        ("tasks/core/cli.py", "from tasks.segmentation.data import ADE20K", "imports the task segmentation"),
        ("tasks/detection/data.py", "from ..segmentation import data", "imports the task segmentation"),
        ("kernels/op.py", "import triton", "imports triton"),
        ("kernels/op.py", "from kernels.op_triton import launch", "op_triton.launch, which needs triton"),
        ("backbones/lit.py", "def f():\n    import lightning", "imports lightning"),
        ("benchmarks/backbones.py", "import tasks.core.cli", "imports tasks; torch"),
        ("tasks/core/cli.py", "import benchmarks", "imports benchmarks, which is to its left"),
    ],
)
def test_a_wrong_import_is_noticed(path, source, message):
    (broken,) = violations(Path(path), source)
    assert message in broken


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/op.py", "try:\n    import triton\nexcept ImportError:\n    triton = None"),
        ("kernels/op.py", "def f():\n    import triton.language as tl"),
        ("kernels/op.py", "def f():\n    from kernels.op_triton import launch"),
        ("kernels/op_triton.py", "import triton.language as tl"),
        ("kernels/op_triton.py", "from kernels.tiles_triton import load"),
        ("backbones/lit.py", "from kernels.dispatch import choose_path"),
        ("tasks/segmentation/data.py", "from tasks.core.data import TaskDataModule\nfrom . import sample"),
    ],
)
def test_a_right_import_is_left_alone(path, source):
    assert violations(Path(path), source) == []


def test_kernels_and_backbones_run_with_torch_and_timm_alone():
    code = f"""
import sys
sys.modules.update(dict.fromkeys({NOT_NEEDED!r}))  # importing one of these fails now
import torch, backbones, benchmarks.__main__
from efficiency import checkpointing, mesa
from kernels.attention import attention
from kernels.ms_deform_attn import ms_deform_attn
maps = backbones.create_features("resnet18")(torch.zeros(1, 3, 64, 64))
assert [tuple(m.shape[2:]) for m in maps] == [(16, 16), (8, 8), (4, 4), (2, 2)]
out = ms_deform_attn(torch.ones(1, 4, 2, 3), [(2, 2)], torch.full((1, 5, 2, 1, 1, 2), 0.5), torch.ones(1, 5, 2, 1, 1))
assert torch.equal(out, torch.ones(1, 5, 6))
assert torch.equal(attention(*torch.ones(3, 1, 2, 4, 5)), torch.ones(1, 2, 4, 5))
assert not any(name.partition(".")[0] == "tasks" for name in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
