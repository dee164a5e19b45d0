"""docs/backbones.md: its Python runs from top to bottom, its commands are accepted, its figures are right."""

import re
import shlex
from pathlib import Path

import pytest
import timm
import torch

from backbones.__main__ import _parser
from backbones.published import PUBLISHED
from backbones.video_features import VIDEO_BACKBONES

TEXT = (Path(__file__).parents[2] / "docs" / "backbones.md").read_text()


def test_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": timm.create_model("litv2_s").state_dict()}, "litv2_s.pth")
    found = {}
    for block in re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE):
        exec(compile(block, "docs/backbones.md", "exec"), found)
        for line, comment in re.findall(r"^(\w+) = .*# (\(\d.*?\))$", block, re.MULTILINE):
            assert str(tuple(found[line].shape)) == comment
    assert [tuple(x.shape[2:]) for x in found["maps"]] == [(28, 28), (14, 14), (7, 7)]
    assert found["vit"].blocks[8].pos_embed.shape[1] == 23
    assert found["macs"] / 1e9 == pytest.approx(PUBLISHED["litv2_s"].gmacs, rel=0.003)
    assert "loaded" in capsys.readouterr().out


def test_commands_are_accepted():
    lines = re.findall(r"-m backbones (.*)", TEXT)
    commands = [shlex.split(line, comments=True) for line in lines]
    assert {command[0] for command in commands} == {"list", "profile", "convert"}
    for command in commands:
        _parser().parse_args(command)


def test_every_name_is_in_the_table():
    rows = "".join(line for line in TEXT.splitlines() if line.startswith("| `"))
    ranges = {"litv2_s_alpha02", "litv2_s_alpha04", "litv2_s_alpha05", "litv2_s_alpha07", "hvt_s_2"}
    ranges |= {f"pvt_v2_b{size}_{kind}" for size in (1, 2, 3) for kind in ("msa", "ecoformer")}
    assert set(re.findall(r"`(\w+)`", rows)) == (PUBLISHED.keys() - ranges) | VIDEO_BACKBONES.keys()
