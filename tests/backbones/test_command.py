"""``python -m backbones``: what it prints, writes and refuses."""

import json
import re

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from backbones import create_features, load_checkpoint
from backbones.__main__ import main
from backbones.published import PUBLISHED


@pytest.fixture
def run(capsys):
    """Runs the command and returns (exit code, stdout, stderr)."""

    def call(*arguments):
        capsys.readouterr()
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


def refused(outcome, message):
    code, out, err = outcome
    last = err.splitlines()[-1]
    return code == 2 and out == "" and "Traceback" not in err and re.search(message, last) is not None


# -- list -------------------------------------------------------------------------------------------------------------


def test_list_shows_every_network(run):
    code, out, _ = run("list")
    rows = {line.split()[0]: line.split() for line in out.splitlines()[1:] if line.startswith(tuple(PUBLISHED))}
    assert code == 0
    assert list(rows) == list(PUBLISHED)
    assert rows["litv2_s"] == [
        "litv2_s",
        "27.84",
        "3.734",
        "224",
        "82.00",
        "classification,",
        "detection,",
        "segmentation",
    ]


def test_list_takes_patterns_and_prints_json(run):
    _, out, _ = run("list", "hvt_s_?", "--json")
    found = json.loads(out)
    assert [facts["name"] for facts in found] == ["hvt_s_0", "hvt_s_1", "hvt_s_2", "hvt_s_3"]
    assert found[1]["params"] == 22_087_144
    assert "2103.10619" in found[1]["paper"]


def test_list_names_the_nearest(run):
    assert refused(run("list", "litv2_small"), r"no network matches 'litv2_small'; nearest names: litv2_s\b")
    assert refused(run("list", "zzz"), r"no network matches 'zzz'; there are: lit_ti, ")


# -- profile ----------------------------------------------------------------------------------------------------------


def test_profile_of_one_of_ours(run):
    code, out, _ = run("profile", "hvt_ti_1", "--size", "64x96", "--batch", "2")
    assert code == 0
    assert out.startswith("hvt_ti_1, 2 images of 64 x 96, cpu, 1 threads\n")
    patches, pooled, dim = 24, 11, 192
    params = PUBLISHED["hvt_ti_1"].params - (196 - patches + 97 - pooled) * dim
    assert f"parameters     {params:,}\n" in out
    assert re.search(r"speed +[\d.]+ images/s \(forward, median of 10\)", out)
    (row,) = re.findall(r"^blocks\.1 .*", out, re.MULTILINE)
    assert row.endswith(f"2 x {pooled} x {dim}")


def test_profile_in_json_of_any_timm_model_in_training(run):
    code, out, _ = run("profile", "test_resnet", "--size", "64", "--batch", "2", "--train", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["size"] == [64, 64]
    assert found["pass"] == "forward and backward"
    assert found["macs"] == sum(stage["macs"] for stage in found["stages"]) > 0
    assert found["peak_memory_mb"] > 10
    assert {stage["name"] for stage in found["stages"]} >= {"layer1", "layer2", "layer3", "layer4", "fc"}


def test_profile_of_a_video_network(run):
    _, out, _ = run("profile", "i3d", "--size", "8x16x32", "--batch", "1")
    assert out.startswith("i3d, 1 clips of 8 x 16 x 32, cpu, 1 threads\n")
    assert "G per clip" in out
    (row,) = re.findall(r"^Mixed_4f .*", out, re.MULTILINE)
    assert row.endswith("1 x 832 x 2 x 1 x 2")


def test_profile_at_the_size_of_the_model(run):
    _, out, _ = run("profile", "test_resnet", "--batch", "1")
    assert out.startswith("test_resnet, 1 images of 160 x 160")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet5"], r"unknown backbone 'resnet5'; nearest names: resnet5"),
        (["test_resnet", "--size", "64x"], "argument --size: '64x': expected pixels as 224, or height x width"),
        (["test_resnet", "--size", "8x32x32"], "--size 8x32x32: test_resnet takes images, height x width"),
        (["test_resnet", "--size", "0"], "argument --size: '0': expected pixels"),
        (["test_resnet", "--batch", "0"], "argument --batch: '0': expected a whole number of at least 1"),
        (["test_resnet", "--device", "gpu"], "--device gpu: Expected one of cpu, cuda"),
    ],
)
def test_profile_refuses_in_one_line(run, arguments, message):
    assert refused(run("profile", *arguments), message)


