"""What importing the package changes, what it leaves alone and what it says where something is missing."""

import importlib.machinery
import importlib.util
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet", reason="the extra openmmlab is not installed")

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_one_line_of_a_configuration_is_enough(tmp_path):
    """A fresh process that imports nothing of Frugal: `custom_imports`, then a model of mmdet and one of mmseg."""
    config = tmp_path / "config.py"
    config.write_text(
        'custom_imports = dict(imports=["tasks.core.openmmlab"])\n'
        'backbone = dict(type="FrugalBackbone", name="test_resnet", out_indices=(1, 2))\n'
    )
    code = """
import sys
from mmengine.config import Config
backbone = Config.fromfile(sys.argv[1]).backbone
assert not {"mmdet", "mmseg", "lightning"} & set(sys.modules)
import mmcv.ops, mmdet, mmseg, torch
from mmdet.registry import MODELS as of_mmdet
from mmseg.registry import MODELS as of_mmseg
for registry in (of_mmdet, of_mmseg):
    maps = registry.build(backbone)(torch.zeros(1, 3, 64, 64))
    assert isinstance(maps, tuple) and len(maps) == 2
from mmengine.utils.dl_utils.misc import mmcv_full_available
assert mmcv_full_available()
import mmcv, mmcv._ext
assert mmcv._ext is sys.modules["mmcv._ext"] and mmcv._ext.__name__ == "tasks.core.openmmlab.ext"
"""
    command = [sys.executable, "-W", "ignore", "-c", code, str(config)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_compiled_operations_are_left_alone(monkeypatch):
    from tasks.core import openmmlab

    compiled = types.ModuleType("mmcv._ext")
    compiled.__spec__ = importlib.machinery.ModuleSpec("mmcv._ext", None)
    monkeypatch.setitem(sys.modules, "mmcv._ext", compiled)
    monkeypatch.setattr(openmmlab, "_provide_operations", lambda: pytest.fail("operations were replaced"))
    openmmlab.install()
    assert sys.modules["mmcv._ext"] is compiled


def test_again_changes_nothing():
    from tasks.core.openmmlab import install

    install()
    from mmcv.ops import multi_scale_deform_attn as attention

    before = sys.modules["mmcv._ext"], attention.multi_scale_deformable_attn_pytorch
    install()
    assert (sys.modules["mmcv._ext"], attention.multi_scale_deformable_attn_pytorch) == before


@pytest.mark.parametrize("absent", [["mmcv"], ["mmengine", "mmcv"]])
def test_missing_extra(absent, monkeypatch):
    from tasks.core.errors import UserError
    from tasks.core.openmmlab import install

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else found(name))
    with pytest.raises(UserError) as caught:
        install()
    assert str(caught.value) == (
        f"{' and '.join(absent)} cannot be imported: install Frugal with its extra openmmlab, "
        "pip install 'frugal-vision[openmmlab]'"
    )


def test_operation_that_is_missing_says_so_when_it_is_called():
    from tasks.core.openmmlab import install

    install()
    import mmcv.ops

    boxes = torch.zeros(2, 9, 2)
    with pytest.raises(NotImplementedError, match="mmcv's operation min_area_polygons is not compiled here"):
        mmcv.ops.min_area_polygons(boxes.flatten(1))
    with pytest.raises(AttributeError):
        _ = mmcv._ext.__wrapped__


def test_every_operation_of_mmcv_is_here_or_in_the_page_as_missing():
    from tasks.core.openmmlab import ext

    page = (ROOT / "docs" / "openmmlab.md").read_text()
    sources = [path.read_text() for path in Path(importlib.util.find_spec("mmcv").origin).parent.glob("ops/*.py")]
    lists = re.findall(r"load_ext\(\s*'_ext',\s*\[(.*?)\]", "".join(sources), flags=re.DOTALL)
    names = {name for names in lists for name in re.findall(r"'(\w+)'", names)}
    assert "nms" in names and len(names) > 100  # noqa: PT018
    missing = {re.sub(r"_(forward|backward).*", "", name) for name in names if name not in vars(ext)}
    table = page[page.index("## Operations") :]
    here, absent = table.split("Not here")
    assert {name for name in missing if f"`{name}`" not in absent} == set()
    present = {re.sub(r"_(forward|backward).*", "", name) for name in names if name in vars(ext)}
    assert {name for name in present if f"`{name}`" not in here} == set()