# -- convert ----------------------------------------------------------------------------------------------------------


def filled(model):
    torch.manual_seed(0)
    return {name: torch.randn(t.shape).to(t.dtype) for name, t in model.state_dict().items()}


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A file like HVT's release: the weights under 'model', and what training leaves beside them."""
    path = tmp_path_factory.mktemp("released") / "hvt_ti_1.pth"
    torch.save({"model": filled(timm.create_model("hvt_ti_1", num_classes=10)), "epoch": 299}, path)
    return path


def test_convert_finds_the_network(run, released, tmp_path):
    target = tmp_path / "new" / "hvt.safetensors"
    code, out, err = run("convert", released, "--to", target)
    assert code == 0, err
    assert out.splitlines()[0] == f"{target} from {released} (hvt_ti_1)"
    assert [line.split()[-1] for line in out.splitlines()[1:]] == ["152", "0", "0", "0"]
    with safe_open(target, "pt") as file:
        assert file.metadata() == {"model": "hvt_ti_1", "flavour": "", "source": "hvt_ti_1.pth"}
    expected = torch.load(released)["model"]
    found = load_file(target)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [path.name for path in target.parent.iterdir()] == ["hvt.safetensors"]
    report = load_checkpoint(timm.create_model("hvt_ti_1", num_classes=10), target)
    assert (report.missing, report.unexpected, report.mismatched) == ([], [], {})


def test_convert_to_a_torch_file_and_keeps_what_exists(run, released, tmp_path):
    target = tmp_path / "hvt.pth"
    arguments = ("convert", released, "--model", "hvt_ti_1", "--to", target)
    target.write_text("precious")
    assert refused(run(*arguments), r"hvt\.pth exists; --force replaces it")
    assert target.read_text() == "precious"
    assert run(*arguments, "--force")[0] == 0
    content = torch.load(target)
    assert content["metadata"]["model"] == "hvt_ti_1"
    assert len(content["model"]) == 152
    assert refused(run("convert", target, "--to", target, "--force"), "is the file to read; give the new one another")


def test_convert_takes_the_backbone_of_a_detector(run, tmp_path):
    backbone = filled(create_features("lit_ti", flavour="detection"))
    content = {f"backbone.{name}": tensor for name, tensor in backbone.items()} | {"neck.weight": torch.ones(2)}
    torch.save({"meta": {"epoch": 12}, "state_dict": content}, tmp_path / "retinanet.pth")
    target = tmp_path / "lit_ti.safetensors"
    code, out, err = run("convert", tmp_path / "retinanet.pth", "--model", "lit_ti", "--to", target)
    assert code == 0, err
    assert out.splitlines()[-2].split() == ["left", "out", "1", "neck.weight"]
    assert out.splitlines()[-1].strip() == "the same tensors fit lit_ti detection"
    assert load_file(target).keys() == backbone.keys()


def test_convert_refuses_what_does_not_fit(run, released, tmp_path):
    weights = torch.load(released)["model"]
    del weights["norm.weight"]
    weights["blocks.0.pos_embed"] = torch.zeros(1, 90, 192)
    torch.save(weights | {"extra": torch.ones(1)}, tmp_path / "other.pth")
    target = tmp_path / "x.safetensors"
    message = (
        r"other\.pth fits no network here; the nearest is hvt_ti_1 \(missing: norm\.weight; unexpected: extra; "
        r"other shape: blocks\.0\.pos_embed \(1, 90, 192\) in the file, \(1, 97, 192\) in the network\)$"
    )
    assert refused(run("convert", tmp_path / "other.pth", "--to", target), message)
    assert refused(run("convert", released, "--to", target, "--model", "lit_ti"), "hvt_ti_1.pth does not hold lit_ti ")
    assert refused(run("convert", released, "--to", target, "--model", "lit_t"), "unknown backbone 'lit_t'; nearest")
    assert refused(run("convert", tmp_path / "none.pth", "--to", target), r"none\.pth: no such weight file")
    assert refused(run("convert", released, "--to", tmp_path / "x.bin"), r"x\.bin: expected a name ending in \.safet")
    assert not target.exists()
